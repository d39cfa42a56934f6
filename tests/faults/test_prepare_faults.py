"""Bad input, full disks, kills and rivals: prepare says what is wrong and where, and leaves no half pack."""

import gzip
import math
import os
import re
import signal
import time
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from forks import Forked

from gmeta.cli import run
from gmeta.config.data import PrepareConfig
from gmeta.data.pack import lock_directory, open_pack
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.prepare.prepare import prepare

pytestmark = pytest.mark.faults

SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": ["item", "city"],
    "multi": [{"name": "tags", "separator": "|"}],
    "numeric": ["price"],
}
HEADER = "user,item,city,tags,price,at,click"


def quiet(*_: object) -> None:
    """A report that says nothing."""


def lines(num_users: int = 6, rows: int = 4) -> list[str]:
    return [f"u{u},{r},Rome,a|b,1.5,{u * 10 + r},{r % 2}" for u in range(num_users) for r in range(rows)]


def make(
    tmp_path: Path, rows: list[str], schema: object = None, header: str = HEADER, **settings: object
) -> PrepareConfig:
    file = tmp_path / "log.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema or SCHEMA))
    values: dict[str, object] = {"query_size": 1, "threads": 1, "memory_limit": "300MB", **settings}
    return PrepareConfig(
        out=str(tmp_path / "pack"),
        input=[str(file)],
        schema=str(tmp_path / "schema.yaml"),
        **values,  # type: ignore[arg-type]
    )


def refuse(config: PrepareConfig, *parts: str) -> str:
    """prepare must raise a ValueError that says all of `parts`, and leave nothing behind."""
    with pytest.raises(ValueError) as caught:
        prepare(config, quiet)
    message = str(caught.value)
    for part in parts:
        assert part in message
    parent = Path(config.out).parent
    assert [p.name for p in parent.iterdir() if p.name.startswith(Path(config.out).name)] == []
    return message


