"""Raw files as users have them: names that look like patterns, headers of other tools, partitions, empty files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import open_pack
from gmeta.data.prepare.encoder import encode_tables
from gmeta.data.prepare.prepare import prepare, print_summary
from gmeta.data.sources import find_files, open_file, open_files, partition_columns, reading

ODD = [
    "a[1]",
    "a*",
    "a?",
    "[a-z]",
    "[!a]",
    "a[[]1]",
    "it's",
    'say "x"',
    "a b",
    "{a,b}",
    "back\\slash",
    "~",
    "a%20",
    "é[",
]
"""Names that a shell, a glob, SQL or a URL would take for something else."""


CON = duckdb.connect()


def rows_of(path: Path, columns: str = "*") -> list[tuple[object, ...]]:
    return CON.execute(f"SELECT {columns} FROM ({open_file(CON, path).query}) ORDER BY __row").fetchall()


def columns_of(path: Path) -> list[str]:
    return list(open_file(CON, path).columns)


def write(path: Path, text: str) -> None:
    """A file whose one column `n` holds `text`, in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quoted = 'n\n"' + text.replace('"', '""') + '"\n'
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": [text]}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(quoted.encode()))
    else:
        path.write_text(quoted)


# ------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv.gz"])
def test_a_name_that_exists_is_never_a_pattern(tmp_path: Path, ending: str) -> None:
    """Decoys match each name as a pattern: they must not be read in its place, nor beside it."""
    for name in [*ODD, "a1", "ab", "b", "-"]:
        write(tmp_path / f"{name}{ending}", name)
        write(tmp_path / name / f"f{ending}", f"in {name}")
    for name in ODD:
        for path, text in ((tmp_path / f"{name}{ending}", name), (tmp_path / name / f"f{ending}", f"in {name}")):
            assert find_files([str(path)]) == [path]
            assert rows_of(path) == [(1, text)]
        assert find_files([str(tmp_path / name)]) == [tmp_path / name / f"f{ending}"]
        assert find_files([str(tmp_path / name / "*")]) == [tmp_path / name / f"f{ending}"]
        assert find_files([str(tmp_path / name / "[e-g]*")]) == [tmp_path / name / f"f{ending}"]


def test_a_star_matches_no_file_that_a_directory_would_hide(tmp_path: Path) -> None:
    for name in ("part-0.csv", "_SUCCESS", "_odd.csv", "_temporary/0/part-1.csv", "day=1/part-2.csv"):
        (tmp_path / "spark" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "spark" / name).write_text("n\n1\n")
    assert [path.name for path in find_files([str(tmp_path / "spark" / "*")])] == ["part-0.csv"]
    assert [path.name for path in find_files([str(tmp_path / "spark" / "**")])] == ["part-2.csv", "part-0.csv"]
    assert [path.name for path in find_files([str(tmp_path / "spark" / "_o*")])] == ["_odd.csv"]


def test_a_backslash_beside_a_bracket_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "back\\[1].csv", "x")
    with pytest.raises(ValueError, match=r"back\\\[1\]\.csv has a backslash and one of .* rename it"):
        rows_of(tmp_path / "back\\[1].csv")


def test_patterns_that_are_meant_still_match(tmp_path: Path) -> None:
    for name in (
        "a1.csv",
        "a2.csv",
        "b1.csv",
        "sub/c.csv",
        "sub/deep/d.csv",
        "day=1/e.csv",
        "day=2/f.csv",
        "_day=3/g.csv",
    ):
        write(tmp_path / name, name)

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path / pattern)])]

    assert found("a*.csv") == found("a[12].csv") == found("a?.csv") == ["a1.csv", "a2.csv"]
    assert found("[!a]1.csv") == ["b1.csv"]
    assert found("sub/**/*.csv") == ["sub/c.csv", "sub/deep/d.csv"]
    assert found("[ab]*") == ["a1.csv", "a2.csv", "b1.csv"]
    assert found("day=*") == ["day=1/e.csv", "day=2/f.csv"], "directories are searched where no file matches"
    with pytest.raises(ValueError, match=r"a\[9\]\.csv does not exist or matches no file; in a pattern, a bracket"):
        found("a[9].csv")
    with pytest.raises(ValueError, match=r"z\*\.csv does not exist or matches no file$"):
        found("z*.csv")


SCHEMA = {"task": "user", "label": "click", "time": "ts", "item": "item", "categorical": ["item", "user"]}


