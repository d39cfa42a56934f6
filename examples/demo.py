"""The main job with nothing to download: make demo runs this.

click logs with a known truth -> task pack -> train (meta, and plainly) -> evaluate on cold users -> report
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from pathlib import Path

from gmeta.cli import run

OUT = Path("runs") / "demo"


def gmeta(*words: object) -> None:
    """Run one command as a user would; stop the demo where it fails."""
    argv = [str(word) for word in words]
    print(f"\n$ gmeta {shlex.join(argv)}", flush=True)
    code = run(argv)
    if code:
        sys.exit(code)


def main() -> None:
    """Run the demo from scratch in runs/demo; its output replaces that of an earlier one."""
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    log, pack, meta, plain = OUT / "log", OUT / "pack", OUT / "meta", OUT / "plain"
    gmeta("synth", "--out", log, "--users", 12000)
    gmeta("prepare", "--input", log / "*.parquet", "--schema", log / "schema.yaml", "--out", pack)
    gmeta("train", "--pack", pack, "--run_dir", meta)
    gmeta("train", "--pack", pack, "--run_dir", plain, "--meta.adapt", "[]")
    gmeta("evaluate", "--run_dir", meta, "--plain_run", plain, "--truth", log)
    gmeta("report", "--run_dir", meta)
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s. In the table above: 'after' is the model adapted to each cold "
        "user's support,\n'plain-finetuned' the same model trained plainly and tuned as freely, 'posterior' the best "
        f"any model can do.\nThe report: {(meta / 'report.html').resolve()}"
    )


if __name__ == "__main__":
    main()
