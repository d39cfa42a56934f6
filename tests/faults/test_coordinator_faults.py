"""A coordinator that is killed at every write, shares its journal, meets strangers, or has no disk left."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import commands
import pytest
from coordinators import ENVIRONMENT, Process, audit, fails, records, until
from forks import Forked

from gmeta.elastic.client import Client, Refused, Unreachable, read_token
from gmeta.elastic.ledger import JobSpec
from gmeta.elastic.wire import to_wire

pytestmark = pytest.mark.faults

MOMENTS = ("before the write", "written, not applied", "applied, not answered")

# Kills its process at the n-th write of the journal. `requests` go to the coordinator without HTTP between.
DYING = """
import json, os, signal, sys
from gmeta.elastic.coordinator import Conflict, Coordinator
from gmeta.elastic.journal import Journal

moment, fatal, count = sys.argv[1], int(sys.argv[2]), 0
write, handle = Journal.write, Coordinator.handle

def die_if(now):
    if now == moment and count == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def dying_write(*args, **kwargs):
    global count
    count += 1
    die_if("before the write")
    write(*args, **kwargs)
    die_if("written, not applied")

def dying_handle(*args, **kwargs):
    reply = handle(*args, **kwargs)
    die_if("applied, not answered")
    return reply

Journal.write, Coordinator.handle = dying_write, dying_handle
"""
REQUESTS = """
coordinator = Coordinator(Journal(sys.argv[3]), lambda snapshot: [])
for line in sys.stdin:
    name, body = json.loads(line)
    try:
        answer = coordinator.handle(name, body)
    except Conflict as error:
        answer = {"error": str(error)}
    print(json.dumps([count, answer]), flush=True)
    coordinator.tick()
