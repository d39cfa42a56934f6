"""`POST /v1/recommend` answers what `gmeta recommend` writes, and says what is wrong with a request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from next_items import event_rows, next_item_pack, next_item_run, timed
from serving import Client, make_version, metrics_of, one_task, with_client

from gmeta.config.delivery import BundleConfig
from gmeta.delivery.bundle import make_bundle
from gmeta.recommender.next_items import NextItems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recommend")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    run = next_item_run(next_item_pack(folder, timed(event_rows()), gaps=True), folder / "run")
    return make_bundle(BundleConfig(run_dir=str(run), out=str(folder / "bundle"))).path


def users_of(events: pa.Table, **more: Any) -> list[dict[str, Any]]:
    """The users of a table of events, as a JSON body has them."""
    users: dict[str, list[dict[str, Any]]] = {}
    for row in events.to_pylist():
        users.setdefault(row["user"], []).append({key: row[key] for key in ("item", "domain", "time")})
    return [{"user": user, "events": mine, **more} for user, mine in users.items()]


def asked(bundle: Path, *requests: Any, **values: Any) -> Any:
    """The answers to bodies that come at once."""

    async def ask(client: Client) -> list[Any]:
        return list(await asyncio.gather(*(client.post("/v1/recommend", body) for body in requests)))

    return with_client(bundle, ask, **values)


def test_served_is_recommended(folder: Path, bundle: Path) -> None:
    events = pq.read_table(folder / "events.parquet")
    users = users_of(events, k=3)
    expected = NextItems.open(bundle, device="cpu").recommend(events, k=3)

    whole, first, rest = asked(bundle, {"users": users}, {"users": users[:7]}, {"users": users[7:]})

    for answers in ([whole], [first, rest]):  # together they are one pass
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        found = [user for answer in answers for user in answer.json()["users"]]
        rows = [{"user": user["user"], **item} for user in found for item in user["items"]]
        for name in ("user", "item", "domain"):
            assert [row[name] for row in rows] == expected[name].to_pylist()
        np.testing.assert_allclose([row["score"] for row in rows], expected["score"], atol=1e-5)


def test_each_user_has_its_own_k_and_domain(bundle: Path) -> None:
    events = [{"item": "b1", "domain": "books", "time": 5}, {"item": "t2", "time": 1.5}, {"item": "b99", "time": 7}]
    users = [
        {"user": 7, "events": events, "k": 2},
        {"user": "b", "events": events, "k": 4, "domain": "toys"},
        {"user": "c", "events": [], "k": 1},
        {"user": "d", "events": events[:1], "k": 1, "domain": "toys"},
    ]
    (answer,) = asked(bundle, {"users": users})
    found = answer.json()
    assert found["version"] == NextItems.open(bundle, device="cpu").version
    assert [(user["user"], user["known_events"], user["unknown_events"]) for user in found["users"]] == [
        (7, 2, 1),
        ("b", 2, 1),
        ("c", 0, 0),
        ("d", 1, 0),
    ]
    domains = [[item["domain"] for item in user["items"]] for user in found["users"]]
    assert domains == [["books"] * 2 + ["toys"] * 2, ["toys"] * 4, [], ["toys"]]
    both, toys = found["users"][0]["items"], found["users"][1]["items"]
    assert [item["item"] for item in both[2:]] == [item["item"] for item in toys[:2]]
    assert not {"b1", "t2"} & {item["item"] for item in both + toys}


def test_a_fraction_of_one_user_rounds_no_time_of_another(bundle: Path) -> None:
    """Nanoseconds are beyond what a float holds: 100 of them apart, two events would be at one time."""
    start = 1_600_000_000_000_000_000
    items = [("b1", start + 100), ("b5", start)]
    users = [
        {"user": "a", "events": [{"item": item, "domain": "books", "time": time} for item, time in items]},
        {"user": "b", "events": [{"item": "b1", "time": 1.5}, {"item": "b2", "time": 1e300}]},
    ]
    alone, together = (answer.json()["users"] for answer in asked(bundle, {"users": users[:1]}, {"users": users}))
    (beside,) = asked(bundle, {"users": users[::-1]})
    for found in (together[0], beside.json()["users"][1]):
        assert [item["item"] for item in found["items"]] == [item["item"] for item in alone[0]["items"]]
        scores = [[item["score"] for item in user["items"]] for user in (found, alone[0])]
        np.testing.assert_allclose(*scores, atol=1e-6)


EVENT = {"item": "b1", "time": 1}


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 422, "invalid_users", "users is missing"),
        ({"users": []}, 422, "invalid_users", "users is empty: give a list of one user or more"),
        ({"users": [1]}, 422, "invalid_users", "users[0] is a number"),
        ({"users": [{"user": "a", "events": [], "size": 1}]}, 422, "unknown_key", "'size'"),
        ({"users": [{"events": []}]}, 422, "invalid_value", "users[0].user is missing"),
        ({"users": [{"user": "a"}]}, 422, "invalid_events", "users[0].events is missing"),
        ({"users": [{"user": "a", "events": [], "k": 0}]}, 422, "invalid_k", "users[0].k is 0"),
        ({"users": [{"user": "a", "events": [], "k": 1001}]}, 413, "list_too_long", "k is 1001: 1000 are the most"),
        ({"users": [{"user": "a", "events": [EVENT, {"time": 1}]}]}, 422, "invalid_value", "events[1].item is missing"),
        ({"users": [{"user": "a", "events": [{"item": "b1"}]}]}, 422, "invalid_time", "events[0].time is missing"),
        ({"users": [{"user": "a", "events": [{**EVENT, "time": "now"}]}]}, 422, "invalid_time", "time is a text"),
        ({"users": [{"user": "a", "events": [{**EVENT, "time": 2**64}]}]}, 422, "invalid_time", "64 bits do not hold"),
        ({"users": [{"user": "a", "events": [{**EVENT, "title": "x"}]}]}, 422, "unknown_key", "'title'"),
        ({"users": [{"user": "a", "events": [EVENT], "domain": "toy"}]}, 422, "bad_value", "did you mean 'toys'?"),
        (
            {"users": [{"user": u, "events": [], "domain": u} for u in ("toys", "toy")]},
            422,
            "bad_value",
            "users[1].domain",
        ),
        ({"users": [{"user": "a", "events": [EVENT]}] * 3}, 413, "too_many_users", "3 users are more than 2"),
        ({"users": [{"user": "a", "events": [EVENT] * 6}]}, 413, "too_many_events", "more than 5 events"),
        ({"users": [{"user": "a", "events": [EVENT]}], "version": "x"}, 404, "unknown_version", "'x' is not served"),
        (b"{", 400, "invalid_json", "no JSON"),
    ],
)
def test_a_bad_request_is_told_where(bundle: Path, body: Any, status: int, code: str, words: str) -> None:
    good = {"users": [{"user": "a", "events": [EVENT], "k": 1}]}
    bad, other = asked(bundle, body, good, max_tasks=2, max_rows=5)
    assert (bad.status_code, bad.json()["error"]["code"]) == (status, code), bad.text
    assert words in bad.json()["error"]["message"]
    assert other.status_code == 200  # one bad request costs no other
    assert len(other.json()["users"][0]["items"]) == 2


def test_routes_of_the_other_kind_say_what_to_ask(bundle: Path, tmp_path: Path) -> None:
    async def of_next_items(client: Client) -> None:
        for path in ("/v1/score", "/v1/adapt", "/v2/models/gmeta/infer"):
            answer = await client.post(path, {"tasks": [one_task()]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "scores_nothing"), path
            assert "ask POST /v1/recommend" in answer.json()["error"]["message"]
        told = (await client.http.get("/v1/model")).json()
        assert (told["items"], told["domains"], told["event"]) == (24, ["books", "toys"], ["item", "domain", "time"])
        assert (await client.http.get("/v2/health/ready")).status_code == 200
        users = [{"user": "a", "events": [EVENT, {"item": "b99", "time": 2}], "k": 1}]
        assert (await client.post("/v1/recommend", {"users": users})).status_code == 200
        metrics = await metrics_of(client)
        assert 'gmeta_requests_total{route="POST /v1/recommend",status="200",worker="0"} 1.0' in metrics
        assert 'gmeta_events_total{worker="0"} 2.0' in metrics
        assert 'gmeta_unknown_events_total{worker="0"} 1.0' in metrics

    async def of_scores(client: Client) -> None:
        answer = await client.post("/v1/recommend", {"users": [{"user": "a", "events": [EVENT]}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "finds_nothing")
        assert "ask POST /v1/score" in answer.json()["error"]["message"]

    with_client(bundle, of_next_items)
    with_client(make_version(tmp_path, "one"), of_scores)


def test_events_without_domains_and_times_count_in_their_order(tmp_path: Path) -> None:
    rows = {name: values for name, values in event_rows().items() if name in ("user", "item")}
    run = next_item_run(next_item_pack(tmp_path, rows), tmp_path / "run")
    bundle = make_bundle(BundleConfig(run_dir=str(run), out=str(tmp_path / "bundle"))).path
    rec = NextItems.open(bundle, device="cpu")

    found = rec.recommend(rows, k=3)

    assert found.column_names == ["user", "rank", "item", "score"]
    assert rec.item_vectors().column_names == ["item", "vector"]
    last = dict(zip(rows["user"], rows["item"], strict=True))
    histories = rec.histories(rows)
    ends = rec._names.names(histories.items[np.cumsum(histories.length) - 1]).to_pylist()
    assert dict(zip(histories.users, ends, strict=True)) == last

    body = {
        "users": [
            {"user": "u1", "k": 3, "events": [{"item": i} for u, i in zip(*rows.values(), strict=True) if u == "u1"]}
        ]
    }
    timed_body = {"users": [{"user": "u1", "events": [{"item": "b1", "time": 1}]}]}
    answer, refused = asked(bundle, body, timed_body)
    mine = found.filter(pa.compute.equal(found["user"], "u1"))["item"].to_pylist()
    assert [item["item"] for item in answer.json()["users"][0]["items"]] == mine
    assert refused.json()["error"]["code"] == "invalid_time"
    assert "the run's events had none" in refused.json()["error"]["message"]
    with pytest.raises(ValueError, match="domain is 'books', which the run does not know: there is: none"):
        rec.recommend(rows, domain="books")


def test_tokens_guard_it(bundle: Path) -> None:
    async def ask(client: Client) -> list[int]:
        body = {"users": [{"user": "a", "events": [EVENT]}]}
        good = await client.post("/v1/recommend", body)
        bad = await client.post("/v1/recommend", body, authorization="Bearer other")
        return [good.status_code, bad.status_code]

    assert with_client(bundle, ask, tokens=("secret-token",)) == [200, 401]
