"""A server's scores against those of `gmeta evaluate`, on raw rows of a test split: two ways to the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from serving import ARROW, Client, arrow_body, make_version, tasks_of, with_client

from gmeta.cli import run

QUERY, MAX_SUPPORT = 20, 30
SCHEMA = {
    "task": "user",
    "label": "click",
    "time": "at",
    "item": "item",
    "categorical": [{"name": "item", "min_count": 2}, {"name": "city", "nulls": "oov"}],
    "multi": ["tags"],
    "numeric": [{"name": "price", "nulls": "mean"}, {"name": "visits", "log": True}],
    "item_statistics": True,
}


@dataclass(frozen=True)
class Split:
    """A pack's test split, as a client has it: raw rows, by user and time, and what `gmeta evaluate` scored of them."""

    bundle: Path
    support: pa.Table
    query: pa.Table
    scores: np.ndarray  # [N], of the query's rows


def log(users: int, seed: int) -> pa.Table:
    """Raw rows of users, interleaved, each at a time of its own; some values are missing, some too rare for an id."""
    rng = np.random.default_rng(seed)
    sizes = QUERY + rng.integers(1, 2 * MAX_SUPPORT, users)
    user = rng.permutation(np.repeat(np.arange(users), sizes))
    rows = len(user)
    item = rng.zipf(1.3, rows) % 500
    taste = np.random.default_rng(0).normal(size=(users, 7))
    return pa.table(
        {
            "user": [f"u{u}" for u in user],
            "item": [f"i{i}" for i in item],
            "city": [None if c == 0 else f"c{c}" for c in rng.integers(0, 9, rows)],
            "tags": [[f"t{t}" for t in rng.integers(0, 12, n)] for n in rng.integers(0, 4, rows)],
            "price": pa.array(rng.normal(20, 5, rows), mask=rng.random(rows) < 0.05),
            "visits": rng.integers(0, 1000, rows),
            "click": (rng.random(rows) < 1 / (1 + np.exp(-2 * taste[user, item % 7]))).astype(int),
            "at": rng.permutation(rows),
        }
    )


def evaluated(folder: Path, users: int) -> Split:
    """Prepare, train, bundle and evaluate a log of so many users, two thirds of whom are test tasks."""
    rows = log(users, 1)
    pq.write_table(rows, folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    words = ["prepare", "--input", folder / "log.parquet", "--schema", folder / "schema.yaml", "--out", folder / "pack"]
    assert run([str(word) for word in [*words, "--query_size", QUERY, "--test_fraction", 2 / 3]]) == 0
    bundle = make_version(folder, "v1", loader={"tasks_per_batch": 16, "max_support_rows": MAX_SUPPORT})
    words = ["evaluate", "--run_dir", folder / "v1-run", "--out", folder / "found", "--baselines", "false"]
    assert run([str(word) for word in [*words, "--resamples", 2]]) == 0
    found = pq.read_table(folder / "found" / "predictions.parquet")
    found = found.sort_by([("task", "ascending"), ("row", "ascending")])
    own = rows.filter(pc.is_in(rows["user"], found["task"].combine_chunks()))
    own = own.sort_by([("user", "ascending"), ("at", "ascending")])
    user = own["user"].to_numpy()
    is_query = pa.array(np.searchsorted(user, user, "right") - np.arange(len(user)) <= QUERY)
    support, query = own.filter(pc.invert(is_query)), own.filter(is_query)
    assert query["user"].equals(found["task"])
    np.testing.assert_array_equal(query["click"].to_numpy(), found["label"].to_numpy())
    return Split(bundle, support, query.drop(["click"]), found["after"].to_numpy())


def served_like_evaluate(split: Split) -> None:
    """Ask for all rows in requests of 7 tasks, in JSON and in Arrow."""
    users = list(dict.fromkeys(split.query["user"].to_pylist()))

    async def work(client: Client) -> tuple[list[float], list[float]]:
        in_json, in_arrow = [], []
        for start in range(0, len(users), 7):
            few = pa.array(users[start : start + 7])
            support, candidates = (rows.filter(pc.is_in(rows["user"], few)) for rows in (split.support, split.query))
            answer = await client.score(*tasks_of(support, candidates))
            assert [task["key"] for task in answer.json()["tasks"]] == few.to_pylist()
            in_json += [score for task in answer.json()["tasks"] for score in task["scores"]]
            answer = await client.post("/v1/score", arrow_body(support=support, candidates=candidates), kind=ARROW)
            in_arrow += pa.ipc.open_stream(answer.content).read_all()["score"].to_pylist()
        return in_json, in_arrow

    for scores in with_client(split.bundle, work):
        np.testing.assert_allclose(scores, split.scores, rtol=0, atol=1e-6)


def test_scores_are_those_of_evaluate(tmp_path: Path) -> None:
    split = evaluated(tmp_path, 60)
    assert len(split.scores) == 40 * QUERY
    served_like_evaluate(split)


@pytest.mark.slow
def test_ten_thousand_scores_are_those_of_evaluate(tmp_path: Path) -> None:
    split = evaluated(tmp_path, 750)
    assert len(split.scores) == 10_000
    assert np.ptp(split.scores) > 0.5
    served_like_evaluate(split)
