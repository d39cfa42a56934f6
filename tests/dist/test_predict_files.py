"""`gmeta predict` on files of any size: parts on disk, shared by ranks, and one output whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import TELL_PEAK, fails, gmeta, train_words
from harness import run_ranks
from packs import make_pack
from packs import user_rows as rows

from gmeta.config.evaluation import PredictConfig
from gmeta.data.prepare import parts
from gmeta.parallel.mesh import Mesh
from gmeta.serving.predict import predict_on

FEW = 40
"""Rows of a part here, so that small files have many parts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, support.parquet and query.parquet; some users of the query have no support."""
    folder = tmp_path_factory.mktemp("files")
    gmeta(*train_words(make_pack(folder / "pack"), folder / "run", "--meta.inner_lr", 0.5, epochs=1))
    pq.write_table(rows(60, 5, 1, label=True), folder / "support.parquet")
    query = rows(70, 6, 2, label=False)
    pq.write_table(query.append_column("extra", pa.array(np.arange(query.num_rows))), folder / "query.parquet")
    return folder


def settings(place: Path, out: Path, **more: Any) -> PredictConfig:
    inputs = {"support": str(place / "support.parquet"), "query": str(place / "query.parquet")}
    return PredictConfig(run_dir=str(place / "run"), out=str(out), **{**inputs, **more})


def predicted(mesh: Mesh, config: PredictConfig, part_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_ROWS", part_rows)
        predict_on(config, mesh)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("suffix", "several"),
    [("csv", (2,)), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("parquet", (2, 4)), ("csv", (4,))))],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    place: Path, tmp_path: Path, suffix: str, several: tuple[int, ...]
) -> None:
    for nproc in (1, *several):
        run_ranks(nproc, predicted, settings(place, tmp_path / f"{nproc}.{suffix}"), FEW)
    whole = (tmp_path / f"1.{suffix}").read_bytes()
    assert all((tmp_path / f"{nproc}.{suffix}").read_bytes() == whole for nproc in several)
    assert len(list(tmp_path.iterdir())) == 1 + len(several)  # no scratch is left


def test_parts_change_neither_rows_nor_scores(place: Path, tmp_path: Path) -> None:
    predicted(Mesh(), settings(place, tmp_path / "whole.parquet"), 10**9)
    predicted(Mesh(), settings(place, tmp_path / "parts.parquet"), FEW)
    whole, dealt = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert whole.column_names == dealt.column_names
    given = pq.read_table(place / "query.parquet")
    assert dealt.select(given.column_names).equals(given.cast(dealt.select(given.column_names).schema))
    for name in ("score", "score_before"):
        np.testing.assert_allclose(dealt[name], whole[name], rtol=1e-5)
    changed = np.abs(dealt["score"].to_numpy() - dealt["score_before"].to_numpy()) > 1e-6
    known = np.isin(dealt["user"].to_pylist(), [f"new{i}" for i in range(60)])
    assert changed[known].mean() > 0.9
    assert not changed[~known].any()


def test_a_task_with_many_rows_goes_on_in_other_parts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = pq.read_table(place / "query.parquet")
    users = ["new1" if i % 3 else user for i, user in enumerate(query["user"].to_pylist())]
    pq.write_table(query.set_column(0, "user", pa.array(users)), tmp_path / "query.parquet")
    for name, part_rows in (("whole", 10**9), ("parts", FEW)):
        config = settings(place, tmp_path / f"{name}.parquet", query=str(tmp_path / "query.parquet"))
        predicted(Mesh(), config, part_rows)
    said = capsys.readouterr().out
    assert said.count(f"420 rows of {len(set(users))} tasks") == 2
    whole, dealt = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    for name in ("score", "score_before"):
        np.testing.assert_allclose(dealt[name], whole[name], rtol=1e-5)
    assert dealt.drop(["score", "score_before"]).equals(whole.drop(["score", "score_before"]))


def test_scores_before_adaptation_are_left_out_on_demand(place: Path, tmp_path: Path) -> None:
    predicted(Mesh(), settings(place, tmp_path / "both.parquet"), FEW)
    predicted(Mesh(), settings(place, tmp_path / "after.parquet", before=False), FEW)
    both, after = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("both", "after"))
    assert after.equals(both.drop(["score_before"]))


def test_what_a_killed_command_left_is_removed(place: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.parquet.scratch" / "rows" / "part=1"
    left.mkdir(parents=True)
    (left / "old.parquet").write_text("left behind")
    predicted(Mesh(), settings(place, tmp_path / "out.parquet"), FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == 420


def refused(mesh: Mesh, config: PredictConfig) -> str:
    with pytest.raises(ValueError) as error:
        predicted(mesh, config, FEW)
    return str(error.value)


@pytest.mark.dist
def test_what_one_rank_finds_all_ranks_refuse(place: Path, tmp_path: Path) -> None:
    table = pq.read_table(place / "support.parquet").to_pydict()
    table["click"][-1] = 3
    pq.write_table(pa.table(table), tmp_path / "support.parquet")
    config = settings(place, tmp_path / "out.parquet", support=str(tmp_path / "support.parquet"))
    said = run_ranks(2, refused, config)
    assert all("has label 3: the run was trained on clicks" in text for text in said)
    assert [path.name for path in tmp_path.iterdir()] == ["support.parquet"]


def test_a_memory_limit_that_is_too_low_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--run_dir", place / "run", "--support", place / "support.parquet"]
    words += ["--query", place / "query.parquet", "--out", tmp_path / "out.parquet", "--memory_limit"]
    fails([*words, "100KB"], capsys, "memory_limit is too low", "raise it")
    fails([*words, "much"], capsys, "memory_limit is 'much'", "500MB")
    assert not list(tmp_path.iterdir())


PEAK = f"""
import sys
from gmeta.cli import run
from gmeta.data.prepare import parts
parts.PART_ROWS = 1 << 15
code = run(sys.argv[1:])
{TELL_PEAK}
sys.exit(code)
"""


def many_rows(copies: int, each: int, *, label: bool) -> pa.Table:
    """Rows of 2,500 users a copy."""
    table, tables = rows(2500, each, 1, label=label), []
    for number in range(copies):
        users = pa.array([f"{user}-{number}" for user in table["user"].to_pylist()])
        tables.append(table.set_column(0, "user", users))
    return pa.concat_tables(tables)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(place: Path, tmp_path: Path) -> None:
    peaks = []
    for copies in (2, 20):
        pq.write_table(many_rows(copies, 4, label=True), tmp_path / "support.parquet")
        pq.write_table(many_rows(copies, 16, label=False), tmp_path / "query.parquet")
        words = ["predict", "--run_dir", place / "run", "--support", tmp_path / "support.parquet"]
        words += ["--query", tmp_path / "query.parquet", "--out", tmp_path / f"{copies}.parquet"]
        words += ["--memory_limit", "100MB", "--before", "false"]
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
        assert pq.read_metadata(tmp_path / f"{copies}.parquet").num_rows == copies * 2500 * 16
    assert peaks[1] - peaks[0] < 100, peaks  # MB, of a million rows where there were a hundred thousand
