"""Small files under several writers, kills and full disks: whole or not at all, and no rubbish beside them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gmeta.core.files import replacing, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_several_writers_do_not_tear_each_other(tmp_path: Path) -> None:
    """Every write ends well, and a reader finds one writer's whole text at any time."""
    file, errors, done = tmp_path / "shared.json", [], threading.Event()
    texts = [str(writer) * 50_000 for writer in range(3)]
    write_text(file, texts[0])

    def write(text: str) -> None:
        try:
            for _ in range(25):
                write_text(file, text)
        except ValueError as error:
            errors.append(error)

    def read() -> None:
        while not done.is_set():
            if (found := file.read_text()) not in texts:
                errors.append(ValueError(f"torn: {len(found)}"))

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert names(tmp_path) == {"shared.json"}


def test_a_writer_inside_another_keeps_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with replacing(file) as outer:
        outer.write_text("outer")
        write_text(file, "inner")
        assert outer.read_text() == "outer"
        assert file.read_text() == "inner"
    assert file.read_text() == "outer"
    assert names(tmp_path) == {"a.txt"}


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import sys, time, pathlib
from gmeta.core.files import replacing
with replacing(pathlib.Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        (left,) = names(tmp_path)
        write_text(tmp_path / "a.txt", "whole")
        assert names(tmp_path) == {"a.txt", left}, "the other one lives"
        process.send_signal(signal.SIGKILL)
    write_text(tmp_path / "b-a.txt", "another file of a similar name")
    write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == {"a.txt", "b-a.txt"}
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, kind: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with replacing(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise kind(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ValueError if kind is OSError else kind) as raised:
        fail()
    if kind is OSError:
        assert "a.txt: No space left on device; free space there" in str(raised.value)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_no_folder_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*nowhere/a.txt: No such file"):
        write_text(tmp_path / "nowhere" / "a.txt", "text")
