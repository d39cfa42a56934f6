"""Fixtures of every tier: one thread, real data where there is some, repeatable property tests."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: two cores are shared by several ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, and what we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a shared machine is slow at times. No examples kept: tests run in a copy that is thrown away.
hypothesis.settings.register_profile("gmeta", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("gmeta")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def no_ranks_left() -> Iterator[None]:
    """End the ranks that a file has used."""
    yield
    if "harness" in sys.modules:
        sys.modules["harness"].close_pools()


@pytest.fixture(scope="module", autouse=True)
def forked_workers() -> Iterator[None]:
    """Fork the workers of a launch from a server. A file that needs real ones has a fixture of this name."""
    from forks import begin_worker
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    with pytest.MonkeyPatch.context() as patch:
        if not {"COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"} & os.environ.keys():  # it begins with a process
            patch.setattr(SubprocessHandler, "_popen", begin_worker)
        yield


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("ml-100k")` is that folder under GMETA_DATA (default ../shared/data); skips where it is absent."""
    root = Path(os.environ.get("GMETA_DATA") or REPOSITORY.parent / "shared" / "data")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.skip(f"no real data at {path}: set GMETA_DATA to a folder that holds {name}/")
        return path

    return folder