BAD_ROWS = {
    "label missing": ("u1,7,Rome,a,1.5,3,", "'click': is missing"),
    "label NaN": ("u1,7,Rome,a,1.5,3,nan", "'click': 'nan' is missing"),
    "label no number": ("u1,7,Rome,a,1.5,3,yes", "'click': 'yes' is no number"),
    "label infinite": ("u1,7,Rome,a,1.5,3,inf", "'click': 'inf' is infinite"),
    "key missing": (",7,Rome,a,1.5,3,1", "'user': is missing"),
    "key NaN": ("nan,7,Rome,a,1.5,3,1", "'user': 'nan' is missing"),
    "key beyond int64": (
        "9223372036854775808,7,Rome,a,1.5,3,1",
        "'9223372036854775808' is a whole number beyond int64",
    ),
    "feature missing": ("u1,7,,a,1.5,3,1", "'city': is missing"),
    "feature beyond int64": ("u1,99999999999999999999,Rome,a,1.5,3,1", "'item': '99999999999999999999'"),
    "number missing": ("u1,7,Rome,a,,3,1", "'price': is missing"),
    "number no number": ("u1,7,Rome,a,cheap,3,1", "'price': 'cheap' is no number"),
    "time no number": ("u1,7,Rome,a,1.5,noon,1", "'at': 'noon' is not a number"),
    "line too long": ("u1,7,Rome,a,1.5,3,1,8", "no valid CSV line"),
    "line too short": ("u1,7,Rome", "no valid CSV line"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_fails_with_its_place(tmp_path: Path, case: str):
    row, says = BAD_ROWS[case]
    rows = lines()
    rows.insert(2, row)
    place = "log.csv, line 4" if "line" in case else "log.csv, row 3, column"
    refuse(make(tmp_path, rows), "1 rows cannot be used", place, says, "--on_bad_rows quarantine")


def test_quarantine_keeps_every_bad_row_with_its_reason(tmp_path: Path):
    rows = lines() + [row for row, _ in BAD_ROWS.values()]
    config = make(tmp_path, rows, on_bad_rows="quarantine")
    summary = prepare(config, quiet)
    rejects = pq.read_table(Path(config.out) / "rejects.parquet").to_pylist()
    assert len(rejects) == len(BAD_ROWS) == sum(summary["bad_rows"].values())
    assert sum(s["rows"] for s in summary["splits"].values()) == len(lines())
    assert summary["rows_read"] == len(rows)
    assert {r["column"] for r in rejects} == {"user", "item", "city", "price", "at", "click", None}
    assert {"file", "row", "column", "value", "reason"} == set(rejects[0])
    assert open_pack(config.out).manifest["counts"]["bad_rows"] == summary["bad_rows"]


def test_a_clean_pack_has_no_rejects(tmp_path: Path):
    config = make(tmp_path, lines(), on_bad_rows="quarantine")
    assert prepare(config, quiet)["bad_rows"] == {}
    assert not (Path(config.out) / "rejects.parquet").exists()


def test_only_bad_rows(tmp_path: Path):
    refuse(make(tmp_path, [BAD_ROWS["key missing"][0]], on_bad_rows="quarantine"), "no row that can be used")


def test_missing_inputs(tmp_path: Path):
    config = make(tmp_path, lines())
    refuse(replace(config, input=[str(tmp_path / "nothing.csv")]), "nothing.csv does not exist")
    refuse(replace(config, input=[str(tmp_path / "*.parquet")]), "matches no file")
    (tmp_path / "empty").mkdir()
    refuse(replace(config, input=[str(tmp_path / "empty")]), "directory without Parquet or CSV")
    refuse(replace(config, input=[str(tmp_path / "schema.yaml")]), "neither Parquet nor CSV")
    refuse(replace(config, schema=str(tmp_path / "other.yaml")), "other.yaml does not exist")
    refuse(replace(config, input=[]), "name --input and --schema")


def test_columns(tmp_path: Path):
    refuse(make(tmp_path, lines(), header=HEADER.replace("city", "citi")), "no column 'city'", "did you mean 'citi'?")
    refuse(make(tmp_path, lines(), header=HEADER.replace("city", "item")), "two columns called 'item'")
    config = make(tmp_path, lines())
    table = pa.table([pa.array([1, 2])] * 2, names=["user", "User"])
    pq.write_table(table, tmp_path / "twice.parquet")
    refuse(replace(config, input=[str(tmp_path / "twice.parquet")]), "two columns called 'user' and 'User'")


def test_empty_files(tmp_path: Path):
    refuse(make(tmp_path, []), "no row that can be used")
    config = make(tmp_path, [])
    (tmp_path / "log.csv").write_text("")
    refuse(config, "log.csv is empty")
    (tmp_path / "log.parquet").write_bytes(b"PAR1 nonsense")
    refuse(replace(config, input=[str(tmp_path / "log.parquet")]), "no readable Parquet")


def test_text_that_is_not_utf8(tmp_path: Path):
    config = make(tmp_path, lines())
    with (tmp_path / "log.csv").open("ab") as file:
        file.write(b"u1,7,K\xf6ln,a,1.5,3,1\n")
    refuse(config, "log.csv")


def test_parquet_types(tmp_path: Path):
    config = replace(make(tmp_path, lines()), input=[str(tmp_path / "log.parquet")])
    good = {
        "user": pa.array(["a", "a", "b", "b"]),
        "item": pa.array([1, 2, 3, 4]),
        "city": pa.array(["x"] * 4),
        "tags": pa.array([["t"], [], ["t"], ["t", "u"]]),
        "price": pa.array([1.0] * 4),
        "at": pa.array([1, 2, 3, 4]),
        "click": pa.array([0, 1, 0, 1]),
    }

    def write(**columns: pa.Array) -> None:
        pq.write_table(pa.table({**good, **columns}), tmp_path / "log.parquet")

    write(city=pa.array([["x"]] * 4))
    refuse(config, "'city' has type VARCHAR[]", "lists go under multi")
    write(tags=pa.array([1, 2, 3, 4]))
    refuse(config, "'tags' has type BIGINT", "needs a list column")
    write(tags=pa.array([["t"], None, ["t"], [None]]))
    refuse(config, "row 2, column 'tags': is missing", "row 4, column 'tags'", "missing element")
    write(price=pa.array([[1.0]] * 4))
    refuse(config, "'price' has type DOUBLE[]", "needs a number")
    nested = {"price": [Decimal(1)], "click": [Decimal(1)], "at": [datetime(2024, 1, 1)], "city": {"a": 1}}
    for column, value in (*nested.items(), ("tags", [[datetime(2024, 1, 1)]]), ("tags", [{"a": 1}])):
        write(**{column: pa.array([value] * 4)})
        refuse(config, f"column '{column}' has type", "unfit for")
    write(item=pa.array([1, 2, 3, 2**63], pa.uint64()))
    refuse(config, "row 4, column 'item': '9223372036854775808' is a whole number beyond int64")
    write(item=pa.array([1.0, 2.5, float("nan"), 1e17]))
    refuse(config, "row 2, column 'item': '2.5' is a fraction", "row 3, column 'item': 'nan' is missing", "row 4")
    for column in ("click", "price"):
        write(**{column: pa.array([0.0, 1.0, float("nan"), 1.0])})
        refuse(config, f"row 3, column '{column}': 'nan' is missing")
        write(**{column: pa.array([0.0, 1.0, float("inf"), 1.0])})
        refuse(config, f"row 3, column '{column}': 'inf' is infinite")
    write(item=pa.array([1.0, 2.0, 3.0, 4.0]))
    prepare(config, quiet)
    assert "1" in pq.read_table(Path(config.out) / "vocab" / "item.parquet")["value"].to_pylist()


def damage(path: Path, column: int, how: str) -> None:
    """Spoil the page of one column of a Parquet file: its header, or its content."""
    meta = pq.ParquetFile(path).metadata.row_group(0).column(column)
    content = bytearray(path.read_bytes())
    start = meta.data_page_offset + (meta.total_compressed_size // 2 if how == "content" else 0)
    content[start : start + 64] = bytes(byte ^ 0xFF for byte in content[start : start + 64])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("column", "compression", "how"),
    [("user", "gzip", "content"), ("code", "gzip", "header"), ("code", "snappy", "content")],
)
def test_a_damaged_page_is_named(tmp_path: Path, column: str, compression: str, how: str):
    """Nothing of column code can be wrong, so that it is first read when tasks are made."""
    rows = {"user": [f"user {i % 97}" for i in range(2000)], "code": [i * i for i in range(2000)]}
    table = pa.table({**rows, "click": [i % 2 for i in range(2000)]})
    pq.write_table(table, tmp_path / "log.parquet", compression=compression, use_dictionary=False)
    damage(tmp_path / "log.parquet", table.column_names.index(column), how)
    schema = {"task": "user", "label": "click", "categorical": [{"name": "code", "nulls": "oov"}]}
    config = replace(make(tmp_path, [], schema), input=[str(tmp_path / "log.parquet")])
    message = refuse(config, "cannot be read", "write ")
    assert "quote" not in message
    with pytest.raises(ValueError, match="cannot be read"):
        encode_file(tmp_path, config)


def encode_file(tmp_path: Path, config: PrepareConfig) -> None:
    """Encode the config's input, as predict would, with the vocabularies of sound rows."""
    rows = [f"user {i % 7},{i},{i % 2}" for i in range(60)]
    sound = make(tmp_path, rows, yaml.safe_load(Path(str(config.schema)).read_text()), "user,code,click")
    prepare(sound, quiet)
    pack = open_pack(sound.out)
    file = config.inputs[0]
    encode_tables(file, file, pack.manifest["data_schema"], pack.path / "vocab", pack.schema)


@pytest.mark.parametrize("how", ["content", "sum"])
def test_a_damaged_gzip_file_is_no_shorter_file(tmp_path: Path, how: str):
    """DuckDB takes damage inside for the end of the file."""
    rows = [f"u{i % 50},{i},Rome,a|b,{i * 0.37:.3f},{i * i % 9973},{i % 2}" for i in range(5000)]
    config = make(tmp_path, [])
    content = bytearray(gzip.compress("\n".join([HEADER, *rows]).encode(), mtime=0))
    place = len(content) // 2 if how == "content" else len(content) - 8
    content[place] ^= 0xFF
    (tmp_path / "log.csv.gz").write_bytes(content)
    refuse(replace(config, input=[str(tmp_path / "log.csv.gz")]), "log.csv.gz is damaged", "compress it again")


def test_input_that_changes_meanwhile_is_refused(tmp_path: Path):
    config = replace(make(tmp_path, lines()), input=[str(tmp_path / "log.parquet")])
    table = pa.table({"user": [1, 1, 2, 2] * 9, "item": range(36), "at": range(36), "click": [0.0, 1.0] * 18})
    schema = {"task": "user", "label": "click", "time": "at", "item": "item", "categorical": ["item"]}
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    pq.write_table(table, config.inputs[0])

    def cut_short(stage: str, done: int, total: int) -> None:
        if stage == "dealing rows to shards" and done == 0:
            pq.write_table(table.slice(0, 30), config.inputs[0])

    with pytest.raises(ValueError, match="the input changed while it was read"):
        prepare(config, cut_short)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("pack")] == []
    prepare(config, quiet)


def test_too_few_tasks(tmp_path: Path):
    refuse(make(tmp_path, lines(num_users=1)), "there are 1 tasks", "at least 2", "'user'")
    refuse(
        make(tmp_path, lines(rows=1)),
        "none of the 6 tasks has a support row",
        "each has one row; is 'user' the right task column?",
    )
    config = make(tmp_path, lines(rows=1), min_task_rows=2)
    refuse(config, "there are 0 tasks", "6 left out: fewer rows than min_task_rows")
    config = make(tmp_path, lines(), {**SCHEMA, "partition": "city"}, partitions={"Oslo": "train"})
    refuse(config, "6 left out: partition Rome is not in partitions")
    config = make(tmp_path, lines(), {**SCHEMA, "partition": "city"}, partitions={"Rome": "test", "Oslo": "train"})
    refuse(config, "no task is left to train on")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labl": "x"}, "unknown key 'labl': did you mean 'label'?"),
        ({"label": None}, "key 'label' is missing"),
        ({"categorical": "item"}, "must be a list of columns"),
        ({"categorical": [{"name": "item", "min_cout": 2}]}, "unknown key 'min_cout': did you mean 'min_count'?"),
        ({"categorical": [{"name": "item", "min_count": 0}]}, "must be at least 1"),
        ({"categorical": [{"name": "item", "min_count": "two"}]}, "must be a whole number"),
        ({"categorical": [{"name": "item", "nulls": "drop"}]}, "must be error or oov"),
        ({"categorical": ["item", "item"]}, "'item' is listed twice"),
        ({"categorical": [{"min_count": 2}]}, "name is None: must be a column name"),
        ({"categorical": [], "multi": []}, "no feature is listed"),
        ({"categorical": ["item", {"name": "city", "table": "item", "min_count": 2}]}, "differ in min_count"),
        ({"categorical": [{"name": "item", "hash_buckets": 8, "min_count": 2}]}, "no effect"),
        ({"numeric": [{"name": "price", "log": "yes"}]}, "must be true or false"),
        ({"item": None, "item_statistics": True}, "needs the key item"),
        ({"time": 3}, "must be a column name"),
        ({"categorical": ["item", SCHEMA["label"]]}, "is the label and a feature"),
        ({"numeric": [SCHEMA["label"]]}, "is the label and a feature"),
        ({"numeric": ["item_mean"], "item_statistics": True}, "item_statistics adds a column 'item_mean' itself"),
        ({"categorical": [1]}, "schema.categorical[0] is 1: must be a column name (a number in quotes), or a mapping"),
        ({"label_threshold": math.nan}, "label_threshold is nan: must be a finite number"),
        ({"label_threshold": 1e39}, "label_threshold is 1e+39: must be a finite number"),
        ({"label_threshold": 10**400}, "must be a finite number"),
    ],
)
def test_schema_mistakes(tmp_path: Path, change: dict[str, object], says: str):
    refuse(make(tmp_path, lines(), {**SCHEMA, **change}), "schema.yaml", says)


