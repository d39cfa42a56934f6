"""A worker of DLRover's master, moved by benchmarks/dlrover_ledger.py, in DLRover's own interpreter (no gmeta there).

    NODE_ID=3 python dlrover_driver.py HOST:PORT NAME

It calls the messages that DLRover's `ShardingClient` is made of, without what that does besides (prefetching,
statistics).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from dlrover.proto import elastic_training_pb2
from dlrover.python.elastic_agent.master_client import build_master_client
from puppet import serve

DATASET = "benchmark"


class Worker:
    """Takes, finishes and fails one shard (DLRover: task) at a time."""

    def __init__(self, address: str, name: str) -> None:
        self._address, self._client = address, None

    def open(self, num_samples: int, shard_size: int, **of_gmeta: Any) -> dict[str, Any]:
        """Tell the master of the data set; it ignores one that it knows."""
        self._client = self._client or build_master_client(self._address)  # None where there is no master yet
        self._client.report_dataset_shard_params(
            batch_size=shard_size,
            num_epochs=1,
            dataset_size=num_samples,
            shuffle=False,
            num_minibatches_per_shard=1,
            dataset_name=DATASET,
            task_type=elastic_training_pb2.TRAINING,
            storage_type="text",
        )
        return {}

    def take(self) -> dict[str, Any]:
        """Take the next shard. An empty task is the end, as to `ShardingClient`; one that says WAIT would be heeded."""
        _, task = self._client.get_task(DATASET)
        if task.shard.end > task.shard.start:
            return {"reply": "SHARD", "key": task.task_id, "start": task.shard.start, "stop": task.shard.end}
        return {"reply": "WAIT" if task.type == elastic_training_pb2.WAIT else "END"}

    def done(self, key: int) -> dict[str, Any]:
        """Commit the shard, and return whether the master agrees."""
        return {"accepted": bool(self._client.report_task_result(DATASET, key, "").success)}

    def fail(self, key: int) -> dict[str, Any]:
        """Give the shard back, with an error."""
        self._client.report_task_result(DATASET, key, "told to fail")
        return {}

    def save(self) -> dict[str, Any]:
        """Return the master's checkpoint of what is to do."""
        return {"saved": self._client.get_shard_checkpoint(DATASET)}

    def restore(self, saved: str) -> dict[str, Any]:
        """Put everything back to what is in `saved`."""
        self._client.report_shard_checkpoint(saved)
        return {}

    def run(self, how: str, shards: int) -> dict[str, Any]:
        """Take and finish so many; returns the seconds from having finished one until the next is in hand."""
        _, task = self._client.get_task(DATASET)
        waits, began = [], time.monotonic()
        for _ in range(shards):
            asked = time.monotonic()
            self._client.report_task_result(DATASET, task.task_id, "")
            _, task = self._client.get_task(DATASET)
            waits.append(time.monotonic() - asked)
        ended = time.monotonic()
        self._client.report_task_result(DATASET, task.task_id, "")
        return {"began": began, "ended": ended, "waits": waits, "shards": shards}


if __name__ == "__main__":
    serve(Worker(*sys.argv[1:]))
