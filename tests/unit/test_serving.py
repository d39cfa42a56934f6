"""`gmeta serve`, in the test's process: what it answers, what it remembers, what it refuses."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packs import user_rows
from serving import ARROW, Client, arrow_body, make_version, metrics_of, one_task, tasks_of, with_client

import gmeta
from gmeta.cli import run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_version(tmp_path_factory.mktemp("serving"), "v1")


def served_like_predict(bundle: Path, folder: Path, tasks: int, each: int) -> None:
    support, candidates = user_rows(tasks - 2, 5, 1, label=True), user_rows(tasks, each, 2, label=False)
    pq.write_table(support, folder / "support.parquet")
    pq.write_table(candidates, folder / "query.parquet")
    words = ["predict", "--run_dir", bundle, "--support", folder / "support.parquet"]
    words += ["--query", folder / "query.parquet", "--out", folder / "out.parquet"]
    assert run([str(word) for word in words]) == 0
    expected = pq.read_table(folder / "out.parquet")["score"].to_numpy()

    async def work(client: Client) -> tuple[np.ndarray, np.ndarray]:
        wanted = tasks_of(support, candidates)
        answers = await asyncio.gather(*(client.score(*wanted[i : i + 7]) for i in range(0, len(wanted), 7)))
        by_key = {task["key"]: task["scores"] for answer in answers for task in answer.json()["tasks"]}
        position = dict.fromkeys(by_key, 0)
        in_json = []
        for key in candidates["user"].to_pylist():
            in_json.append(by_key[key][position[key]])
            position[key] += 1
        body = arrow_body(support=support, candidates=candidates)
        answer = await client.post("/v1/score", body, kind=ARROW)
        table = pa.ipc.open_stream(answer.content).read_all()
        assert table.schema.metadata[b"version"].decode() == client.service.versions.current.id
        return np.array(in_json), table["score"].to_numpy()

    for scores in with_client(bundle, work):
        np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_scores_are_those_of_predict(bundle: Path, tmp_path: Path) -> None:
    served_like_predict(bundle, tmp_path, 50, 10)


@pytest.mark.slow
def test_ten_thousand_scores_are_those_of_predict(bundle: Path, tmp_path: Path) -> None:
    served_like_predict(bundle, tmp_path, 200, 50)


def test_a_state_is_scored_like_its_support(bundle: Path) -> None:
    tasks = [one_task("a", seed=1), one_task("b", seed=2, support=3)]

    async def work(client: Client) -> None:
        direct = (await client.score(*tasks)).json()["tasks"]
        adapted = (await client.adapt(*({"key": t["key"], "support": t["support"]} for t in tasks))).json()
        assert [t["num_support"] for t in adapted["tasks"]] == [6, 3]
        states = {t["key"]: t["state"] for t in adapted["tasks"]}
        again = [{"key": t["key"], "state": states[t["key"]], "candidates": t["candidates"]} for t in tasks]
        assert (await client.score(*again)).json()["tasks"] == direct
        # by the Open Inference Protocol, too
        inputs = [
            {"name": f"candidates.{name}", "datatype": "BYTES", "shape": [4], "data": values}
            for name, values in {**tasks[0]["candidates"], "user": ["a"] * 4}.items()
        ]
        document = {"id": "7", "inputs": inputs, "parameters": {"states": {"a": states["a"]}}}
        answer = (await client.post("/v2/models/gmeta/infer", document)).json()
        assert answer["outputs"][0]["data"] == pytest.approx(direct[0]["scores"], abs=1e-6)
        assert (answer["id"], answer["model_version"]) == ("7", adapted["version"])
        # nothing is adapted twice
        text = await metrics_of(client)
        assert 'gmeta_states_total{found="no",worker="0"} 2.0' in text
        assert 'gmeta_states_total{found="yes",worker="0"} 5.0' in text

    with_client(bundle, work)


def test_spellings_of_a_key_are_one_task(bundle: Path) -> None:
    async def work(client: Client) -> None:
        task = one_task()
        adapted = (await client.adapt({"key": 7, "support": task["support"]})).json()["tasks"][0]
        assert adapted["key"] == 7
        expected = (await client.score({**task, "key": 7})).json()["tasks"][0]["scores"]
        for key in (7, "7", "7.0"):
            named = {"key": key, "state": adapted["state"], "candidates": task["candidates"]}
            answer = (await client.score(named)).json()["tasks"][0]
            assert (answer["key"], answer["scores"]) == (key, expected)
        twice = await client.score({**task, "key": 7}, {**task, "key": "7.0"})
        assert twice.json()["error"]["code"] == "duplicate_task"

    with_client(bundle, work)


def test_a_fault_of_one_pass_is_told_and_the_next_goes_on(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(client: Client) -> None:
        batcher = client.service.batcher
        assert batcher is not None
        whole = batcher._run
        batcher._run = lambda jobs: 1 / 0  # type: ignore[assignment,return-value]
        answer = await client.score(one_task())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert "division" not in answer.text
        batcher._run = whole
        assert (await client.score(one_task())).status_code == 200

    with_client(bundle, work)
    assert "division by zero" in capsys.readouterr().err


def test_a_value_may_stand_for_every_row(bundle: Path) -> None:
    task = one_task("a")
    for part, rows in (("support", 6), ("candidates", 4)):
        task[part] |= {"group": ["group1"] * rows, "age": [0.5] * rows}
    short = {**task, **{p: {**task[p], "group": "group1", "age": 0.5} for p in ("support", "candidates")}}

    async def work(client: Client) -> None:
        assert (await client.score(short)).json() == (await client.score(task)).json()

    with_client(bundle, work)


def test_requests_that_wait_are_computed_together(bundle: Path) -> None:
    async def work(client: Client) -> None:
        tasks = [one_task(f"u{i}", seed=i, support=1 + i % 9) for i in range(30)]
        alone = [(await client.score(task)).json() for task in tasks]
        await asyncio.gather(*(client.http.delete(f"/v1/states/{i}") for i in range(3)))
        passes = client.service.engine.run
        sizes: list[int] = []
        client.service.batcher._run = lambda jobs: (sizes.append(len(jobs)), passes(jobs))[1]  # type: ignore[union-attr]
        together = await asyncio.gather(*(client.score(task) for task in tasks), client.score({**tasks[0], "key": ""}))
        assert max(sizes) > 5
        assert together.pop().status_code == 422
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one["tasks"][0]["scores"], other.json()["tasks"][0]["scores"], atol=1e-6)

    with_client(bundle, work)


GOOD = one_task("a")
ROWS = 4
BIG = {name: [values[0]] * 30_000 for name, values in GOOD["candidates"].items()}


def changed(part: str, **values: Any) -> dict[str, Any]:
    return {**GOOD, part: {**GOOD[part], **values}}


def without(part: str, name: str) -> dict[str, Any]:
    return {**GOOD, part: {key: value for key, value in GOOD[part].items() if key != name}}


REFUSED: dict[str, tuple[Any, int, str, str]] = {
    "unknown feature": (changed("candidates", itm=["x"] * ROWS), 422, "unknown_feature", "did you mean 'item'?"),
    "missing column": (without("candidates", "age"), 422, "missing_column", "no column 'age'"),
    "no label": (without("support", "click"), 422, "missing_column", "tasks[0].support has no column 'click'"),
    "wrong type": (changed("candidates", age=["old"] * ROWS), 422, "bad_value", "'old' is no number"),
    "mixed types": (
        changed("candidates", age=[1, "x", 2, 3]),
        422,
        "bad_value",
        "row 1 has 1 (int), row 2 has 'x' (str)",
    ),
    "mixed labels": (changed("support", click=["a", 0, 1, 0, 1, 0]), 422, "bad_value", "row 2 has 0 (int)"),
    "mixed lists": (changed("candidates", tags=[["a", 1]] * ROWS), 422, "bad_value", "(list of int and str)"),
    "an object": (changed("candidates", age={"a": 1}), 422, "invalid_column", "is an object"),
    "missing value": (changed("candidates", age=[None] * ROWS), 422, "bad_value", "column 'age': is missing"),
    "no click": (changed("support", click=[2] * 6), 422, "bad_value", "clicks, which are 0 or 1"),
    "too many rows": ({**GOOD, "candidates": BIG}, 413, "too_many_rows", "send them in parts"),
    "empty support": (
        changed("support", **{k: [] for k in GOOD["support"]}),
        422,
        "empty_support",
        "leave support out",
    ),
    "no support": ({**GOOD, "support": {}}, 422, "empty_support", "has no rows"),
    "no candidates": ({"key": "a", "support": GOOD["support"]}, 422, "missing_candidates", "has no candidates"),
    "ragged": (changed("candidates", age=[1.0]), 422, "ragged_columns", "different lengths"),
    "long list": (changed("candidates", tags=[["tags1"] * 2000] * ROWS), 413, "list_too_long", "1000 are the most"),
    "no key": ({**GOOD, "key": None}, 422, "invalid_key", "is missing"),
    "a key that is none": ({**GOOD, "key": True}, 422, "invalid_key", "true or false"),
    "misspelt": ({**GOOD, "candidate": {}}, 422, "unknown_key", "did you mean 'candidates'?"),
    "unknown state": (
        {"key": "a", "state": "00" + "0" * 64, "candidates": GOOD["candidates"]},
        404,
        "unknown_state",
        "adapt again",
    ),
    "no state": ({"key": "a", "state": "x", "candidates": GOOD["candidates"]}, 404, "unknown_state", "adapt again"),
}


def test_bad_requests_are_refused(bundle: Path) -> None:
    """One after another, on one server: none of them harms the next."""

    async def work(client: Client) -> None:
        for name, (task, status, code, message) in REFUSED.items():
            answer = await client.score(task)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (status, code), name
            assert message in error["message"], name
            assert "Traceback" not in answer.text, name
        twice = await client.score(GOOD, GOOD)
        assert (twice.status_code, twice.json()["error"]["code"]) == (422, "duplicate_task")
        many = await client.score(*({**GOOD, "key": str(i)} for i in range(300)))
        assert (many.status_code, many.json()["error"]["code"]) == (413, "too_many_tasks")
        unknown = await client.score(GOOD, version="v9")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_version")
        assert (await client.score(GOOD)).status_code == 200

    with_client(bundle, work)


def test_tasks_may_differ_in_the_types_of_their_values(bundle: Path) -> None:
    tasks = [one_task(f"u{i}", seed=i, support=2 + i) for i in range(6)]
    for task, as_type in zip(tasks, (float, str, float, int, str, None), strict=True):
        for part in ("support", "candidates"):
            values = task[part]["price"]
            task[part]["price"] = [float(round(v)) if as_type is None else as_type(round(v)) for v in values]
    for part in ("support", "candidates"):
        tasks[1][part]["item"] = list(range(len(tasks[1][part]["item"])))

    async def work(client: Client) -> None:
        alone = [(await client.score(task)).json()["tasks"][0] for task in tasks]
        together = await client.score(*tasks)
        assert together.status_code == 200, together.text
        for one, other in zip(alone, together.json()["tasks"], strict=True):
            assert one["key"] == other["key"]
            np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-6)
        adapted = (await client.adapt(*({"key": t["key"], "support": t["support"]} for t in tasks))).json()["tasks"]
        assert [(t["key"], t["num_support"]) for t in adapted] == [(f"u{i}", 2 + i) for i in range(6)]
        named = [
            {"key": t["key"], "state": t["state"], "candidates": task["candidates"]}
            for t, task in zip(adapted, tasks, strict=True)
        ]
        for one, other in zip(alone, (await client.score(*named)).json()["tasks"], strict=True):
            np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-6)

    with_client(bundle, work)


def test_tasks_may_not_differ_in_too_many_ways(bundle: Path) -> None:
    tasks = []
    for number, kinds in enumerate(itertools.product((str, int), (str, int, float), (str, int, float))):
        tasks.append(one_task(f"u{number}"))
        for name, kind in zip(("item", "age", "price"), kinds, strict=True):
            tasks[-1]["candidates"][name] = [kind(1)] * ROWS

    async def work(client: Client) -> None:
        answer = await client.score(*tasks)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_value")
        assert "in 18 ways: send one type a column" in answer.json()["error"]["message"]

    with_client(bundle, work)


def test_a_bad_row_is_told_with_its_task(bundle: Path) -> None:
    async def work(client: Client) -> None:
        for part, column, value in (("candidates", "age", None), ("candidates", "age", "old"), ("support", "click", 2)):
            tasks = [one_task(f"u{i}", seed=i) for i in range(5)]
            tasks[3][part][column][1] = value
            if value == "old":
                tasks[3][part][column] = [str(v) for v in tasks[3][part][column]]
            message = (await client.score(*tasks)).json()["error"]["message"]
            assert message.startswith("tasks[3] (key 'u3'): "), message
            assert column == "click" or f"{part}, row 2, column '{column}'" in message

    with_client(bundle, work)


def test_what_no_route_takes_is_refused_like_all_else(bundle: Path) -> None:
    async def work(client: Client) -> None:
        lost, wrong = await client.http.get("/v1/scores"), await client.http.get("/v1/score")
        assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"

    with_client(bundle, work)


NO_JSON = {
    b"": "the body is empty: it must be a JSON object",
    b"[]": "the body is a list: it must be an object",
    b"null": "the body is null: it must be an object",
    b'{"tasks":' + b"[" * 1000: "the body is nested too deep: it may be 200 deep",
    b'{"tasks": x}': "the body is no JSON (expected value at line 1 column 11)",
    b'{"tasks": NaN}': "the body is no JSON (expected value at line 1 column 11): missing values are null, not NaN",
}


def test_why_a_body_is_no_json(bundle: Path) -> None:
    async def work(client: Client) -> None:
        for body, message in NO_JSON.items():
            assert (await client.post("/v1/score", body)).json()["error"]["message"] == message
        zipped = await client.post("/v1/score", b"", **{"content-encoding": "gzip"})
        assert (zipped.status_code, zipped.json()["error"]["code"]) == (415, "unsupported_encoding")
        assert "send it uncompressed" in zipped.json()["error"]["message"]

    with_client(bundle, work)


def huge_dictionary() -> bytes:
    """Few bytes that stand for many: a long text, named in each of many rows."""
    rows = user_rows(1, 20_000, 1, label=False)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 100_000]))
    return arrow_body(candidates=rows.set_column(rows.column_names.index("group"), "group", text))


def compressed_zeros() -> bytes:
    """A stream that holds a thousand times its bytes."""
    rows = user_rows(1, 1000, 1, label=False)
    zeros = pa.array([b"\0" * 100_000] * 1000, pa.large_binary()).cast(pa.large_string())
    table = rows.set_column(rows.column_names.index("group"), "group", zeros)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


ARROW_ROWS = user_rows(1, 3, 1, label=False)
BODIES: dict[str, tuple[Any, str, int, str]] = {
    "no JSON": (b"{", "application/json", 400, "invalid_json"),
    "NaN": (
        json.dumps({"tasks": [changed("candidates", age=[float("nan")] * ROWS)]}).encode(),
        "application/json",
        400,
        "invalid_json",
    ),
    "deep": (b'{"tasks":' + b"[" * 100_000, "application/json", 400, "invalid_json"),
    "a list": (b"[]", "application/json", 400, "invalid_json"),
    "no tasks": (b"{}", "application/json", 422, "invalid_tasks"),
    "large": (b'{"tasks": "' + b"x" * 3_000_000 + b'"}', "application/json", 413, "body_too_large"),
    "text": (b"{}", "text/plain", 415, "unsupported_type"),
    "no Arrow": (b"none of it", ARROW, 400, "invalid_arrow"),
    "cut Arrow": (arrow_body(candidates=ARROW_ROWS)[:300], ARROW, 400, "invalid_arrow"),
    "nothing": (b"", ARROW, 422, "missing_candidates"),
    "another part": (arrow_body(query=ARROW_ROWS), ARROW, 422, "invalid_part"),
    "a struct": (
        arrow_body(candidates=ARROW_ROWS.set_column(1, "group", pa.array([{"a": 1}] * 3))),
        ARROW,
        422,
        "invalid_type",
    ),
    "a column less": (arrow_body(candidates=ARROW_ROWS.drop_columns("age")), ARROW, 422, "missing_column"),
    "a column more": (
        arrow_body(candidates=ARROW_ROWS.append_column("x", pa.array([1] * 3))),
        ARROW,
        422,
        "unknown_feature",
    ),
    "many rows": (
        arrow_body(
            candidates=user_rows(1, 21_000, 1, label=False)
            .drop_columns("tags")
            .append_column("tags", pa.array([["a"]] * 21_000))
        ),
        ARROW,
        413,
        "too_many_rows",
    ),
    "a large dictionary": (huge_dictionary(), ARROW, 413, "body_too_large"),
    "a bomb": (compressed_zeros(), ARROW, 413, "body_too_large"),
}


def test_bad_bodies_are_refused(bundle: Path) -> None:
    async def work(client: Client) -> None:
        for name, (body, kind, status, code) in BODIES.items():
            answer = await client.post("/v1/score", body, kind=kind)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (name, answer.text)
        zipped = pa.BufferOutputStream()
        with pa.ipc.new_stream(zipped, ARROW_ROWS.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as stream:
            stream.write_table(ARROW_ROWS)
        assert (await client.post("/v1/score", zipped.getvalue().to_pybytes(), kind=ARROW)).status_code == 200

    with_client(bundle, work, max_body_mb=2)


TOKENS = ("a" * 20, "b" * 20)


def test_states_belong_to_a_token(bundle: Path) -> None:
    async def work(client: Client) -> None:
        other = {"authorization": f"Bearer {TOKENS[1]}"}
        support = {"key": "a", "support": GOOD["support"]}
        state = (await client.adapt(support)).json()["tasks"][0]["state"]
        named = {"tasks": [{"key": "a", "state": state, "candidates": GOOD["candidates"]}]}
        assert (await client.post("/v1/score", named)).status_code == 200
        foreign = await client.post("/v1/score", named, **other)
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "unknown_state")
        assert (await client.http.delete(f"/v1/states/{state}", headers=other)).status_code == 404
        mixed = await client.score({"key": "b", "state": state, "candidates": GOOD["candidates"]})
        assert (mixed.status_code, mixed.json()["error"]["code"]) == (422, "state_of_another_task")
        for header in ({"authorization": "Bearer " + "c" * 20}, {"authorization": ""}, {"authorization": TOKENS[0]}):
            answer = await client.post("/v1/score", named, **header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
            assert (await client.http.get("/metrics", headers=header)).status_code == 401
        assert (await client.http.get("/v2/health/live", headers={"authorization": ""})).status_code == 200
        assert client.service.states.nbytes > 0
        assert (await client.http.delete(f"/v1/states/{state}")).status_code == 204
        assert client.service.states.nbytes == 0
        gone = await client.post("/v1/score", named)
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "state_expired")
        assert (await client.http.delete(f"/v1/states/{state}")).status_code == 410

    with_client(bundle, work, tokens=TOKENS)


def test_states_expire(bundle: Path) -> None:
    async def work(client: Client) -> None:
        state = (await client.adapt({"key": "a", "support": GOOD["support"]})).json()["tasks"][0]["state"]
        await asyncio.sleep(0.25)
        answer = await client.score({"key": "a", "state": state, "candidates": GOOD["candidates"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "state_expired")

    with_client(bundle, work, state_ttl_s=0.2)


def test_memory_of_states_is_bounded(bundle: Path) -> None:
    async def work(client: Client) -> None:
        for start in range(0, 600, 200):
            many = [{"key": f"u{start + i}", "support": one_task(seed=start + i)["support"]} for i in range(200)]
            assert (await client.adapt(*many)).status_code == 200
        assert 0 < client.service.states.nbytes <= 2**20

    with_client(bundle, work, state_mb=1)


def test_without_a_token_pages_of_other_origins_are_refused(bundle: Path) -> None:
    async def work(client: Client) -> None:
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            answer = await client.post("/v1/score", {"tasks": [GOOD]}, **headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_local")

    with_client(bundle, work)


def test_a_full_queue_and_a_late_answer(bundle: Path) -> None:
    async def work(client: Client) -> None:
        import time

        batcher = client.service.batcher
        assert batcher is not None
        slow = batcher._run
        batcher._run = lambda jobs: (time.sleep(0.3), slow(jobs))[1]
        answers = await asyncio.gather(*(client.score(one_task(f"u{i}")) for i in range(6)))
        codes = [(a.status_code, a.json().get("error", {}).get("code")) for a in answers]
        assert (503, "queue_full") in codes
        assert (504, "timeout") in codes
        refused = next(a for a in answers if a.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        batcher._run = slow
        await asyncio.sleep(0.7)
        assert (await client.score(GOOD)).status_code == 200

    with_client(bundle, work, max_queue=3, timeout_s=0.2, batch_tasks=1)


def test_what_is_told_of_the_model(bundle: Path) -> None:
    async def work(client: Client) -> None:
        model = (await client.http.get("/v1/model")).json()
        assert model["version"] == gmeta.load(bundle).version
        assert (model["task"], model["support"][0]) == ("user", "click")
        described = (await client.http.get("/v2/models/gmeta")).json()
        assert {"name": "candidates.user", "datatype": "BYTES", "shape": [-1]} in described["inputs"]
        assert (await client.http.get("/v2/models/other")).json()["error"]["code"] == "unknown_model"
        assert (await client.http.get("/v2/health/ready")).json() == {"ready": True}
        page = (await client.http.get("/openapi.json")).json()
        assert {"/v1/score", "/v1/adapt", "/v1/states/{state_id}", "/v2/models/{model}/infer"} <= page["paths"].keys()

    with_client(bundle, work)


def test_the_log_names_nobody(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def work(client: Client) -> None:
        await client.score(one_task("somebody"))
        await client.score({**one_task("somebody"), "candidates": {}})

    with_client(bundle, work, access_log=True)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["status"] for line in lines] == [200, 422]
    assert all("somebody" not in json.dumps(line) for line in lines)
    assert (lines[0]["tasks"], lines[0]["rows"], lines[0]["route"]) == (1, 10, "POST /v1/score")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "serve needs --bundle FOLDER or --registry URL"),
        (["--bundle", "nothing"], "nothing is no bundle"),
        (["--bundle", "BUNDLE", "--host", "0.0.0.0"], "name a --token_file"),
        (["--bundle", "BUNDLE", "--pin", "3"], "is a version of a --registry"),
        (["--bundle", "BUNDLE", "--token_file", "OPEN"], "may be read by others"),
        (["--bundle", "BUNDLE", "--token_file", "SHORT"], "a token of 16 ASCII characters"),
    ],
)
def test_a_start_that_cannot_be(
    bundle: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, mode, text in (("OPEN", 0o644, "a" * 20), ("SHORT", 0o600, "a b")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    places = {"BUNDLE": str(bundle), "OPEN": str(tmp_path / "OPEN"), "SHORT": str(tmp_path / "SHORT")}
    assert run(["serve", *(places.get(word, word) for word in words)]) == 2
    assert message in capsys.readouterr().err
