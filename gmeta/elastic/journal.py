"""The coordinator's journal: one SQLite file in WAL mode, one transaction a request, one coordinator at a time.

A transaction holds the records of a change and the reply to the request that made it. So after a crash either both are
there, and the request sent again gets the same reply, or neither is, and the request is carried out then. `durable`
asks for `synchronous=FULL`: what was answered then survives the loss of power, not only the death of the process.

Each row has a checksum, and that of a record counts in the one before it: SQLite finds damage to its own structure, not
to what it stores. Rows of an older release have none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gmeta.elastic.records import Record, from_row, to_row

KEPT_REPLIES = 10_000
"""The number of newest replies that are kept. It is enough, because a client repeats a request within minutes."""
_PRUNE_EVERY = 1_000
_APPLICATION_ID = 0x676D4A31  # in the file's header: tells our journals from other SQLite files
_SCHEMA = f"""
BEGIN;
CREATE TABLE job (id INTEGER PRIMARY KEY CHECK (id = 1), time REAL NOT NULL, body TEXT NOT NULL, sum BLOB);
CREATE TABLE records (seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, sum BLOB);
CREATE TABLE replies (
    number INTEGER PRIMARY KEY, request TEXT NOT NULL UNIQUE, time REAL NOT NULL, body TEXT NOT NULL, sum BLOB
);
PRAGMA application_id = {_APPLICATION_ID};
COMMIT;
"""


class Unwritable(RuntimeError):
    """The journal cannot be written now (a full disk). Nothing of the request was done, and it may be sent again."""


class Journal:
    """Opens or creates the journal at `path`.

    ValueError says that another coordinator has it, that it is damaged, or that the file is no journal.
    """

    def __init__(self, path: Path | str, durable: bool = False) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            raise ValueError(f"journal {self.path}: there is no folder {self.path.absolute().parent}; create it")
        if self.path.is_dir():
            raise ValueError(f"journal {self.path} is a folder: name a file, such as {self.path / 'journal.db'}")
        self._lock = _lock(self.path)
        self._writes = 0
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._open(durable)
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.Error | UnicodeDecodeError):
                raise ValueError(f"journal {self.path} cannot be read ({error}): {_CURE}") from error
            raise

    def _open(self, durable: bool) -> None:
        found = self._db.execute("PRAGMA application_id").fetchone()[0]
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != _APPLICATION_ID and tables:
            raise ValueError(f"{self.path} is a database of another program, no journal: name another --journal")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        if not tables:
            self._db.executescript(_SCHEMA)
        for table in ("job", "records", "replies"):
            if "sum" not in [name for _, name, *_ in self._db.execute(f"PRAGMA table_info({table})")]:
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN sum BLOB")  # of an older release
        damage = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        first, last, number = self._db.execute("SELECT min(seq), max(seq), count(*) FROM records").fetchone()
        if damage != "ok" or (number and (first, last) != (1, number)):
            raise self._damaged(damage if damage != "ok" else "records are missing")
        self._seq, self._sum = number, b""
        found = self._db.execute("SELECT sum FROM records WHERE seq = ?", (number,)).fetchone()
        self._sum = (found[0] if found else None) or b""
        for request, time, body, total in self._db.execute("SELECT request, time, body, sum FROM replies"):
            if total is not None and total != _sum(request, time, body):
                raise self._damaged("a reply is not what was written")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"journal {self.path} is damaged ({reason}): {_CURE}")

    def job(self) -> dict[str, Any] | None:
        """Return what `create_job` wrote; None in a new journal. ValueError where it is damaged."""
        try:
            row = self._db.execute("SELECT time, body, sum FROM job").fetchone()
            if row is None:
                if self._seq:
                    raise self._damaged("the job is missing")
                return None
            if row[2] is not None and row[2] != _sum(row[0], row[1]):
                raise self._damaged("the job is not what was written")
            job: dict[str, Any] = json.loads(row[1])
        except (sqlite3.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._damaged(f"its job, {error!r}") from error
        return job

    def records(self) -> Iterator[tuple[float, Record]]:
        """Yield (time, record) from the first to the last. ValueError where one cannot be understood, or is not what
        was written.
        """
        seq, before = 0, b""
        rows = self._db.execute("SELECT seq, time, kind, body, sum FROM records ORDER BY seq")
        try:
            for seq, time, kind, body, total in rows:
                if total != _sum(before, seq, time, kind, body) and (total is not None or before):
                    raise self._damaged(f"record {seq} is not what was written")
                before = total or b""
                yield time, from_row(kind, json.loads(body))
        except (sqlite3.Error, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise self._damaged(f"record {seq}, {error!r}") from error

    def rows(self, after: int, limit: int) -> list[dict[str, Any]]:
        """Return up to `limit` records after number `after`, as they stand in the file; for audits."""
        found = self._db.execute(
            "SELECT seq, time, kind, body FROM records WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit)
        )
        return [{"seq": seq, "time": time, "kind": kind, "body": json.loads(body)} for seq, time, kind, body in found]

    def reply(self, request: str) -> dict[str, Any] | None:
        """Return the reply to a request that was carried out; None where it was not."""
        row = self._db.execute("SELECT body FROM replies WHERE request = ?", (request,)).fetchone()
        reply: dict[str, Any] | None = json.loads(row[0]) if row else None
        return reply

    def write(
        self,
        records: Sequence[Record],
        time: float,
        request: str | None = None,
        reply: Any = None,
        job: dict[str, Any] | None = None,
    ) -> None:
        """Write everything in one transaction, or nothing, and raise `Unwritable`."""
        rows, last = [], self._sum
        for seq, (kind, body) in enumerate(map(to_row, records), self._seq + 1):
            text = json.dumps(body)
            last = _sum(last, seq, float(time), kind, text)
            rows.append((seq, time, kind, text, last))
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if job is not None:
                text = json.dumps(job)
                self._db.execute("INSERT INTO job VALUES (1, ?, ?, ?)", (time, text, _sum(float(time), text)))
            self._db.executemany("INSERT INTO records (seq, time, kind, body, sum) VALUES (?, ?, ?, ?, ?)", rows)
            if request is not None:
                text = json.dumps(reply)
                self._db.execute(
                    "INSERT INTO replies (request, time, body, sum) VALUES (?, ?, ?, ?)",
                    (request, time, text, _sum(request, float(time), text)),
                )
                if self._writes % _PRUNE_EVERY == 0:
                    self._db.execute(
                        "DELETE FROM replies WHERE number <= (SELECT max(number) FROM replies) - ?", (KEPT_REPLIES,)
                    )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise Unwritable(
                f"journal {self.path} cannot be written ({error}): nothing was done; free space there"
            ) from error
        self._writes += 1
        self._seq, self._sum = self._seq + len(rows), last

    def close(self) -> None:
        """Release the journal, so that another coordinator can have it."""
        self._db.close()
        os.close(self._lock)


_CURE = "restore it from a copy, or name another --journal to begin anew"


def _sum(*values: bytes | str | float) -> bytes:
    """Return 8 bytes that tell these values from others."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).digest()


def _lock(path: Path) -> int:
    """Lock a file beside the journal, which names its owner. The lock ends with the process, however it ends."""
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ValueError(
            f"journal {path} is in use by another coordinator ({owner}): stop that one, or name another --journal"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return lock