"""
COMMAND = """
from gmeta.cli import run
sys.exit(run(sys.argv[3:]))
"""


class Pipe:
    """A coordinator at the other end of a pipe, started again whenever it dies; a message is sent until answered."""

    def __init__(self, journal: Path, moment: str, fatal: int) -> None:
        self.journal, self.deaths, self.count = journal, 0, 0
        self.numbers = itertools.count()
        self.start(moment, fatal)

    def start(self, moment: str = "never", fatal: int = 0) -> None:
        words = ["-c", DYING + REQUESTS, moment, str(fatal), str(self.journal)]
        self.process = Forked(words, ENVIRONMENT, pipes=(0, 1))

    def call(self, name: str, **fields: object) -> dict:
        message = json.dumps([name, {"run": "r", "request": f"number {next(self.numbers)}", **fields}])
        while True:
            with contextlib.suppress(BrokenPipeError):  # it died after the last answer
                self.process.stdin.write(message + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
            if line:
                self.count, answer = json.loads(line)
                return answer
            self.bury()
            assert self.process.returncode == -signal.SIGKILL
            self.deaths += 1
            self.start()

    def bury(self) -> None:
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


def work(pipe: Pipe, spec: JobSpec) -> Counter[tuple[int, int]]:
    """One worker that takes all there is, two work items at a time, reports progress, and once gives one back."""
    delivered: Counter[tuple[int, int]] = Counter()
    pipe.call("job", pack="p", plan=to_wire(spec))
    reply = pipe.call("lease", worker="w", count=2)
    if spec.mode == "at_least_once":
        key = [reply["leases"][0][name] for name in ("epoch", "shard", "attempt")]
        pipe.call("fail", generation=0, shards=[key], reason="once")
        del reply["leases"][0]
    while reply["reply"] != "END":
        assert reply["reply"] == "SHARD", reply
        keys = []
        for lease in reply["leases"]:
            delivered.update((lease["epoch"], p) for p in range(lease["start"] + lease["done"], lease["stop"]))
            keys.append([lease["epoch"], lease["shard"], lease["attempt"]])
        pipe.call("renew", generation=0, progress=[[*key, 1] for key in keys])
        reply = pipe.call("exchange", worker="w", count=2, generation=0, commit=keys, progress=[])
    pipe.bury()
    return delivered


MODES = ("at_least_once", "at_most_once", "exactly_once")
_USUAL = [(MOMENTS[0], "exactly_once"), (MOMENTS[1], "at_least_once"), (MOMENTS[2], "at_most_once")]
_OTHERS = [case for case in itertools.product(MOMENTS, MODES) if case not in _USUAL]


@pytest.mark.parametrize(
    ("moment", "mode"), [*_USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in _OTHERS)]
)
def test_killed_at_every_write(tmp_path: Path, moment: str, mode: str):
    spec = JobSpec(num_samples=5, work_item_size=2, epochs=2, seed=4, mode=mode)
    undisturbed = Pipe(tmp_path / "undisturbed", "never", 0)
    work(undisturbed, spec)
    whole = records(tmp_path / "undisturbed")
    assert undisturbed.count >= 5
    for fatal in range(1, undisturbed.count + 1):
        pipe = Pipe(tmp_path / f"killed-{fatal}", moment, fatal)
        delivered = work(pipe, spec)
        assert pipe.deaths == 1
        assert set(delivered.values()) == {1}, "the worker lived: nothing is repeated, whatever the mode"
        audit(pipe.journal, spec, delivered)
        assert [kind for kind, _ in records(pipe.journal)] == [kind for kind, _ in whole]


@pytest.mark.parametrize(
    "moment", [MOMENTS[1], *(pytest.param(moment, marks=pytest.mark.slow) for moment in (MOMENTS[0], MOMENTS[2]))]
)
def test_the_client_goes_on_when_the_service_is_killed_at_a_write(tmp_path: Path, moment: str):
    spec = JobSpec(num_samples=30, work_item_size=3, epochs=2, seed=4)
    process = Process(tmp_path / "j", program=("-c", DYING + COMMAND, moment, "5"))
    process.program = ("-m", "gmeta")

    def revive() -> None:
        process.process.communicate()
        process.start()

    reviving = threading.Thread(target=revive)
    reviving.start()
    client = process.client()
    client.open_job("p", spec)
    delivered = Counter((x.epoch, p) for x in client.work_items("w", ahead=1) for p in x.positions)
    reviving.join()
    process.end()
    assert set(delivered.values()) == {1}
    audit(tmp_path / "j", spec, delivered)


def test_workers_and_coordinator_are_killed(tmp_path: Path):
    """A worker dies with what it holds; the coordinator after it; another worker does all that is left."""
    spec = JobSpec(num_samples=24, work_item_size=2, seed=4, lease_s=1.0)
    process = Process(tmp_path / "j")
    dead = process.client()
    dead.open_job("p", spec)
    dead.call("lease", worker="dead", count=5)
    process.kill()
    process.start()
    client = process.client()
    client.open_job("p", spec)
    delivered = Counter((x.epoch, p) for x in client.work_items("alive") for p in x.positions)
    process.end()
    audit(tmp_path / "j", spec, delivered)
    returned = [body["reason"] for kind, body in records(tmp_path / "j") if kind == "Returned"]
    assert returned == ["worker 'dead' did not renew its lease"] * 5


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory):
    """A coordinator with a token, and a job."""
    folder = tmp_path_factory.mktemp("guarded")
    process = Process(folder / "j", "--token_file", folder / "token")
    process.client(read_token(folder / "token")).open_job("p", JobSpec(num_samples=8, work_item_size=2))
    yield process, read_token(folder / "token")
    process.end()


def raw(process: Process, method: str, path: str, body: bytes | None, token: str | None) -> tuple[int, dict | str]:
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if method == "POST":
        headers["Content-Type"] = "application/json"
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def test_two_coordinators_on_one_journal(guarded):
    process, _ = guarded
    assert "in use by another coordinator (process " in fails("--journal", process.journal)


def test_strangers(guarded):
    process, token = guarded
    for wrong in (None, "wrong", token + "x"):
        for method, path in (("POST", "/v1/lease"), ("GET", "/v1/state"), ("GET", "/v1/journal"), ("GET", "/metrics")):
            status, answer = raw(process, method, path, b"{}" if method == "POST" else None, wrong)
            assert status == 401
            assert answer["error"].startswith("the token is missing or wrong")
    status, page = raw(process, "GET", "/", None, None)
    assert status == 200
    assert "<title>gmeta coordinator</title>" in page
    for address in ("http:", "https:", "url(", "@import"):
        assert address not in page.replace("http://www.w3.org/2000/svg", ""), "the page needs nothing from elsewhere"
    with pytest.raises(Refused, match="the token is missing or wrong"):
        process.client("wrong").call("lease", worker="w", count=1)


def test_messages_of_another_job(guarded):
    process, token = guarded
    with pytest.raises(Refused, match="is of run 'r', the message of run 'other'"):
        process.client(token, run="other").open_job("p", JobSpec(num_samples=8, work_item_size=2))
    with pytest.raises(Refused, match="is of the pack 'p', the message of 'q'"):
        process.client(token).open_job("q", JobSpec(num_samples=8, work_item_size=2))
    with pytest.raises(Refused, match=r"plan.num_samples is 8 there and 9 in the message"):
        process.client(token).open_job("p", JobSpec(num_samples=9, work_item_size=2))


def test_stale_messages(guarded):
    process, token = guarded
    client = process.client(token)
    (lease,) = client.call("lease", worker="w", count=1)["leases"]
    key = [lease["epoch"], lease["shard"], lease["attempt"]]
    client.call("fail", generation=0, shards=[key], reason="x")
    for generation, message in ((0, "attempt 1 at work item .* is over"), (7, "of generation 7, the ledger is in 0")):
        with pytest.raises(Refused, match=message) as caught:
            client.call("commit", generation=generation, shards=[key])
        assert caught.value.stale
        assert caught.value.lost == [tuple(key)]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/lease", b"{", 400, "the message is no JSON"),
        ("/v1/lease", b"\xff\xfe", 400, "the message is no JSON"),
        ("/v1/lease", b"[" * 100_000, 400, "the message is no JSON"),
        ("/v1/lease", b'{"count": NaN}', 400, "the message is no JSON (NaN is no number of JSON)"),
        ("/v1/lease", b"[]", 400, "the message is no JSON object"),
        ("/v1/lease", b"{}", 400, "request is None: must be text of 1 to 64 characters"),
        ("/v1/lend", b"{}", 404, "there is no message 'lend': it is one of job, lease, commit"),
        ("/v1/lease", b" " * (16 * 2**20 + 1), 413, "the message is larger than 16777216 bytes"),
    ],
    ids=["cut", "bytes", "deep", "NaN", "list", "empty", "unknown", "large"],
)
def test_bodies_that_make_no_sense(guarded, path: str, body: bytes, status: int, message: str):
    process, token = guarded
    found, answer = raw(process, "POST", path, body, token)
    assert (found, answer["error"][: len(message)]) == (status, message)
    assert raw(process, "GET", "/v1/state", None, token)[0] == 200


def test_the_numbers_for_prometheus(guarded):
    process, token = guarded
    status, text = raw(process, "GET", "/metrics", None, token)
    assert status == 200
    for line in ('gmeta_requests_total{message="job"}', 'gmeta_shards{state="todo"} ', "gmeta_request_errors_total"):
        assert line in text


# A journal with no room left: SQLite itself says so, at a page count instead of the disk's.
CROWDED = """
import sys
from gmeta.cli import run
from gmeta.elastic.journal import Journal