def test_schema_that_is_no_yaml(tmp_path: Path):
    config = make(tmp_path, lines())
    (tmp_path / "schema.yaml").write_text("task: [user\n")
    refuse(config, "schema.yaml")
    (tmp_path / "schema.yaml").write_bytes("task: größe\n".encode("latin-1"))
    refuse(config, "schema.yaml cannot be read", "in UTF-8")


@pytest.mark.parametrize(
    ("schema", "settings", "says"),
    [
        ({"time": None}, {"split_query": "last"}, "split_query is 'last', but the schema names no time"),
        ({"time": None}, {"task_split": "time"}, "task_split is 'time', but the schema names no time"),
        ({}, {"task_split": "column"}, "add the key partition"),
        ({}, {"partitions": {"a": "train"}}, "partitions has no effect"),
        ({"partition": "city"}, {"test_fraction": 0.1}, "test_fraction has no effect"),
        ({"partition": "city"}, {"partitions": {"Rome": "test"}}, "map a partition to train"),
        ({}, {"dataset": "ml-1k"}, "did you mean 'ml-1"),
        ({}, {"dataset": "ml-1m", "root": "."}, "leave input and schema out"),
        ({}, {"root": "."}, "root has no effect"),
        ({}, {"query_size": 9, "max_task_rows": 9}, "max_task_rows is 9: it leaves no task the rows for query_size 9"),
        (
            {},
            {"query_size": 4, "support_size": 6, "max_train_task_rows": 9},
            "for support_size 6 and query_size 4; raise it",
        ),
        ({}, {"query_size": None, "support_size": 9, "max_task_rows": 9}, "the rows for support_size 9"),
        ({}, {"max_task_rows": 9, "max_train_task_rows": 10}, "max_train_task_rows is 10: must be at most"),
        ({}, {"min_task_rows": 9, "max_train_task_rows": 8}, "max_train_task_rows is 8: must be at least 9"),
        ({}, {"max_task_rows_keep": "last"}, "set max_task_rows too"),
        ({"time": None}, {"max_task_rows": 9, "max_task_rows_keep": "last"}, "add the key time"),
        ({}, {"label_threshold": 1e39}, "label_threshold is 1e+39: must be a finite number"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, schema: dict[str, object], settings: dict[str, object], says: str
):
    refuse(make(tmp_path, lines(), {**SCHEMA, **schema}, **settings), says)


def test_a_task_has_a_row():
    with pytest.raises(ValueError, match="min_task_rows is 0: must be at least 1"):
        PrepareConfig(out="pack", min_task_rows=0)


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "ml-1m-melu"])
def test_a_missing_data_set_says_where_to_get_it(tmp_path: Path, name: str):
    config = PrepareConfig(out=str(tmp_path / "pack"), dataset=name, root=str(tmp_path))
    refuse(config, f"dataset {name}", "lacks", "https://grouplens.org/datasets/movielens/")
    refuse(replace(config, root=None), "needs root")


