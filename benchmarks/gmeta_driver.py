"""A worker of gmeta's coordinator, moved by benchmarks/dlrover_ledger.py: python gmeta_driver.py HOST:PORT NAME."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

from puppet import serve

from gmeta.elastic.client import Client, Refused
from gmeta.elastic.ledger import JobSpec

BATCH = 32


class Worker:
    """Takes, finishes and fails one work item at a time, and renews what it holds."""

    def __init__(self, address: str, name: str) -> None:
        self._client, self._name = Client(f"http://{address}", run="benchmark"), name
        self._held: set[tuple[int, int, int]] = set()

    def open(self, num_samples: int, shard_size: int, lease_s: float, max_failures: int, skip: bool) -> dict[str, Any]:
        """Create the job, or join it."""
        spec = JobSpec(
            num_samples,
            shard_size,
            shuffle=False,
            lease_s=lease_s,
            max_failures=max_failures,
            skip_quarantined=skip,
        )
        if self._client.job is None:
            threading.Thread(target=self._renew, args=(lease_s / 3,), daemon=True).start()
        self._client.open_job("none", spec)
        return {}

    def _renew(self, pause_s: float) -> None:
        while True:
            time.sleep(pause_s)
            held = [[*key, 0] for key in list(self._held)]
            if held:
                with contextlib.suppress(Refused):  # lost: `done` will hear of it
                    self._client.call("renew", generation=0, progress=held)

    def take(self) -> dict[str, Any]:
        """Take the next work item."""
        try:
            reply = self._client.call("lease", worker=self._name, count=1)
        except Refused as refused:
            return {"reply": "REFUSED", "reason": str(refused)}
        if reply["reply"] != "SHARD":
            return {"reply": reply["reply"]}
        (lease,) = reply["leases"]
        key = (lease["epoch"], lease["shard"], lease["attempt"])
        self._held.add(key)
        return {"reply": "SHARD", "key": key, "start": lease["start"], "stop": lease["stop"]}

    def done(self, key: list[int]) -> dict[str, Any]:
        """Commit the work item, and return whether the coordinator agrees."""
        self._held.discard((key[0], key[1], key[2]))
        try:
            self._client.call("commit", generation=0, shards=[key])
        except Refused as refused:
            return {"accepted": False, "reason": str(refused)}
        return {"accepted": True}

    def fail(self, key: list[int]) -> dict[str, Any]:
        """Give the work item back."""
        self._held.discard((key[0], key[1], key[2]))
        self._client.call("fail", generation=0, shards=[key], reason="told to fail")
        return {}

    def run(self, how: str, shards: int) -> dict[str, Any]:
        """Take and finish so many; returns the seconds from having finished one until the next is in hand.

        "two messages" are a commit and a lease; "exchange" is one message for both; "batch" is one for both of 32 work
        items.
        """
        count = BATCH if how == "batch" else 1
        held = self._exchange(count, [])
        waits, began = [], time.monotonic()
        for _ in range(-(-shards // count)):
            asked = time.monotonic()
            if how == "two messages":
                self._client.call("commit", generation=0, shards=held)
                leased = self._client.call("lease", worker=self._name, count=1)["leases"]
                held = [[x["epoch"], x["shard"], x["attempt"]] for x in leased]
            else:
                held = self._exchange(count, held)
            waits.append(time.monotonic() - asked)
        ended = time.monotonic()
        self._client.call("commit", generation=0, shards=held)
        return {"began": began, "ended": ended, "waits": waits, "shards": count * len(waits)}

    def _exchange(self, count: int, commit: list[list[int]]) -> list[list[int]]:
        reply = self._client.call("exchange", worker=self._name, count=count, generation=0, commit=commit, progress=[])
        return [[x["epoch"], x["shard"], x["attempt"]] for x in reply["leases"]]


if __name__ == "__main__":
    serve(Worker(*sys.argv[1:]))
