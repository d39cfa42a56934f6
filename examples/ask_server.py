"""Ask a `gmeta serve` without pause, as examples/daily.sh does, and count what it answers.

python examples/ask_server.py --url-file URL --log DAY --out asked.json   # until SIGTERM; ends with 1 if any failed
python examples/ask_server.py --url-file URL --version                    # the version that is served
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SUPPORT, CANDIDATES = 10, 20


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Ask a server without pause.")
    parser.add_argument("--url-file", type=Path, help="file with the server's URL")
    parser.add_argument("--log", type=Path, help="folder of raw rows to ask about")
    parser.add_argument("--out", type=Path, help="file for the counts")
    parser.add_argument("--version", action="store_true", help="print the version that is served")
    parser.add_argument("--summary", type=Path, help="print what an earlier --out says")
    args = parser.parse_args()
    if args.summary:
        return tell(json.loads(args.summary.read_text()))
    url = args.url_file.read_text().strip()
    if args.version:
        print(post(url, "/v1/model", None)["version"])
        return 0
    counts = ask(url, requests_of(args.log))
    args.out.write_text(json.dumps(counts))
    return 1 if counts["failed"] else 0


def requests_of(log: Path) -> list[dict[str, Any]]:
    """Return a request for each user of a day's rows: the first rows as support, the items of later ones to score."""
    table = pq.read_table(log).to_pandas().sort_values("timestamp")
    found = []
    for user, rows in table.groupby("user_id"):
        known = rows.drop(columns=["user_id", "timestamp"])
        if len(known) > SUPPORT:
            support = known.iloc[:SUPPORT].to_dict("list")
            candidates = known.iloc[SUPPORT:][:CANDIDATES].drop(columns="label").to_dict("list")
            found.append({"tasks": [{"key": str(user), "support": support, "candidates": candidates}]})
    return found


def ask(url: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Send the requests again and again until SIGTERM; returns answers by version, and what failed."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    versions: Counter[str] = Counter()
    failed: list[str] = []
    while not stopped:
        for request in requests:
            if stopped:
                break
            try:
                versions[post(url, "/v1/score", request)["version"]] += 1
            except (OSError, ValueError, KeyError) as error:
                failed.append(f"{type(error).__name__}: {error}")
    return {"answers": dict(versions), "failed": failed}


def post(url: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    """Return the answer to a POST, or to a GET without a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def tell(counts: dict[str, Any]) -> int:
    """Print the counts; returns 1 where a request failed."""
    for version, answers in counts["answers"].items():
        print(f"{answers:,} answers by {version}")
    print(f"{len(counts['failed'])} requests failed" + "".join(f"\n  {error}" for error in counts["failed"][:5]))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