def test_command_line_mistakes_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = make(tmp_path, [*lines(), BAD_ROWS["label NaN"][0]])
    argv = ["prepare", "--input", config.inputs[0], "--schema", str(config.schema), "--out", config.out]
    assert run([*argv, "--query_size", "1"]) == 2
    assert "row 25, column 'click': 'nan' is missing" in capsys.readouterr().err
    assert run([*argv, "--query_size", "0"]) == 2
    assert run([*argv, "--qeury_size", "1"]) == 2
    assert "query_size" in capsys.readouterr().err
    assert not Path(config.out).exists()


def test_predict_refuses_bad_rows_and_columns(tmp_path: Path):
    config = make(tmp_path, lines())
    prepare(config, quiet)
    pack = open_pack(config.out)
    query = tmp_path / "query.csv"

    def encode(text: str) -> None:
        query.write_text(text)
        encode_tables(config.inputs[0], str(query), pack.manifest["data_schema"], pack.path / "vocab", pack.schema)

    with pytest.raises(ValueError, match=r"query\.csv has no column 'price'"):
        encode("user,item,city,tags\nu1,3,Rome,a\n")
    with pytest.raises(ValueError, match=r"query\.csv, row 2, column 'price': 'cheap' is no number"):
        encode("user,item,city,tags,price\nu1,3,Rome,a,1\nu1,3,Rome,a,cheap\n")
    with pytest.raises(ValueError, match="nothing to score"):
        encode("user,item,city,tags,price\n")
    with pytest.raises(ValueError, match="does not exist"):
        encode_tables("gone.csv", str(query), pack.manifest["data_schema"], pack.path / "vocab", pack.schema)


