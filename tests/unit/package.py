"""The package under test, as files."""

from __future__ import annotations

from pathlib import Path

import gmeta

PACKAGE = Path(gmeta.__file__).parent


def sources() -> dict[str, str]:
    """The text of every module, by its path in the package."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