def log(users: int = 6, rows: int = 8, first: int = 0) -> pa.Table:
    rng = np.random.default_rng(first)
    user = np.repeat(np.arange(first, first + users), rows)
    item, click = rng.integers(1, 9, len(user)), rng.integers(0, 2, len(user))
    return pa.table({"user": user, "item": item, "click": click, "ts": np.tile(np.arange(rows), users)})


def made(
    folder: Path, inputs: list[str], schema: dict[str, object] | None = None, out: str = "pack"
) -> dict[str, object]:
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema or SCHEMA))
    config = PrepareConfig(
        out=str(folder / out), input=inputs, schema=str(folder / "schema.yaml"), query_size=2, threads=1
    )
    return prepare(config, lambda *_: None)


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_prepare_and_predict_work_below_a_directory_that_looks_like_a_pattern(tmp_path: Path, ending: str) -> None:
    from pyarrow import csv

    folder = tmp_path / "run [1] *'s"
    (folder / "in[0-9]").mkdir(parents=True)
    (tmp_path / "run 1 *'s").mkdir()
    for name, table in (("a[1]", log()), ("a1", log(first=50))):
        path = folder / "in[0-9]" / f"{name}{ending}"
        pq.write_table(table, path) if ending == ".parquet" else csv.write_csv(table, path)
    file = str(folder / "in[0-9]" / f"a[1]{ending}")
    made(folder, [file], SCHEMA | {"item_statistics": True})
    pack = open_pack(folder / "pack")
    keys = set(pq.read_table(pack.tasks_file())["key"].to_pylist())
    assert keys == {str(user) for user in range(6)}
    encoded = encode_tables(file, file, pack.manifest["data_schema"], pack.path / "vocab", pack.schema)
    assert encoded.keys == [str(user) for user in range(6)]
    assert (encoded.arrays["ids"][:, 0] > 0).any()


# ----------------------------------------------------------------------------------------------- headers


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "BOM"])
def test_headers_of_other_tools(tmp_path: Path, end: str, delimiter: str, bom: bytes) -> None:
    """An index in front, a delimiter at the end, both, and any line end: the named columns are the same."""
    lines = {
        "plain": ["user,item", "1,x", '2,"a\'b"'],
        "index in front": [",user,item", "0,1,x", '1,2,"a\'b"'],
        "delimiter at the end": ["user,item,", "1,x,", '2,"a\'b",'],
        "of the rows alone": ["user,item", "1,x,", '2,"a\'b",'],
        "both": [",user,item,", "0,1,x,", '1,2,"a\'b",'],
    }
    path = tmp_path / "a.csv"
    for name, text in lines.items():
        for last in ("", end):
            path.write_bytes(bom + (end.join(text) + last).replace(",", delimiter).encode())
            assert rows_of(path, '"user", item') == [("1", "x"), ("2", "a'b")], name
            unnamed = {"index in front": ["0"], "delimiter at the end": ["2"], "both": ["0", "3"]}.get(name, [])
            assert set(columns_of(path)) == {"user", "item", *(f"Unnamed: {place}" for place in unnamed)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\nuser,item\n1,2\n", "empty first line: it must name the columns"),
        (b"Unnamed: 1,,x\n1,2,3\n", "two columns called 'Unnamed: 1' and 'Unnamed: 1'"),
        ("user,item\n1,2\n".encode("utf-16"), "no readable UTF-8 CSV file"),
        (gzip.compress(b"user,item\n1,2\n", mtime=0), "no readable UTF-8 CSV file"),
        (b"x" * 200_000, "first line that names no columns"),
        (b"__row,item\n1,2\n", "a name that gmeta uses itself"),
    ],
)
def test_a_header_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        columns_of(path)
    assert str(path) in str(error.value)


def test_lines_that_end_in_two_ways_are_named_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"user,item\n1,2\r3,4\n5,6\n")
    with pytest.raises(ValueError, match=r"a\.csv cannot be read .*line ends of one kind"), reading(str(path)):
        rows_of(path)


def test_a_gz_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"user,item\n" + b"1,2\n" * 1000)[:15])
    with pytest.raises(ValueError, match=r"a\.csv\.gz is no readable UTF-8 CSV file"):
        columns_of(path)


# -------------------------------------------------------------------------------------------- partitions