# ------------------------------------------------------------------------------------- disk, kills, rivals


def test_existing_output_is_kept(tmp_path: Path):
    config = make(tmp_path, lines())
    Path(config.out).mkdir()
    (Path(config.out) / "mine").write_text("keep")
    with pytest.raises(ValueError, match="exists: remove it or choose another out"):
        prepare(config, quiet)
    assert (Path(config.out) / "mine").read_text() == "keep"


def test_an_output_below_a_file_is_refused(tmp_path: Path):
    config = make(tmp_path, lines())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write .*file/pack\.scratch: .*; choose another out"):
        prepare(replace(config, out=str(tmp_path / "file" / "pack")), quiet)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_rival_is_refused_and_leftovers_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = make(tmp_path, lines())
    scratch = tmp_path / "pack.scratch"
    lock = lock_directory(scratch)
    (scratch / "rows.duckdb").write_bytes(b"half written")
    with pytest.raises(ValueError, match="being written by another process"):
        prepare(config, quiet)
    assert (scratch / "rows.duckdb").read_bytes() == b"half written"
    os.close(lock)  # as the kernel does when its owner is killed
    prepare(config, quiet)
    assert "an interrupted prepare left behind" in capsys.readouterr().err
    assert open_pack(config.out).splits == ("train", "valid", "test")
    assert not scratch.exists()


