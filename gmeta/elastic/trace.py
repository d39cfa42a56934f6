"""The coordinator's trace: what was reported and decided, one JSON object a line, for replays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Trace:
    """Appends to a file. Where it cannot be written the trace ends and `log` is told; training goes on."""

    def __init__(self, path: Path | str, log: Callable[[str], None]) -> None:
        self.path = Path(path)
        self._log = log
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"trace {self.path} cannot be written ({error.strerror}): name another file") from error

    def write(self, kind: str, now: float, generation: int, **values: Any) -> None:
        """Append one line."""
        line = json.dumps({"kind": kind, "now": now, "generation": generation, **values})
        self._guarded(lambda: self._file.write(line + "\n"))

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._guarded(self._file.flush)

    def close(self) -> None:
        """Close the file."""
        self._guarded(self._file.close)

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self._file.closed:
            return
        try:
            action()
        except OSError as error:
            self._log(f"trace {self.path} ends here ({error.strerror}); training goes on")
            try:
                self._file.close()
            except OSError:  # what is left in its buffer does not fit either; it is closed all the same
                return