def test_partition_folders_are_columns(tmp_path: Path) -> None:
    path = (
        tmp_path
        / "x"
        / "day=2024-11-03"
        / "city=S%C3%A3o%20Paulo%2FBR"
        / "a%3Db=__HIVE_DEFAULT_PARTITION__"
        / "p.parquet"
    )
    write(path, "1")
    expected = {"day": "2024-11-03", "city": "São Paulo/BR", "a=b": None}
    assert partition_columns(path) == expected
    assert list(partition_columns(path)) == list(expected)
    assert rows_of(path) == [(1, "1", "2024-11-03", "São Paulo/BR", None)]
    assert partition_columns(tmp_path / "k=1" / "between" / "p.csv") == {}, "only folders directly above the file"
    assert partition_columns(tmp_path / "k=1" / "k=2" / "p.csv") == {"k": "2"}


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_the_files_own_column_wins_over_its_folder(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "N=folder" / f"a{ending}"
    write(path, "file")
    assert rows_of(path) == [(1, "file")]
    write(tmp_path / "__row=1" / f"a{ending}", "x")
    with pytest.raises(ValueError, match="a name that gmeta uses itself"):
        columns_of(tmp_path / "__row=1" / f"a{ending}")


@pytest.mark.parametrize("role", ["time", "categorical", "partition"])
def test_a_partition_column_is_as_good_as_one_in_the_file(tmp_path: Path, role: str) -> None:
    """The pack is that of files which hold the column themselves, whatever it is used for."""
    schema: dict[str, object] = {k: v for k, v in SCHEMA.items() if k != "time"}
    schema |= (
        {"time": "day"} if role == "time" else {"time": "ts", role: ["day", "item"] if role == "categorical" else "day"}
    )
    values = ["train", "test"] if role == "partition" else ["2024-11-04", "2024-11-03"]
    for place, value in enumerate(values):
        table = log(first=10 * place if role == "partition" else 0)
        folder = tmp_path / "folders" / f"day={value}"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "p.parquet")
        (tmp_path / "columns" / str(place)).mkdir(parents=True)
        pq.write_table(
            table.append_column("day", pa.array([value] * len(table))), tmp_path / "columns" / str(place) / "p.parquet"
        )
    order = sorted(values)  # files are numbered by their names, and ties go by number
    inputs = {"folders": [str(tmp_path / "folders")]}
    for place, value in enumerate(order):
        (tmp_path / "columns" / str(values.index(value))).rename(tmp_path / f"part-{place}")
    inputs["columns"] = [str(tmp_path / "part-0"), str(tmp_path / "part-1")]
    found = {}
    for name, paths in inputs.items():
        made(tmp_path / name, paths, schema)
        shards = sorted((tmp_path / name / "pack").glob("shard-*"))
        found[name] = [shard.read_bytes() for shard in shards]
    assert found["folders"] == found["columns"]


# ----------------------------------------------------------------------------------------------- empty


def test_empty_files_among_others_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pyarrow import csv

    folder = tmp_path / "in"
    folder.mkdir()
    csv.write_csv(log(), folder / "b.csv")
    counts = made(tmp_path, [str(folder)], out="alone")
    assert "empty_files" not in counts
    for name in ("a.parquet", "c.csv"):
        (folder / name).touch()
    (folder / "d.csv.gz").write_bytes(gzip.compress(b""))
    (folder / "e.csv").write_bytes(BOM)
    counts = made(tmp_path, [str(folder)])
    assert counts["empty_files"] == 4
    print_summary(counts)
    assert "skipped: 4 empty files" in capsys.readouterr().out
    shards = [next((tmp_path / out).glob("shard-*")).read_bytes() for out in ("alone", "pack")]
    assert shards[0] == shards[1]


def test_an_input_of_empty_files_alone_is_an_error(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.parquet"]
    for path in paths:
        path.touch()
    with pytest.raises(ValueError, match=r"no rows: all of its 2 files are empty, .*a\.csv first"):
        open_files(CON, paths)
    with pytest.raises(ValueError, match=r"no rows: .*a\.csv is empty"):
        open_files(CON, paths[:1])
    with pytest.raises(ValueError, match=r"b\.parquet is empty: it has neither rows nor names"):
        open_file(CON, paths[1])


def test_a_database_draws_no_bars() -> None:
    """DuckDB does where a process has no main file, as spawned ones."""
    setting = "execute(\"SELECT current_setting('enable_progress_bar')\").fetchall()"
    code = (
        f"import duckdb; from gmeta.data.sources import database as d; print(duckdb.connect().{setting}, d().{setting})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["[(True,)]", "[(False,)]"]
