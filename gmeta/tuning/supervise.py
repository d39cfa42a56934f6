"""A tuning in worker processes, which are started again where a trial ended one of them."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from gmeta.parallel.launch import EXIT_PEER_LOST, launch
from gmeta.tuning.journal import JOURNAL_FILE

_ADVICE = "The tuning goes on; a trial that does so three times counts as failed"


def supervise_tuning(out: Path, nproc: int, argv: Sequence[str]) -> int:
    """Run `gmeta` with `argv` in `nproc` workers and return the exit code.

    One of several ranks that runs out of memory takes the others with it, because they wait for it. The workers then
    start again, until the journal gives such a trial up. A start that began no training is the last.
    """
    journal = out / JOURNAL_FILE
    while True:
        asked = list[signal.Signals]()
        before = _size(journal)
        code = launch(nproc, argv, asked=asked, advice=_ADVICE)
        killed = code == EXIT_PEER_LOST or code > 128
        if not killed or asked or _size(journal) == before:
            return code


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