plain = Journal._open
def crowded(self, durable):
    plain(self, durable)
    pages = self._db.execute("PRAGMA page_count").fetchone()[0]
    self._db.execute(f"PRAGMA max_page_count = {pages + 2}")
Journal._open = crowded
sys.exit(run(sys.argv[1:]))
"""


_FULL = r"could not do its part for 0.2 s: journal .* cannot be written \(database or disk is full\): nothing was done"


def test_a_full_disk(tmp_path: Path):
    spec = JobSpec(num_samples=400, work_item_size=1)
    process = Process(tmp_path / "j", program=("-c", CROWDED))
    client = process.client(patience_s=0.2)
    client.open_job("p", spec)
    with pytest.raises(Unreachable, match=_FULL) as raised:
        client.call("lease", worker="w", count=400)
    assert "start it again" not in str(raised.value), "it is there, and only its disk is full"
    status, state = raw(process, "GET", "/v1/state", None, None)
    assert status == 200
    assert state["shards"]["todo"] == 400
    process.end()
    process.program = ("-m", "gmeta")
    process.start()
    client = process.client()
    client.open_job("p", spec)
    delivered = Counter((x.epoch, p) for x in client.work_items("w", ahead=100) for p in x.positions)
    process.end()
    audit(tmp_path / "j", spec, delivered)


def test_stopped_for_a_while(tmp_path: Path):
    """SIGSTOP for longer than a lease: nobody could renew, so nothing runs out."""
    spec = JobSpec(num_samples=2, work_item_size=1, lease_s=2.0)
    process = Process(tmp_path / "j")
    client = process.client()
    client.open_job("p", spec)
    client.call("lease", worker="w", count=2)
    process.process.send_signal(signal.SIGSTOP)
    waited = threading.Event()
    waited.wait(2.5)
    process.process.send_signal(signal.SIGCONT)
    assert client.call("exchange", worker="v", count=2, generation=0, commit=[], progress=[])["reply"] == "WAIT"
    until(lambda: client.call("lease", worker="v", count=2)["reply"] == "SHARD")
    process.end()


def test_it_ends_when_asked(tmp_path: Path):
    process = Process(tmp_path / "j", "--trace", tmp_path / "trace.jsonl")
    client = process.client()
    client.open_job("p", JobSpec(num_samples=2, work_item_size=1))
    assert process.end() == ""
    assert process.process.returncode == 0
    process.start()
    assert process.client().open_job("p", JobSpec(num_samples=2, work_item_size=1)) == 0
    process.process.send_signal(signal.SIGINT)
    process.process.communicate(timeout=60)
    assert process.process.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy", "nonsense"], "policy is 'nonsense': must be one of"),
        (["--policy", "nowhere:decide"], "policy 'nowhere:decide' cannot be imported"),
        (["--host", "0.0.0.0"], "host is '0.0.0.0', which others can reach: name a --token_file"),
        (["--port", "70000"], "port is 70000: must be in [0, 65535]"),
        (["--trace", "{folder}/none/trace"], "cannot be written"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    words = ["coordinate", "--journal", tmp_path / "j", *(word.format(folder=tmp_path) for word in words)]
    assert len(commands.fails(words, capsys, message).splitlines()) == 1


def test_an_address_of_another_machine(tmp_path: Path):
    words = ("--host", "192.0.2.1", "--token_file", tmp_path / "token")
    assert "cannot listen on 192.0.2.1:0" in fails("--journal", tmp_path / "j", *words)


def test_files_that_are_no_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "j").write_text("not a database, but long enough to be taken for one\n" * 100)
    commands.fails(["coordinate", "--journal", tmp_path / "j"], capsys, "another --journal")


def test_without_the_extra(tmp_path: Path):
    program = "import sys; sys.modules['fastapi'] = None; from gmeta.cli import run; sys.exit(run(sys.argv[1:]))"
    argv = [sys.executable, "-c", program, "coordinate", "--journal", str(tmp_path / "j")]
    done = subprocess.run(argv, text=True, capture_output=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'gmeta[serve]'" in done.stderr


def test_one_client_for_many_threads(guarded):
    process, token = guarded
    client = Client(process.url, token, run="r")
    found: list[dict] = []
    threads = [threading.Thread(target=lambda: found.append(client.call("renew", generation=0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{}] * 8


# Strangers


def _post(process: Process, name: str, body: bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    connection.request("POST", f"/v1/{name}", body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_without_a_token_other_pages_and_names_are_refused(tmp_path: Path):
    process = Process(tmp_path / "j")
    body = json.dumps({"run": "r", "request": "1", "pack": "p", "plan": to_wire(JobSpec(4, 2))}).encode()
    local = f"127.0.0.1:{process.port}"
    for status, headers in (
        (403, {"Host": "rebound.example"}),
        (403, {"Host": "127.0.0.1.rebound.example"}),
        (403, {"Host": "[::1"}),
        (403, {"Origin": "https://other.example"}),
        (403, {"Origin": "null"}),
        (403, {"Host": local, "Origin": f"https://{local}"}),
        (415, {"Content-Type": "text/plain"}),
        (415, {"Content-Type": "application/x-www-form-urlencoded"}),
    ):
        assert _post(process, "job", body, **headers)[0] == status, headers
    for path in ("/v1/state", "/v1/journal", "/metrics"):
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
        connection.request("GET", path, headers={"Host": "rebound.example"})
        assert connection.getresponse().status == 403
        connection.close()
    allowed = {"Host": "localhost:8000", "Origin": "http://localhost:8000", "Content-Type": "application/JSON; x=y"}
    assert _post(process, "job", body, **allowed)[0] == 200
    assert records(tmp_path / "j") == []
    assert process.end() == ""


HALF = "\ud800"
LONG = int("9" * 400)


def test_what_cannot_be_written_down_is_refused_and_the_state_stays_sound(tmp_path: Path):
    process = Process(tmp_path / "j")
    client = process.client()
    client.open_job("p", JobSpec(40, 2, mode="exactly_once"))
    group = {"pack": "p", "world_size": 1, "batch": 1, "first_step": 0, "ahead": 1, "report_s": 1.0, "saved": None}
    report = {"generation": 1, "rank": 0, "known": 0, "steps": [], "facts": {}, "about": None}
    odd = [
        *(("lease", {"worker": text, "count": 1}) for text in (HALF, f"w{HALF}x")),
        ("lease", {"worker": "w", "count": LONG}),
        ("begin", group | {"report_s": LONG}),
        ("begin", group | {"saved": {"epoch": 0, "cursor": 0, "num_done": 0, "again": [[1, LONG]], "attempts": []}}),
        ("fail", {"generation": 1, "reason": HALF, "shards": []}),
        ("commit", {"generation": 1, "shards": [[LONG, 0, 1]], "progress": []}),
        ("report", report | {"facts": {HALF: 1}}),
        ("report", report | {"facts": {"free": LONG}}),
        ("report", report | {"facts": {"x" * 101: 1}}),
        ("report", report | {"about": {"role": HALF}}),
        ("report", report | {"about": {"max_slots": LONG}}),
        ("report", report | {"steps": [[0, LONG, 0, 0, 1]]}),
        ("report", report | {"steps": [[LONG, 1, 0, 0, 1]]}),
        ("report", report | {"steps": [[0, 1e308, 0, 0, 1]]}),
    ]
    client.call("begin", **group)
    for number, (name, fields) in enumerate(odd):
        message = {"run": "r", "request": f"odd {number}", **fields}
        status, text = _post(process, name, json.dumps(message).encode())
        assert (status, "must be" in text) == (400, True), (name, fields, status, text)
    for message in ({"run": HALF, "request": "1"}, {"run": "r", "request": HALF}):
        assert _post(process, "renew", json.dumps(message).encode())[0] == 400
    steps = [[step, 1e-300, 0, 0, 1e100] for step in range(20)]  # absurd, but numbers
    assert (
        _post(process, "report", json.dumps({"run": "r", "request": "n", **report, "steps": steps}).encode())[0] == 200
    )
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
    for path in ("/v1/state", "/v1/journal", "/metrics"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, len(answer.read()) > 0) == (200, True)
    connection.close()
    assert process.end() == ""


def test_silent_connections_lock_nobody_out_and_fill_no_log(tmp_path: Path):
    """More connections than there are descriptors, none of which says a word."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 320));"
    limited += "from gmeta.cli import run; sys.exit(run(sys.argv[1:]))"
    process = Process(tmp_path / "j", program=("-c", limited))
    silent = []
    for _ in range(400):
        one = socket.create_connection(("127.0.0.1", process.port), timeout=60)
        silent.append(one)
    body = json.dumps({"run": "r", "request": "1", "pack": "p", "plan": to_wire(JobSpec(4, 2))}).encode()
    began = time.monotonic()
    assert _post(process, "job", body)[0] == 200
    assert time.monotonic() - began < 20
    for one in silent:
        one.close()
    assert len(process.end()) < 2000
