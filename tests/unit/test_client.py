"""The client against a coordinator in another process: retries, waiting, renewal, giving back."""

import http.server
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from coordinators import Process, audit, records, until

from gmeta.elastic.client import Client, HeldWorkItem, Refused, Unreachable, make_token, read_token
from gmeta.elastic.ledger import JobSpec, Mode, Plan

PLAN = JobSpec(num_samples=60, work_item_size=4, epochs=2, seed=3, lease_s=30.0)


@pytest.fixture
def coordinator(tmp_path: Path):
    process = Process(tmp_path / "j")
    yield process
    process.end()


def samples(lease: HeldWorkItem) -> list[tuple[int, int]]:
    return [(lease.epoch, position) for position in lease.positions]


@pytest.mark.parametrize(("ahead", "mode"), [(0, "at_least_once"), (7, "at_most_once"), (2, "exactly_once")])
def test_every_sample_once(tmp_path: Path, ahead: int, mode: Mode):
    spec = replace(PLAN, mode=mode)
    process = Process(tmp_path / "j")
    client = process.client()
    assert client.open_job("p", spec) == 0
    taken = Counter(sample for lease in client.work_items("w0", ahead) for sample in samples(lease))
    process.end()
    assert taken == {(epoch, position): 1 for epoch in range(2) for position in range(60)}
    audit(tmp_path / "j", spec, taken)


def test_workers_share_and_wait_for_each_other(coordinator: Process):
    taken: list[Counter] = [Counter() for _ in range(3)]

    def work(worker: int) -> None:
        client = coordinator.client()
        client.open_job("p", PLAN)
        for lease in client.work_items(f"w{worker}", ahead=1):
            taken[worker].update(samples(lease))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken, Counter()) == {(epoch, position): 1 for epoch in range(2) for position in range(60)}


def test_waiting_is_not_the_end(coordinator: Process):
    spec = JobSpec(num_samples=2, work_item_size=1, epochs=1)
    slow, fast = coordinator.client(), coordinator.client()
    slow.open_job("p", spec)
    fast.open_job("p", spec)
    held = slow.call("lease", worker="slow", count=1)["leases"][0]
    taken: list[HeldWorkItem] = []
    thread = threading.Thread(target=lambda: taken.extend(fast.work_items("fast", ahead=0)))
    thread.start()
    until(lambda: len(taken) == 1)
    assert thread.is_alive()
    slow.call("fail", generation=0, shards=[[0, held["shard"], 1]], reason="gives up")
    thread.join(timeout=30)
    assert [lease.attempt for lease in taken] == [1, 2]


def test_a_loop_that_raises_gives_its_work_items_back(coordinator: Process):
    client = coordinator.client()
    client.open_job("p", PLAN)

    def train() -> None:
        for number, _ in enumerate(client.work_items("w0", ahead=2)):
            if number == 1:
                raise KeyError("a bug of the user's")

    with pytest.raises(KeyError, match="a bug"):
        train()
    found = records(coordinator.journal)
    assert sum(kind == "Committed" for kind, _ in found) == 1
    reasons = [body["reason"] for kind, body in found if kind == "Returned"]
    assert len(reasons) >= 2
    assert set(reasons) == {"worker 'w0' left its loop"}
    for _ in client.work_items("w1"):
        pass
    audit(coordinator.journal, PLAN)


def test_leases_are_renewed_while_the_loop_works(coordinator: Process):
    spec = JobSpec(num_samples=4, work_item_size=4, lease_s=0.6)
    client = coordinator.client()
    client.open_job("p", spec)
    for lease in client.work_items("w0"):
        lease.progress(3)
        until(lambda: sum(kind == "Renewed" for kind, _ in records(coordinator.journal)) >= 6)
        assert not lease.lost
    found = records(coordinator.journal)
    assert [kind for kind, _ in found if kind != "Renewed"] == ["Leased", "Committed"]
    assert [body["lease"]["done"] for kind, body in found if kind == "Renewed"][-1] == 3


