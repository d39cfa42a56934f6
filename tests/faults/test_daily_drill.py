"""Three days of a model that serves, as examples/daily.sh has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "daily.sh"

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.timeout(1200)
def test_a_damaged_day_is_refused_and_no_request_fails(tmp_path: Path) -> None:
    environment = os.environ | {"GMETA": str(Path(sys.executable).with_name("gmeta")), "PYTHON": sys.executable}
    done = subprocess.run([str(EXAMPLE), str(tmp_path / "daily")], env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "0 requests failed" in said
    assert said.count(" answers by ") == 2  # the refused version answered nothing
