"""Days of `gmeta prepare --base`, each trained by a warm start from the bundle of the day before."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import fails, gmeta

from gmeta.data.pack import open_pack
from gmeta.runs.bundle import open_bundle, read_manifest

SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [{"name": "item", "min_count": 2}, "city"],
    "numeric": ["price"],
    "item_statistics": True,
}
STATE = ("rows", "exp_avg", "exp_avg_sq", "steps")


def log(path: Path, day: int) -> Path:
    """Users and items of a day: ten users and eight items arrive and leave each day. User `few` has a row on day 0, too
    few for a task, and then two.
    """
    rng = np.random.default_rng(day)
    lines = ["user,item,city,price,click,at"]
    for user in range(10 * day, 40 + 10 * day):
        for at, item in enumerate(rng.integers(8 * day, 24 + 8 * day, 9)):
            click = int(rng.random() < (0.8 if (user + item) % 3 == 0 else 0.2))
            lines.append(f"u{user},i{item},c{user % 5},{rng.normal():.3f},{click},{100 * day + at}")
    lines += [f"few,i{8 * day + at},c1,0.5,1,{100 * day + at}" for at in range(min(day + 1, 2))]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(pack: Path, run_dir: Path, *more: object) -> Path:
    words = ["--loader.tasks_per_batch", 10, "--schedule.max_steps", 3, "--schedule.eval_every", 3]
    gmeta("train", "--pack", pack, "--run_dir", run_dir, "--precision", "float64", *words, *more)
    return run_dir


NEW = (
    "--model.name",
    "melu",
    "--model.args.hidden",
    "[8]",
    "--model.embedding_dim",
    6,
    "--embedding.optimizer",
    "adam",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Pack and bundle of three days; the packs of the later days are made of the bundles."""
    place = tmp_path_factory.mktemp("chain")
    (place / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    made: list[tuple[Path, Path]] = []
    for day in range(3):
        pack, run_dir, version = (place / f"{name}{day}" for name in ("pack", "run", "version"))
        words = ["--input", log(place / f"{day}.csv", day), "--out", pack]
        if made:
            gmeta("prepare", *words, "--base", made[-1][1], "--evict_after_days", 2)
            train(pack, run_dir, "--warm_start", made[-1][1])
        else:
            gmeta("prepare", *words, "--schema", place / "schema.yaml", "--query_size", 3, "--min_task_rows", 2)
            train(pack, run_dir, *NEW)
        gmeta("bundle", "--run_dir", run_dir, "--checkpoint", "last", "--out", version)
        made.append((pack, version))
    return made


def item_values(version: Path) -> list[str | None]:
    return list(pq.read_table(version / "vocab/item.parquet")["value"].to_pylist())


def test_state_has_the_ids_of_the_vocabulary_each_day(chain: list[tuple[Path, Path]]) -> None:
    for _, version in chain:
        bundle = open_bundle(version, training=True)
        for table, entry in bundle.manifest["tables"].items():
            values = pq.read_table(version / "vocab" / f"{table}.parquet")["value"].to_pylist()
            assert entry["ids"] == 1 + len(values)
            ids = torch.arange(entry["ids"])
            for name in STATE:
                found = bundle.rows(table, ids, name)
                assert len(found) == entry["ids"]
                assert found.double().abs().max() < 1e3
    assert None in item_values(chain[-1][1])


def test_growth_changes_no_other_row(chain: list[tuple[Path, Path]], tmp_path: Path) -> None:
    """With rates of 0: an id that goes on has the row and moments of the day before, a tombstone none."""
    still = ("--dense.lr", 0, "--embedding.lr", 0, "--dense.inner_lr_lr", 0, "--schedule.max_steps", 1)
    (_, base), (pack, _) = chain[1], chain[2]
    run_dir = train(pack, tmp_path / "still", "--warm_start", base, *still)
    gmeta("bundle", "--run_dir", run_dir, "--checkpoint", "last", "--out", tmp_path / "version")
    before, after = (open_bundle(version, training=True) for version in (base, tmp_path / "version"))
    old, new = item_values(base), item_values(tmp_path / "version")
    going_on = torch.tensor([i for i, (a, b) in enumerate(zip(old, new, strict=False), 1) if a == b is not None])
    gone = torch.tensor([i for i, value in enumerate(new, 1) if value is None])
    assert len(going_on) > 10
    assert len(gone) > 3
    assert torch.equal(before.rows("item", going_on), after.rows("item", going_on))
    assert not after.rows("item", gone).any()
    for name in STATE[1:]:
        assert not after.rows("item", gone, name).any()


def test_pack_and_bundle_are_the_same_base(chain: list[tuple[Path, Path]], tmp_path: Path) -> None:
    """A pack that is made of the run's pack has the bytes of one that is made of its bundle; of a first pack too."""
    for day, (base, made) in enumerate(pairwise([pack for pack, _ in chain]), start=1):
        out = tmp_path / f"pack{day}"
        words = ["--input", base.parent / f"{day}.csv", "--out", out, "--evict_after_days", 2]
        gmeta("prepare", "--base", base, *words)
        assert (out / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()


def test_a_bundle_says_what_it_is_of(chain: list[tuple[Path, Path]]) -> None:
    manifests = [read_manifest(version) for _, version in chain]
    assert [manifest["day"] for manifest in manifests] == [0, 1, 2]
    assert [manifest["parent"] for manifest in manifests] == [None, manifests[0]["id"], manifests[1]["id"]]


def test_a_run_is_judged_and_answers(chain: list[tuple[Path, Path]], tmp_path: Path) -> None:
    pack, version = chain[2]
    gmeta("evaluate", "--run_dir", version.parent / "run2", "--checkpoint", "last", "--pack", pack)
    gone = next(v for v in item_values(chain[0][1]) if v not in item_values(version))
    rows = [f"new,{item},c1,0.5,{k % 2},{k}" for k, item in enumerate((gone, "i30", "i31"))]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["user,item,city,price,click,at", *rows]) + "\n")
    words = ["--support", file, "--query", file, "--out", tmp_path / "scores.parquet"]
    gmeta("predict", "--run_dir", version, *words)
    assert len(pq.read_table(tmp_path / "scores.parquet")) == 3


