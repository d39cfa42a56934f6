"""The main job with nothing to download: make demo runs this.

    click logs with a known truth -> task pack -> train (meta, and plainly) -> evaluate on cold users -> report
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from gmeta.cli import run

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "demo"


def gmeta(*words: object) -> None:
    """Run one command as a user would; stop the demo where it fails."""
    argv = [str(word) for word in words]
    print(f"\n$ gmeta {' '.join(argv)}", flush=True)
    code = run(argv)
    if code:
        sys.exit(code)


def main() -> None:
    """Run the demo from scratch; its output replaces that of an earlier one."""
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    config = ROOT / "examples" / "demo.yaml"
    gmeta("synth", "--out", OUT / "log", "--users", 12000, "--items", 500)
    gmeta(
        *("prepare", "--input", f"[{OUT}/log/*.parquet]", "--schema", OUT / "log" / "schema.yaml"),
        *("--out", OUT / "pack", "--query_size", 10),
    )
    gmeta("train", "--config", config, "--pack", OUT / "pack", "--run_dir", OUT / "meta")
    gmeta("train", "--config", config, "--pack", OUT / "pack", "--run_dir", OUT / "plain", "--meta.adapt", "[]")
    gmeta("evaluate", "--run_dir", OUT / "meta", "--plain_run", OUT / "plain", "--truth", OUT / "log")
    gmeta("report", "--run_dir", OUT / "meta")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; open {OUT / 'meta' / 'report.html'}")


if __name__ == "__main__":
    main()
