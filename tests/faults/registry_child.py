"""Run by test_registry_faults: publish in a forked process that is killed at its k-th write, for every k asked for.

The process that forks has loaded everything and used nothing of it, so that each fork starts at once and sound.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import obstore
import pyarrow.parquet  # noqa: F401  (loaded before the forks)

from gmeta.delivery.registry import publish
from gmeta.runs.registry import Registry, open_registry


def in_a_fork(job: Callable[[], None]) -> int:
    """Run a job in a process of its own. Return 0, the signal that killed it, or 256 where it failed."""
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            job()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status


def die_at(k: int) -> None:
    """Patch what writes: this process is killed before, within or after its k-th write."""
    left = k

    def tick() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def patch(module: object, name: str, *, after: bool) -> None:
        original = getattr(module, name)

        def patched(*arguments: object, **named: object) -> object:
            if tick():
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if after and tick():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, patched)

    def copy_half(source: Path, target: Path) -> None:
        if tick():
            data = Path(source).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        copy(source, target)

    copy, shutil.copyfile = shutil.copyfile, copy_half  # type: ignore[assignment]
    os.fsync = lambda handle: None
    for name in ("link", "replace", "unlink", "rename"):
        patch(os, name, after=False)
    patch(Path, "write_bytes", after=False)
    for name in ("put", "delete"):
        patch(obstore, name, after=True)


def check(registry: Registry, before: int, cache: Path) -> None:
    """Readers see the new version or the one before, and each version that is listed is whole."""
    pointer = registry.current()
    assert pointer is not None
    numbers = [record.number for record in registry.versions()]
    assert pointer.version in numbers
    assert pointer.version == before or pointer.version == numbers[-1]
    for number in numbers:
        registry.fetch(number, cache)


def main(url: str, place: Path, first: int, step: int) -> None:
    """Publish `place/0`, and again and again `place/1`, which is killed. Prints how many kills there were."""

    def registry_at(name: str) -> Registry:
        return open_registry(f"{url}/{name}")

    k, kills, cache = first, 0, place / "cache"
    while True:
        name = f"killed{k}"

        def killed(name: str = name, k: int = k) -> None:
            publish(registry_at(name), place / "0", verdict=None, cache=cache)
            print("begun", flush=True)
            die_at(k)
            publish(registry_at(name), place / "1", verdict=None, cache=cache)

        def again(name: str = name) -> None:
            registry = registry_at(name)
            check(registry, 1, place / "reader")
            pointer = registry.current()
            assert pointer is not None
            if pointer.version == 1:
                publish(registry, place / "1", verdict=None, cache=cache)
            pointer = registry.current()
            assert pointer is not None
            assert pointer.id == "run1/1"
            assert len(registry.versions()) == 2
            registry.fetch(pointer.version, place / "reader")

        status = in_a_fork(killed)
        assert in_a_fork(again) == 0, name
        shutil.rmtree(place / "reader", ignore_errors=True)
        shutil.rmtree(Path(url) / name, ignore_errors=True)
        if status == 0:
            break
        assert status == signal.SIGKILL, name
        kills += 1
        k += step
    print(json.dumps({"kills": kills, "writes": k}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