def test_a_bundle_without_its_pack_is_no_base(
    chain: list[tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack, version = chain[0]
    place = pack.parent
    shutil.move(pack, tmp_path / "elsewhere")
    try:
        words = ["--run_dir", place / "run0", "--checkpoint", "last", "--out", tmp_path / "version"]
        gmeta("bundle", *words)
        assert "cannot be continued by `gmeta prepare --base`: the run's pack" in capsys.readouterr().err
    finally:
        shutil.move(tmp_path / "elsewhere", pack)
    more = ["--input", place / "1.csv", "--out", tmp_path / "pack"]
    fails(["prepare", "--base", tmp_path / "version", *more], capsys, "holds nothing that a pack could continue")
    assert "day" not in read_manifest(tmp_path / "version")
    damaged = tmp_path / "damaged"
    shutil.copytree(version, damaged)
    part = damaged / "training/increment/history/00000.parquet"
    part.write_bytes(part.read_bytes()[:-9] + bytes(9))
    fails(["prepare", "--base", damaged, *more], capsys, "history/00000.parquet is damaged", "make the bundle again")


def test_first_packs_have_no_history(chain: list[tuple[Path, Path]], tmp_path: Path, capsys: Any) -> None:
    """The history of the bundle of a first pack is that of its shards, and of the tasks that it left out."""
    pack, version = chain[0]
    history = pq.read_table(version / "training/increment/history")
    assert len(history) == 1 + sum(open_pack(pack).split(name).num_rows for name in ("train", "valid", "test"))
    assert not list(version.glob("training/increment/left_out*"))
    assert "few" in pq.read_table(chain[1][0] / "tasks.parquet")["key"].to_pylist()
