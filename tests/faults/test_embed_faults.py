"""`gmeta embed`: each text once, days and processes later too; kills, full disks, rivals and bad input are told."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta
from encoders import WHY, minilm, tiny

pytest.importorskip("transformers", reason=WHY)

from gmeta.core.files import only_writer
from gmeta.text import workers
from gmeta.text.encode import encode_texts
from gmeta.text.encoder import open_encoder
from gmeta.text.store import open_behaviours

pytestmark = pytest.mark.faults

Words = Callable[..., list[object]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def titles(start: int, end: int) -> list[str]:
    """Distinct texts of one to nine words."""
    return [
        " ".join(f"w{4 + (i * 7 + k * (i // 50 + 3)) % 50}" for k in range(1 + i % 9)) + f" w{i}"
        for i in range(start, end)
    ]


TEXTS = titles(0, 8_000)


@pytest.fixture
def words(tmp_path: Path, encoder: Path) -> Words:
    """The words of a `gmeta embed` of the texts in a file, into tmp_path/store."""

    def made(*more: object, store: str = "store", texts: object = tmp_path / "texts.txt") -> list[object]:
        return ["embed", "--texts", texts, "--encoder", encoder, "--layers", 2, "--store", tmp_path / store, *more]

    return made


def write_lines(folder: Path, texts: list[str]) -> None:
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts))


def shards(folder: Path) -> set[str]:
    return {path.name for path in (folder / "store/shards").iterdir()}


def test_days_of_texts_from_all_kinds_of_files(
    tmp_path: Path, words: Words, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day = titles(0, 30)
    pq.write_table(pa.table({"title": [*day[:20], None, "", day[3]], "n": range(23)}), tmp_path / "a.parquet")
    pa.csv.write_csv(pa.table({"title": day[15:]}), tmp_path / "b.csv")
    write_lines(tmp_path, ["w4 w5", day[2]])
    inputs = [str(tmp_path / name) for name in ("a.parquet", "b.csv", "texts.txt")]
    gmeta(*words("--column", "title", "--template", "w7: {text}", texts=str(inputs).replace("'", '"')))
    told = capsys.readouterr().out
    assert "store: 32 texts, 32 of them new; 40 rows had 32 texts" in told
    assert "rows with an empty text, which has a vector too: 1" in told
    assert "rows without a text, left out: 1" in told
    first = shards(tmp_path)

    # What the store reads is what the encoder gives, but for fp16.
    store = open_behaviours(tmp_path / "store")
    opened = open_encoder(encoder, 2)
    expected = encode_texts(opened, store.spec, [*day, ""])
    found = store.read(store.rows([*day, ""]))
    assert ((found - expected).abs() <= expected.abs() * 2**-10 + 1e-5).all()
    assert torch.equal(
        encode_texts(opened, store.spec, ["w4"])[0],
        opened.pooled(opened.low(*(ids := opened.batch(opened.tokenizer(["w7: w4"], 64)[0]))), ids[1])[0],
    )

    # Nothing new, then a day with some, beside an old shard that stays as it is.
    gmeta(*words("--template", "w7: {text}"))
    assert "store: 32 texts, 0 of them new; 2 rows had 2 texts" in capsys.readouterr().out
    assert shards(tmp_path) == first
    write_lines(tmp_path, [*day[5:], *titles(30, 40)])
    gmeta(*words("--template", "w7: {text}"))
    assert "store: 42 texts, 10 of them new; 35 rows had 35 texts" in capsys.readouterr().out
    assert first < shards(tmp_path)
    again = open_behaviours(tmp_path / "store")
    assert torch.equal(again.read(again.rows(day)), store.read(store.rows(day)))

    gmeta("embed", "verify", "--store", tmp_path / "store")
    gmeta("embed", "stats", "--store", tmp_path / "store")
    gmeta("embed", "compact", "--store", tmp_path / "store")
    told = capsys.readouterr().out
    assert "42 texts in 2 shards, all sound" in told
    assert re.search(r"template +w7: \{text\}", told)
    assert "42 texts in 1 shards" in told
    gmeta("embed", "verify", "--store", tmp_path / "store")
    last = open_behaviours(tmp_path / "store")
    assert torch.equal(last.read(last.rows(titles(0, 40))), again.read(again.rows(titles(0, 40))))


@pytest.mark.slow
def test_several_processes_fill_one_store(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gmeta.text.embed._BLOCK_TEXTS", (16, 16))
    write_lines(tmp_path, titles(0, 100))
    gmeta(*words("--nproc", 2))
    assert "store: 100 texts, 100 of them new" in capsys.readouterr().out
    assert len(shards(tmp_path)) == 7
    monkeypatch.undo()
    gmeta(*words(store="one"))
    store, one = (open_behaviours(tmp_path / name) for name in ("store", "one"))
    for text in (store, one):
        text.verify()
    found, expected = (text.read(text.rows(titles(0, 100))) for text in (store, one))
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_run_is_saved_as_it_goes_and_ends_where_it_stopped(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full after the second shard; what was encoded before is there, and is not encoded again."""
    monkeypatch.setattr(workers, "_SAVE_S", 0.0)
    monkeypatch.setattr("gmeta.text.encode.TOKENS_PER_BATCH", 64)
    write_lines(tmp_path, titles(0, 60))
    real, calls = workers.append_shard, []

    def append(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "append_shard", append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        fails(words(), capsys, "cannot write", "File too large; free space there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert len(shards(tmp_path)) == 2
    kept = len(open_behaviours(tmp_path / "store"))
    assert 0 < kept < 60
    gmeta(*words())
    assert f"store: 60 texts, {60 - kept} of them new" in capsys.readouterr().out
    open_behaviours(tmp_path / "store").verify()


def start(line: list[object], saved: float = 0.0) -> subprocess.Popen[str]:
    """A process that runs the command and saves what it encoded every `saved` seconds."""
    code = f"import sys; from gmeta.text import workers; workers._SAVE_S = {saved};\n"
    code += "from gmeta.text import encode; encode.TOKENS_PER_BATCH = 64\n"
    code += "from gmeta.cli import run\nif __name__ == '__main__': sys.exit(run(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, line)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on(
    tmp_path: Path, words: Words, nproc: int, capsys: pytest.CaptureFixture[str], encoder: Path
) -> None:
    """Killed as soon as there is a shard; no process is left, no vector lost or wrong."""
    write_lines(tmp_path, TEXTS)
    process = start(words("--nproc", nproc))
    end = time.monotonic() + 240
    try:
        while process.poll() is None and not list((tmp_path / "store").glob("shards/[!.]*")):
            assert time.monotonic() < end, "no shard was written"
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    store = open_behaviours(tmp_path / "store")
    store.verify()
    done = [text for text, row in zip(TEXTS, store.find(TEXTS), strict=True) if row >= 0]
    assert 0 < len(store) == len(done) < len(TEXTS)
    asked = [*done[:50], *sorted(set(TEXTS) - set(done))[:50]]
    write_lines(tmp_path, asked)
    gmeta(*words())
    assert f"store: {len(done) + 50:,} texts, 50 of them new; {len(asked)} rows" in capsys.readouterr().out
    assert not list((tmp_path / "store").glob("shards/.partial*"))
    store = open_behaviours(tmp_path / "store")
    expected = encode_texts(open_encoder(encoder, 2), store.spec, asked)
    assert (store.read(store.rows(asked)) - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_rival_is_told_and_harms_nothing(tmp_path: Path, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path, titles(0, 3))
    gmeta(*words())
    write_lines(tmp_path, titles(0, 5))
    with only_writer(tmp_path / "store/lock", "the store"):
        fails(words(), capsys, "the store", "is being written by another process: wait for it")
        fails(["embed", "compact", "--store", tmp_path / "store"], capsys, "is being written by another process")
        gmeta("embed", "verify", "--store", tmp_path / "store")  # readers need no lock
    gmeta(*words())
    assert len(open_behaviours(tmp_path / "store")) == 5


def test_settings_of_another_store_are_refused(
    tmp_path: Path, words: Words, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, titles(0, 3))
    gmeta(*words())
    other = tiny(tmp_path / "other", "bert", layers=5)
    for more, told in (
        (["--layers", 1], "layers 2, not 1"),
        (["--pooling", "last"], "pooling 'mean', not 'last'"),
        (["--template", "Title: {text}"], "template '{text}', not 'Title: {text}'"),
        (["--max_tokens", 9], "max_tokens 64, not 9"),
        (["--vectors", 2], "vectors 1, not 2"),
        (["--precision", "bfloat16"], "precision 'float32', not 'bfloat16'"),
        (["--dtype", "int8"], "dtype 'fp16', not 'int8'"),
        (["--encoder", other], "encoder "),
    ):
        fails(words(*more), capsys, "is a store of other vectors", told, "name another store")
    assert len(shards(tmp_path)) == 1


def test_bad_texts_are_told_before_anything_is_encoded(
    tmp_path: Path, words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_bytes(b"w4\nw5\n" + "caf\u00e9".encode("latin-1") + b"\n")
    fails(words(), capsys, "texts.txt is not UTF-8 in line 3", "convert it")
    assert not (tmp_path / "store/shards").exists() or not shards(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"title,n\nw4,1\ncaf\xe9,2\n")
    fails(words("--column", "title", texts=tmp_path / "a.csv"), capsys, "a.csv")
    pq.write_table(pa.table({"title": ["w4"], "n": [1], "list": [["w4"]]}), tmp_path / "b.parquet")
    table = tmp_path / "b.parquet"
    fails(words(texts=table), capsys, "has the columns title, n, list: say with --column which holds texts")
    fails(words("--column", "titel", texts=table), capsys, "no column 'titel': did you mean 'title'?")
    fails(words("--column", "n", texts=table), capsys, "column n is BIGINT: it must be text, one a row")
    fails(words("--column", "list", texts=table), capsys, "column list is VARCHAR[]: it must be text, one a row")
    fails(words("--column", "title"), capsys, "column is 'title': a .txt file has no columns")
    fails(words(texts=tmp_path / "none.txt"), capsys, "none.txt does not exist")
    fails(words(texts=tmp_path / "none.csv"), capsys, "none.csv does not exist")
    (tmp_path / "empty.txt").write_text("")
    gmeta(*words(texts=tmp_path / "empty.txt"))
    assert "store: 0 texts, 0 of them new; 0 rows had 0 texts" in capsys.readouterr().out


def test_long_texts_are_cut_and_counted(tmp_path: Path, words: Words, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path, ["w4 " * 33_334, "w4 w5"])
    assert (tmp_path / "texts.txt").stat().st_size > 100_000
    gmeta(*words("--max_tokens", 16))
    assert "texts cut at 16 tokens: 1" in capsys.readouterr().out
    store = open_behaviours(tmp_path / "store")
    assert torch.isfinite(store.read(store.rows(["w4 " * 33_334]))).all()


def test_settings_out_of_range_are_told(
    tmp_path: Path, words: Words, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, ["w4"])
    for more, told in (
        (["--layers", 4], "layers is 4: "),
        (["--layers", -1], "layers is -1: say how many layers are below the split"),
        (["--vectors", 5], "vectors is 5: must be in [1, 4]"),
        (["--template", "Title"], "template is 'Title': must hold {text} once"),
        (["--nproc", 0], "nproc is 0"),
        (["--max_tokens", 2], "max_tokens is 2: the tokenizer adds 2 of its own"),
        (["--pooling", "max"], "pooling is 'max': must be one of"),
        (["--encoder", tmp_path], "has no config.json"),
        (["--device", "cuda"], "this machine has no CUDA device"),
    ):
        if not ("cuda" in more and torch.cuda.is_available()):
            fails(words(*more), capsys, told)
    fails(["embed", "--store", tmp_path / "store"], capsys, "texts is []: name the files")
    fails(["embed", "verfy", "--store", tmp_path / "store"], capsys, "did you mean 'verify'?")
    fails(["embed", "stats", "--store", tmp_path / "nowhere"], capsys, "is no behaviour store")
    fails(["embed", "compact", "--store", tmp_path / "nowhere"], capsys, "is no behaviour store")
    fails(["embed", "stats", "--store", tmp_path, "--layers", 3], capsys, "layers is 3: it belongs to encoding")


@pytest.mark.slow
def test_a_terminal_shows_a_bar(tmp_path: Path, words: Words) -> None:
    write_lines(tmp_path, titles(0, 400))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    line = [sys.executable, "-m", "gmeta", *map(str, words())]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    assert b"encoding" in shown
    assert b"/400" in shown


@pytest.mark.slow
def test_real_weights_in_two_kinds_of_stores(tmp_path: Path) -> None:
    """MiniLM: fp16 is within 5e-4 of the encoder, int8 within 3 % of a vector's length."""
    folder = minilm()
    texts = [
        f"{a} {b} ({year})" for a in ("Toy", "Night", "Alien") for b in ("Story", "Train") for year in range(1990, 2000)
    ]
    write_lines(tmp_path, texts)
    for dtype, most in (("fp16", 5e-4), ("int8", 3e-2)):
        store = tmp_path / dtype
        words = ["--encoder", folder, "--layers", 3, "--store", store, "--dtype", dtype]
        gmeta("embed", "--texts", tmp_path / "texts.txt", *words)
        opened = open_behaviours(store)
        expected = encode_texts(open_encoder(folder, 3), opened.spec, texts)
        gap = (opened.read(opened.rows(texts)) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert gap.max() < most
