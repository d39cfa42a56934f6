"""Users' mistakes and broken files around `gmeta predict`: one message, exit code 2, the user's data untouched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import fails, train_words
from packs import make_pack, raw_rows

from gmeta.cli import run
from gmeta.core.files import replacing
from gmeta.data.sources import confine, open_file
from gmeta.serving import predict

pytestmark = pytest.mark.faults
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pack, run_dir = make_pack(folder / "pack"), folder / "run"
    assert run(train_words(pack, run_dir, epochs=1)) == 0
    return run_dir


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with support.parquet and query.parquet, which fit the run."""
    rows = raw_rows()
    pq.write_table(pa.table({**rows, "click": [1, 0, 1]}), tmp_path / "support.parquet")
    pq.write_table(pa.table(rows), tmp_path / "query.parquet")
    return tmp_path


def predict_words(run_dir: Path, files: Path, out: Path) -> list[str]:
    inputs = ["--support", str(files / "support.parquet"), "--query", str(files / "query.parquet")]
    return ["predict", "--run_dir", str(run_dir), *inputs, "--out", str(out)]


def rename(file: Path, old: str, new: str) -> None:
    """Give a column of a Parquet file another name; where there is none of the old name, add one."""
    table = pq.read_table(file)
    if old not in table.column_names:
        table = table.append_column(old, pa.array(range(table.num_rows)))
    pq.write_table(table.rename_columns([new if name == old else name for name in table.column_names]), file)


def same(folder: Path, file: Path) -> Path:
    return file


def dotted(folder: Path, file: Path) -> Path:
    return folder / ".." / folder.name / file.name


def symlink(folder: Path, file: Path) -> Path:
    (folder / "link.parquet").symlink_to(file)
    return folder / "link.parquet"


def hard_link(folder: Path, file: Path) -> Path:
    os.link(file, folder / "link.parquet")
    return folder / "link.parquet"


@pytest.mark.parametrize("side", ["support", "query"])
@pytest.mark.parametrize("out", [same, dotted, symlink, hard_link])
def test_an_input_is_never_overwritten(
    files: Path, capsys: Capture, side: str, out: Callable[[Path, Path], Path]
) -> None:
    file = files / f"{side}.parquet"
    before = file.read_bytes()
    # There is no run: the refusal comes before anything is read.
    fails(predict_words(files / "no_run", files, out(files, file)), capsys, f"would overwrite {side} {file}", "another")
    assert file.read_bytes() == before


def test_an_earlier_output_is_overwritten(trained: Path, files: Path) -> None:
    out = files / "scores.parquet"
    out.write_text("old")
    assert run(predict_words(trained, files, out)) == 0
    assert pq.read_table(out).column_names[-2:] == ["score", "score_before"]


@pytest.mark.parametrize("name", ["score", "Score", "SCORE_BEFORE", "__row", "__ROW", "__Problem", "File_Row_Number"])
def test_a_column_called_as_one_of_ours(files: Path, capsys: Capture, name: str) -> None:
    query = files / "query.parquet"
    rename(query, "extra", name)
    words = predict_words(files / "no_run", files, files / "scores.parquet")
    fails(words, capsys, f"{query} has a column {name!r}", "rename the column")