def test_a_lost_work_item_is_dropped_and_the_loop_goes_on(coordinator: Process):
    spec = JobSpec(num_samples=3, work_item_size=1, lease_s=5.0)
    client, other = coordinator.client(), coordinator.client()
    client.open_job("p", spec)
    lost = []
    for number, lease in enumerate(client.work_items("w0", ahead=0)):
        if number == 0:
            other.call("fail", generation=0, shards=[list(lease.key)], reason="taken away")
            lease.progress(1)
            until(lambda lease=lease: lease.lost)
            lost.append(lease.key)
    found = records(coordinator.journal)
    assert sum(kind == "Committed" for kind, _ in found) == 3
    assert (*lost[0][:2], 2) in [(b["epoch"], b["shard"], b["attempt"]) for k, b in found if k == "Committed"]


def test_progress_is_checked(coordinator: Process):
    client = coordinator.client()
    client.open_job("p", PLAN)
    lease = next(iter(client.work_items("w0")))
    lease.progress(2)
    for count in (1, 5):
        with pytest.raises(ValueError, match=rf"{count} positions are reported finished: must be 2 to 4"):
            lease.progress(count)


def test_a_coordinator_that_is_away_delays_and_loses_nothing(tmp_path: Path):
    process = Process(tmp_path / "j")
    client = process.client()
    client.open_job("p", PLAN)
    taken: Counter = Counter()
    starting = None
    for number, lease in enumerate(client.work_items("w0", ahead=2)):
        if number == 5:
            process.kill()
            starting = threading.Timer(1.0, process.start)
            starting.start()
        taken.update(samples(lease))
    assert starting is not None
    starting.join()
    process.end()
    assert set(taken.values()) == {1}
    audit(tmp_path / "j", PLAN, taken)


def test_the_former_names_work_and_say_the_new_ones(coordinator: Process):
    client = coordinator.client()
    with pytest.warns(FutureWarning, match="Plan is called JobSpec now"):
        job = Plan(num_samples=3, shard_size=2)
    assert job == JobSpec(num_samples=3, work_item_size=2)
    with pytest.warns(FutureWarning, match="the argument plan is called job now"):
        client.open_job(pack="p", plan=job)
    with pytest.warns(FutureWarning, match="Client.shards is called work_items now"):
        leases = client.shards("w0")
    assert sorted(position for lease in leases for position in lease.positions) == [0, 1, 2]
    with pytest.raises(ValueError, match="give a JobSpec"):
        client.open_job("p")


def test_nobody_answers():
    with pytest.raises(Unreachable, match=r"no coordinator answered at http://127.0.0.1:9 for 0.2 s"):
        Client("http://127.0.0.1:9", run="r", patience_s=0.2).call("job")


class Answers(http.server.BaseHTTPRequestHandler):
    """503 twice, then a reply; and what was asked."""

    asked: tuple[list[bytes], ...] = ()

    def do_POST(self) -> None:
        self.asked[0].append(self.rfile.read(int(self.headers["Content-Length"])))
        status = 503 if len(self.asked[0]) < 3 else 200
        body = b'{"error": "full", "stale": false, "lost": []}' if status == 503 else b'{"generation": 4}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_the_same_request_is_sent_again():
    kind = type("Kind", (Answers,), {"asked": ([],)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.server_port}", run="r")
        assert client.open_job("p", PLAN) == 4
        server.shutdown()
    bodies = kind.asked[0]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_another_service_at_the_address():
    class Other(Answers):
        def do_POST(self) -> None:
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Refused, match="answered 404, not as a gmeta coordinator does"):
            Client(f"http://127.0.0.1:{server.server_port}", run="r").call("job")
        server.shutdown()


def test_mistakes_before_anything_is_sent():
    with pytest.raises(ValueError, match="url is 'localhost:7'"):
        Client("localhost:7", run="r")
    client = Client("http://127.0.0.1:9", run="r")
    with pytest.raises(ValueError, match="call open_job"):
        next(client.work_items("w0"))
    client.job = PLAN
    with pytest.raises(ValueError, match="ahead is -1"):
        next(client.work_items("w0", ahead=-1))


def test_tokens(tmp_path: Path):
    path = tmp_path / "token"
    token = make_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 32
    assert make_token(path) == read_token(path) == token
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"may be read by others \(mode 644\): chmod 600"):
        read_token(path)
    path.chmod(0o600)
    for no_token in ("short\n", "ein Schlüssel, länger\n", "Schlüssel" * 4):
        path.write_text(no_token)
        with pytest.raises(ValueError, match="holds no token"):
            make_token(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_token(tmp_path / "none")
