"""The journal: what was written is there after a restart, all of a request or nothing of it."""

import json
import random
import sqlite3
from pathlib import Path

import pytest

from gmeta.elastic import journal as journals
from gmeta.elastic.actions import AdjustAccumulation, AdjustBatch, DropLate, KillRestart, Setting
from gmeta.elastic.controller import Decided, Granted
from gmeta.elastic.coordinator import Coordinator
from gmeta.elastic.journal import Journal, Unwritable
from gmeta.elastic.ledger import Committed, JobSpec, Lease, Leased, Renewed, Returned, RolledBack
from gmeta.elastic.records import Began, Introduced, from_row, to_row

LEASE = Lease(epoch=0, work_item=3, attempt=2, worker="w0", deadline=12.5, done=4)
ACTIONS = (AdjustBatch((3, 5)), AdjustAccumulation((1, 2)), DropLate(0.5), KillRestart(1, "slow"))
RECORDS = [
    Leased((LEASE,)),
    Renewed(LEASE),
    Committed(0, 3, 2),
    Returned(0, 3, 2, "out of memory"),
    RolledBack(2, {"epoch": 0, "cursor": 1, "again": [[3, 4]], "num_done": 0, "attempts": [[3, 2]]}),
    Granted(17),
    Decided(3.25, ACTIONS, Setting(1, 18, (3, 5), (1, 2), 0.5, 1)),
    Began(2, world_size=2, batch=8, first_step=5, ahead=3, report_s=0.25),
    Introduced(1, {"role": "worker", "max_slots": 64}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_survive_json(record):
    kind, body = to_row(record)
    assert from_row(kind, json.loads(json.dumps(body))) == record


def test_a_journal_is_read_as_it_was_written(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    assert journal.job() is None
    journal.write([], 1.0, "first", {"generation": 0}, job={"run": "r"})
    journal.write(RECORDS[:2], 2.0, "second", {"reply": "END"})
    journal.write(RECORDS[2:], 3.0)
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.job() == {"run": "r"}
    assert [record for _, record in again.records()] == RECORDS
    assert [time for time, _ in again.records()] == [2.0] * 2 + [3.0] * (len(RECORDS) - 2)
    assert again.reply("first") == {"generation": 0}
    assert again.reply("second") == {"reply": "END"}
    assert again.reply("third") is None
    assert [row["seq"] for row in again.rows(after=3, limit=2)] == [4, 5]
    again.close()


@pytest.mark.parametrize("durable", [False, True])
def test_durable_waits_for_the_disk(tmp_path: Path, durable: bool):
    journal = Journal(tmp_path / "j", durable)
    (level,) = journal._db.execute("PRAGMA synchronous").fetchone()
    journal.close()
    assert level == (2 if durable else 1)


def test_old_replies_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journals, "KEPT_REPLIES", 5)
    monkeypatch.setattr(journals, "_PRUNE_EVERY", 10)
    journal = Journal(tmp_path / "j")
    for i in range(31):
        journal.write([], float(i), f"request-{i}", {})
    kept = [i for i in range(31) if journal.reply(f"request-{i}") is not None]
    journal.close()
    assert kept == list(range(26, 31))


def test_a_full_disk_writes_nothing(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.write(RECORDS[:1], 1.0)
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    big = [Returned(0, 0, 1, "x" * 100_000)]
    with pytest.raises(Unwritable, match=r"disk is full.*nothing was done"):
        journal.write(big, 2.0, "request", {})
    assert len(list(journal.records())) == 1
    assert journal.reply("request") is None
    journal._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    journal.write(big, 3.0, "request", {})
    assert len(list(journal.records())) == 2
    journal.close()


def test_one_coordinator_at_a_time(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    with pytest.raises(ValueError, match=r"in use by another coordinator \(process \d+ on .*\): stop that one"):
        Journal(tmp_path / "j")
    journal.close()
    Journal(tmp_path / "j").close()


def test_files_that_are_no_journal(tmp_path: Path):
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one\n" * 100)
    with pytest.raises(ValueError, match=r"cannot be read .*another --journal"):
        Journal(tmp_path / "text")
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("CREATE TABLE songs (name TEXT)")
    foreign.commit()
    foreign.close()
    before = (tmp_path / "foreign").read_bytes()
    with pytest.raises(ValueError, match="database of another program"):
        Journal(tmp_path / "foreign")
    assert (tmp_path / "foreign").read_bytes() == before
    with pytest.raises(ValueError, match="there is no folder"):
        Journal(tmp_path / "nowhere" / "j")
    with pytest.raises(ValueError, match="is a folder: name a file"):
        Journal(tmp_path)


@pytest.mark.parametrize("damage", ["missing record", "unknown kind", "bytes"])
def test_damage_is_found(tmp_path: Path, damage: str):
    path = tmp_path / "j"
    journal = Journal(path)
    journal.write([Returned(0, i, 1, "x" * 500) for i in range(200)], 1.0)
    journal.close()
    if damage == "bytes":
        content = bytearray(path.read_bytes())
        content[4096 * 6 : 4096 * 12] = b"\xff" * (4096 * 6)
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as db:
            db.execute(
                "DELETE FROM records WHERE seq = 7"
                if damage == "missing record"
                else "UPDATE records SET kind = 'Sung' WHERE seq = 7"
            )
        db.close()
    with pytest.raises(ValueError, match=r"(is damaged|cannot be read) \(.*restore it from a copy"):
        list(Journal(path).records())


def older_journal(folder: Path) -> Path:
    """A journal with a record of each kind, as the release wrote it in which work items were called shards."""
    path = folder / "older.db"
    database = sqlite3.connect(path)
    script = Path(__file__).parent / "fixtures" / "journal-of-an-older-release.sql"
    database.executescript(script.read_text(encoding="utf-8"))
    database.close()
    return path


def test_an_older_journal_is_read_and_would_be_written_alike(tmp_path: Path) -> None:
    journal = Journal(older_journal(tmp_path))
    rows = journal.rows(0, 1000)
    kinds = {"Leased", "Renewed", "Committed", "Returned", "RolledBack", "Began", "Introduced", "Granted", "Decided"}
    assert {row["kind"] for row in rows} == kinds
    for row, (_, record) in zip(rows, journal.records(), strict=True):
        kind, body = to_row(record)
        assert (kind, json.dumps(body)) == (row["kind"], json.dumps(row["body"]))
    journal.close()


def test_a_coordinator_goes_on_from_an_older_journal(tmp_path: Path) -> None:
    coordinator = Coordinator(Journal(older_journal(tmp_path)), lambda snapshot: [], clock=lambda: 1015.0)
    assert coordinator.job is not None
    assert coordinator.job.spec == JobSpec(100, 10, 2, 3, True, "exactly_once", 30.0, 2, True)
    assert coordinator.ledger.save() == {
        "epoch": 0,
        "cursor": 4,
        "again": [(8, 5), (9, 0)],
        "num_done": 2,
        "attempts": [(8, 2), (7, 1), (4, 2), (9, 1)],
    }
    assert coordinator.controller is not None
    assert coordinator.controller.settings[-1] == Setting(2, 12, (6, 2), (2, 1), 1.5, 1)
    repeated = coordinator.handle("exchange", {"run": "r1", "request": "q19"})  # as a client of that release asks
    assert repeated["leases"] == [{"epoch": 0, "shard": 9, "attempt": 1, "done": 0, "start": 90, "stop": 100}]
    settings = {"generation": 1, "rank": 0, "known": -1, "steps": [], "facts": {}}
    reply = coordinator.handle("report", {"run": "r1", "request": "new", **settings})
    assert reply["settings"][-1]["slots"] == (6, 2)
    coordinator.close()


def damaged_or_same(path: Path, whole: list[object]) -> bool:
    """Whether a journal is refused in words; otherwise it must say what it said before."""
    refusal, said = "", None
    try:
        journal = Journal(path)
        try:
            said = [journal.job(), *journal.records(), *map(journal.reply, ("a", "b"))]
        finally:
            journal.close()
    except ValueError as error:
        refusal = str(error)
    assert said == whole or any(cure in refusal for cure in ("restore it from a copy", "name another --journal"))
    return bool(refusal)


def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.write([], 1.0, "a", {"generation": 0}, job={"run": "r", "pack": "p"})
    journal.write(RECORDS[:4], 2.5, "b", {"reply": "END"})
    journal.write(RECORDS[4:], 3)
    whole = [journal.job(), *journal.records(), *map(journal.reply, ("a", "b"))]
    journal.close()
    content = path.read_bytes()
    used = [place for place, byte in enumerate(content) if byte]
    rng, found = random.Random(0), 0
    for _ in range(300):
        damaged, place = bytearray(content), rng.choice(used)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        for beside in tmp_path.glob("j-*"):
            beside.unlink()
        found += damaged_or_same(path, whole)
    assert found > 250, found


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE records SET body = replace(body, '3', '4') WHERE seq = 3",
        "UPDATE records SET time = 2.25 WHERE seq = 3",
        "UPDATE records SET sum = NULL WHERE seq = 3",
        "UPDATE records SET sum = (SELECT sum FROM records WHERE seq = 2) WHERE seq = 3",
        'UPDATE job SET body = \'{"run": "s"}\'',
        "UPDATE job SET body = '['",
        "DELETE FROM job",
        "UPDATE replies SET body = '{}' WHERE request = 'b'",
    ],
)
def test_a_changed_row_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.write([], 1.0, "a", {}, job={"run": "r"})
    journal.write(RECORDS, 2.0, "b", {"reply": "END"})
    journal.close()
    with sqlite3.connect(path) as database:
        database.execute(change)
    database.close()
    assert damaged_or_same(path, [])


def test_an_older_journal_goes_on_with_checksums(tmp_path: Path) -> None:
    path = older_journal(tmp_path)
    journal = Journal(path)
    old = list(journal.records())
    journal.write(RECORDS[:2], 2000.0)
    journal.close()
    again = Journal(path)
    assert list(again.records()) == [*old, *((2000.0, record) for record in RECORDS[:2])]
    again.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE records SET time = 1 WHERE seq = (SELECT max(seq) FROM records)")
    database.close()
    assert damaged_or_same(path, [])