@pytest.mark.parametrize("name", ["__row", "__ROW", "__problem", "FILE_ROW_NUMBER"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_no_raw_file_has_a_reserved_column(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / f"raw.{suffix}"
    if suffix == "csv":
        file.write_text(f"user,{name}\na,1\n")
    else:
        pq.write_table(pa.table({"user": ["a"], name: [1]}), file)
    with duckdb.connect() as con, pytest.raises(ValueError, match=f"has a column '{name}'.*rename the column"):
        open_file(con, file)


@pytest.mark.parametrize("damage", ["garbage", "cut", "other columns", "missing"])
def test_a_damaged_vocabulary(trained: Path, files: Path, capsys: Capture, damage: str) -> None:
    run_dir = files / "run"
    shutil.copytree(trained, run_dir)
    file = run_dir / "vocab" / "item.parquet"
    content = file.read_bytes()
    if damage == "garbage":
        file.write_bytes(b"garbage" * 100)
    elif damage == "cut":
        file.write_bytes(content[:-20])
    elif damage == "other columns":
        rename(file, "id", "number")
    else:
        file.unlink()
    fails(
        predict_words(run_dir, files, files / "scores.parquet"),
        capsys,
        str(file),
        "copy it again from the pack, or train again",
    )
    assert not (files / "scores.parquet").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_full_disk_leaves_nothing(
    trained: Path, files: Path, capsys: Capture, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfinished file lies on a full device; the earlier output stays."""

    @contextmanager
    def on_a_full_device(path: Path) -> Iterator[Path]:
        with replacing(path) as partial:
            partial.unlink()
            partial.symlink_to("/dev/full")
            yield partial

    out = files / f"scores.{suffix}"
    out.write_text("old")
    monkeypatch.setattr(predict, "replacing", on_a_full_device)
    fails(predict_words(trained, files, out), capsys, f"cannot write {out}", "No space left on device", "free space")
    assert out.read_text() == "old"
    assert {path.name for path in files.iterdir()} == {"support.parquet", "query.parquet", out.name}


def test_an_interrupt_leaves_nothing(trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        if Path(target).name == "scores.csv":
            raise KeyboardInterrupt
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    assert run(predict_words(trained, files, files / "scores.csv")) == 130
    assert {path.name for path in files.iterdir()} == {"support.parquet", "query.parquet"}


def test_an_out_below_a_file(trained: Path, files: Path, capsys: Capture) -> None:
    out = files / "query.parquet" / "scores.csv"
    fails(predict_words(trained, files, out), capsys, f"cannot write {out}")


SQL = "7 AS INTEGER)) FROM read_csv('SECRET', header=false) --"
CRAFTED: list[tuple[str, list[str | int], object, str]] = [
    ("data", ["features", 0, "hash_buckets"], SQL, "hash_buckets is"),
    ("data", ["features", 0, "hash_buckets"], True, "hash_buckets is True: must be a whole number"),
    ("data", ["features", 0, "max_length"], "1", "max_length"),
    ("data", ["features", 0, "kind"], ["multi"], "kind is"),
    ("data", ["features", 0, "table"], 7, "table is 7"),
    ("data", ["features", 0, "odd"], 7, "unknown key 'odd'"),
    ("data", ["features"], "all", "must be a list"),
    ("data", ["label_threshold"], SQL, "label_threshold is"),
    ("data", ["label_threshold"], float("nan"), "label_threshold is nan: must be a finite number"),
    ("data", ["label_threshold"], 10**400, "label_threshold is of 1329 bits: must be a finite number"),
    ("data", ["item_statistics"], "yes", "item_statistics is"),
    ("data", ["task"], None, "'task' is missing"),
    ("data", [], [1], "must be a mapping"),
    ("pack", ["numeric", 0, "mean"], SQL, "mean is"),
    ("pack", ["numeric", 0, "std"], 0, "std is 0: must be more than 0"),
    ("pack", ["numeric", 0, "std"], float("inf"), "std is inf: must be a finite number"),
    ("pack", ["features", 0, "num_ids"], 2**31, "num_ids is"),
    ("pack", ["label_mean"], None, "label_mean is None"),
    ("pack", ["identity"], {"item": 3}, "identity is"),
    ("pack", ["encoding"], True, "encoding True"),
]


@pytest.mark.parametrize(("part", "where", "value", "said"), CRAFTED, ids=lambda x: str(x)[:40])
def test_a_crafted_schema_is_refused_and_no_sql_of_it_runs(
    trained: Path, files: Path, tmp_path: Path, capsys: Capture, part: str, where: list, value: object, said: str
) -> None:
    run_dir, secret = tmp_path / "crafted", tmp_path / "secret.csv"
    secret.write_text("42\n")
    shutil.copytree(trained, run_dir)
    schema = json.loads((run_dir / "schema.json").read_text())
    value = value.replace("SECRET", str(secret)) if isinstance(value, str) else value
    inside, path = schema, [part, *where]
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    (run_dir / "schema.json").write_text(json.dumps(schema))
    fails(predict_words(run_dir, files, tmp_path / "out.parquet"), capsys, str(run_dir / "schema.json"), said)
    fails(["evaluate", "--run_dir", run_dir], capsys, str(run_dir / "schema.json"), said)


def test_encoding_reads_its_own_files_and_no_others(tmp_path: Path) -> None:
    own, other = tmp_path / "own[1]*.csv", tmp_path / "other.csv"
    for file in (own, other):
        file.write_text("x\n1\n")
    with duckdb.connect() as con:
        part = open_file(con, own)
        confine(con, [own])
        assert con.execute(part.query).fetchall() == [(1, "1")]
        attempts = [
            open_file(duckdb.connect(), other).query,
            f"COPY (SELECT 1) TO '{tmp_path / 'written.csv'}'",
            f"ATTACH '{tmp_path / 'new.db'}'",
            "SELECT * FROM read_text('/etc/hostname')",
            "INSTALL httpfs",
        ]
        for attempt in attempts:
            with pytest.raises(duckdb.PermissionException):
                con.execute(attempt)
        with pytest.raises(duckdb.Error):
            con.execute("SET enable_external_access = true")
        with pytest.raises(duckdb.Error):
            con.execute(f"SET allowed_directories = ['{tmp_path}']")
