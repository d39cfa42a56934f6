"""The Meta-IO benchmark's own parts: rivals give the same batches, dropped files are dropped, shares are weighted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from gmeta.core.batch import TaskBatch
from gmeta.data.pack import open_pack

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/io.py, under another name than the standard library's io."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = util.spec_from_file_location("io_benchmark", BENCHMARKS / "io.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["io_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in ("io_benchmark", "io_formats", "common"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def formats(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    for write in bench.SMALL.writers:
        write(root, 200)
    return root


def test_every_format_gives_the_same_batches_without_end(bench: ModuleType, formats: Path) -> None:
    split = open_pack(formats / "pack").split("train")
    for variant, open_variant in bench.OPEN.items():
        if "2 workers" in variant:  # the same code in other processes
            continue
        batches: list[TaskBatch] = list(islice(open_variant(formats), 4))
        assert [batch.num_tasks for batch in batches] == [128, 72] * 2, variant
        assert [bench.differences(batch, split) for batch in batches] == [[]] * 4, variant
        tasks = [task for batch in batches[:2] for task in batch.task_id.tolist()]
        assert sorted(tasks) == list(range(200)), variant
        other = replace(batches[0], query=replace(batches[0].query, label=1 - batches[0].query.label))
        assert bench.differences(other, split) == ["query.label"]


def test_dropped_files_are_not_in_the_page_cache(bench: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    bench.read_all(tmp_path)
    assert bench.cached_share([file]) == 1
    bench.drop(file)
    if bench.cached_share([file]) == 1:
        pytest.skip("this file system does not let go of its pages")
    assert bench.cached_share([file]) < 0.1
    bench.read_all(file)
    assert bench.cached_share([file]) == 1


def test_measuring_reads_batches_and_memory(bench: ModuleType, formats: Path) -> None:
    found = bench.measure("pack", formats, seconds=0.2)
    assert min(found["samples_per_s"], found["samples_per_cpu_s"]) > 0
    assert 0 < found["padding"] < 0.5
    assert found["anonymous_mb"] < 200


def test_shares_are_weighted_by_time_and_leave_the_warm_up_out(bench: ModuleType) -> None:
    def step(time_s: float, share: float) -> dict[str, float | str]:
        return {"kind": "train", "time_s": time_s, "samples_per_s": 100.0, "padding": 0.1, "input_share": share}

    warm_up = [step(float(i + 1), 1.0) for i in range(bench.WARM_UP_STEPS)]
    records = [*warm_up, {"kind": "valid"}, step(11.0, 0.2), step(14.0, 0.0)]
    assert bench.summary(records) == pytest.approx(
        {"samples_per_s": 100.0, "padding": 0.1, "input_share": 0.05, "input_ms": 100.0}
    )


def test_every_ablation_is_of_the_study(bench: ModuleType) -> None:
    from study.variants import parts

    assert {"all on", "not sequential", "no size buckets", "nothing ahead"} <= bench.ABLATIONS.keys()
    for name, switches in bench.ABLATIONS.items():
        assert (parts(*switches) != parts()) == (name != "all on")