RUN = """
import resource, signal, sys, time
from gmeta.config.data import PrepareConfig
from gmeta.data.prepare.prepare import prepare
limit, pause, *values = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
def report(stage, done, total):
    print(stage, flush=True)
    if stage == pause and done == 0:
        time.sleep(60)
out, file, schema = values
prepare(PrepareConfig(out=out, input=[file], schema=schema, query_size=1, threads=1, memory_limit="300MB"), report)
"""


def start(config: PrepareConfig, limit: int = 0, pause: str = "") -> Forked:
    words = ["-c", RUN, str(limit), pause, config.out, config.inputs[0], str(config.schema)]
    return Forked(words, os.environ, pipes=(1, 2))


@pytest.mark.parametrize("limit", [20_000, 400_000])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path, limit: int):
    """A limit on file size makes DuckDB's and the pack's writes fail as on a full disk, early and late."""
    config = make(tmp_path, lines(num_users=4000, rows=8))
    process = start(config, limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ValueError" in err
    assert "No pack was made" in err or "no pack was made" in err
    assert str(tmp_path) in err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("pack")] == []


def test_too_little_space_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gmeta.data.prepare import scratch as module

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    refuse(make(tmp_path, lines()), str(tmp_path), "bytes are needed", "1,000 bytes are free")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory_limit": "..GB"}, "memory_limit is '..GB'"),
        ({"memory_limit": "1.GB"}, "memory_limit is '1.GB'"),
        ({"threads": 100_000}, "threads is 100000: must be 0 (one a core) to"),
        ({"threads": -1}, "threads is -1: must be 0 (one a core) to"),
    ],
)
def test_limits_that_no_machine_has(tmp_path: Path, settings: dict[str, object], says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        make(tmp_path, lines(), **settings)


def test_a_directory_is_read_but_for_hidden_names(tmp_path: Path):
    config = make(tmp_path, lines())
    folder = tmp_path / "log"
    (folder / "2024" / "_truth").mkdir(parents=True)
    (tmp_path / "log.csv").rename(folder / "2024" / "log.csv")
    for other in (folder / "2024" / "_truth" / "items.csv", folder / ".partial.csv"):
        other.write_text("not,a,log\n1,2,3\n")
    prepare(replace(config, input=[str(folder)]), quiet)
    assert open_pack(config.out).split("train").num_rows > 0


def test_memory_limit_too_low(tmp_path: Path):
    config = make(tmp_path, lines(num_users=3000, rows=20), memory_limit="2MB")
    refuse(config, "memory_limit is too low")


@pytest.mark.parametrize("stage", ["reading files", "building vocabularies", "writing shards"])
def test_a_killed_prepare_leaves_no_pack_and_the_next_one_starts_over(tmp_path: Path, stage: str):
    config = make(tmp_path, lines())
    process = start(config, pause=stage)
    assert process.stdout is not None
    while process.stdout.readline().strip() != stage:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not Path(config.out).exists()
    with pytest.raises(ValueError, match="is no task pack"):
        open_pack(config.out)
    prepare(config, quiet)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("pack")) == ["pack"]


def test_ctrl_c_cleans_up(tmp_path: Path):
    config = make(tmp_path, lines())
    process = start(config, pause="writing shards")
    assert process.stdout is not None
    while process.stdout.readline().strip() != "writing shards":
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("pack")] == []
