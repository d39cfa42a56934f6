"""The stages that make rows of events, each on a table of a few events."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from gmeta.data.events.audit import audit_events
from gmeta.data.events.catalogue import make_catalogue
from gmeta.data.events.core import keep_core
from gmeta.data.events.days import know_earlier
from gmeta.data.events.findings import audit_lines
from gmeta.data.events.hold_out import hold_out
from gmeta.data.sources import Connection


@pytest.fixture
def con() -> Iterator[Connection]:
    with duckdb.connect() as con:
        yield con


def put(con: Connection, lines: str) -> None:
    """Make table `events` of lines `user domain item item …`, where an item may have a time: `a@3`."""
    rows: list[dict[str, Any]] = []
    for line in lines.strip().splitlines():
        user, domain, *items = line.split()
        for item in items:
            name, _, time = item.partition("@")
            row = {"user": user, "item": name, "domain": domain.strip("-"), "time": int(time or 0), "file": 0}
            rows.append({**row, "row": len(rows) + 1})
    con.register("given", pa.Table.from_pylist(rows))
    con.execute("CREATE TABLE events AS FROM given; CREATE TABLE items (item VARCHAR, domain VARCHAR, text VARCHAR)")
    con.execute("CREATE TABLE texts (item VARCHAR, text VARCHAR, place INTEGER, count BIGINT)")
    know_earlier(con, None)


def tasks(con: Connection) -> dict[tuple[str, str], str]:
    """Partition and key -> the support, an arrow and the query."""
    found: dict[tuple[str, str], str] = {}
    rows = con.execute("SELECT partition, key, item, is_query FROM task_rows ORDER BY partition, key, position")
    for partition, key, item, is_query in rows.fetchall():
        before = found.get((partition, key), "")
        found[partition, key] = f"{before}{'-> ' if is_query else ''}{item} "
    return {at: text.strip() for at, text in found.items()}


# ------------------------------------------------------------------------------------------------- core


def test_a_core_is_taken_until_all_that_is_left_has_it(con: Connection) -> None:
    # d has two events until u3 goes, who has two until d and e go.
    put(con, "u1 - a b c\nu2 - a b c\nu3 - d e\nu4 - a d")
    assert keep_core(con, 2) == {"users": 2, "items": 2, "events": 4}
    left = con.execute('SELECT DISTINCT "user" FROM events ORDER BY ALL').fetchall()
    assert left == [("u1",), ("u2",)]


def test_a_core_is_joint_over_domains(con: Connection) -> None:
    put(con, "u1 A a b\nu1 B x\nu2 A a b\nu2 B x\nu3 A a b\nu3 B x")
    assert keep_core(con, 3)["events"] == 0, "in each domain alone users have too few"


def test_without_a_core_all_stay(con: Connection) -> None:
    put(con, "u1 - a")
    assert keep_core(con, 0) == keep_core(con, 1) == {"users": 0, "items": 0, "events": 0}


def test_a_core_that_nothing_has_is_refused(con: Connection) -> None:
    put(con, "u1 - a b\nu2 - b c")
    with pytest.raises(ValueError, match="core is 3: no user and item of 4 events has so many; lower it"):
        keep_core(con, 3)


# ------------------------------------------------------------------------- holding out and interleaving


def test_the_last_two_of_a_user_are_targets(con: Connection) -> None:
    put(con, "u - a b c d\nv - a b\nw - a")
    hold_out(con, "leave_one_out", has_time=False)
    assert tasks(con) == {
        ("train", "u"): "a -> b",
        ("valid", "u"): "a b -> c",
        ("test", "u"): "a b c -> d",
        ("train", "v"): "a -> b",
        ("train", "w"): "-> a",
    }
    assert con.execute("SELECT bool_and(time = position) FROM task_rows").fetchone() == (True,)


@pytest.mark.parametrize("has_time", [False, True])
def test_the_last_of_a_user_is_a_target_and_all_before_are_trained_on(con: Connection, has_time: bool) -> None:
    put(con, "u A a@1 b@2 c@3 d@4\nu B x@5 y@6 z@7\nv A a@1 b@2" if has_time else "u A a b c d\nu B x y z\nv A a b")
    hold_out(con, "leave_last_out", has_time=has_time)
    train = "a b c x -> y" if has_time else "a x b y -> c"  # by shares: 1/6, 1/4, 1/2, 3/4, 5/6
    assert tasks(con) == {
        ("train", "u"): train,
        ("test", "u|A"): ("" if has_time else "x y ") + "a b c -> d",
        ("test", "u|B"): "a b c x y -> z",
        ("train", "v"): "a -> b",
    }


def test_domains_are_interleaved_by_shares_and_a_target_follows_its_own(con: Connection) -> None:
    # A: a at 1/2. B: w, x, y, z at 1/8, 3/8, 5/8, 7/8. Two domains, so a target each.
    put(con, "u A a a2 a3\nu B w x y z b2 b3")
    hold_out(con, "leave_one_out", has_time=False)
    assert tasks(con) == {
        ("train", "u"): "w x a y -> z",
        ("valid", "u|A"): "w x y z a -> a2",
        ("test", "u|A"): "w x y z a a2 -> a3",
        ("valid", "u|B"): "a w x y z -> b2",
        ("test", "u|B"): "a w x y z b2 -> b3",
    }


def test_equal_shares_go_by_the_name_of_the_domain(con: Connection) -> None:
    # The only event of B and the middle one of A both stand at 1/2.
    put(con, "u B m b2 b3\nu A x y z a2 a3")
    hold_out(con, "leave_one_out", has_time=False)
    assert tasks(con)["train", "u"] == "x y m -> z"


def test_with_few_events_a_domain_has_no_target(con: Connection) -> None:
    put(con, "u A a b c\nu B x y")
    hold_out(con, "leave_one_out", has_time=False)
    assert tasks(con) == {
        ("train", "u"): "x a -> y",
        ("valid", "u|A"): "x y a -> b",
        ("test", "u|A"): "x y a b -> c",
    }


def test_times_order_events_and_nothing_later_is_in_a_history(con: Connection) -> None:
    put(con, "u A a3@9 a2@5 a1@1\nu B x@2 y@7 z@8 t@9 v@3")
    hold_out(con, "leave_one_out", has_time=True)
    assert tasks(con) == {
        ("train", "u"): "a1 x v -> y",
        ("valid", "u|A"): "a1 x v -> a2",
        ("test", "u|A"): "a1 x v a2 y -> a3",
        ("valid", "u|B"): "a1 x v y -> z",
        ("test", "u|B"): "a1 x v y z -> t",
    }


def test_equal_times_go_by_domain_then_by_place(con: Connection) -> None:
    put(con, "u B x@1 y@1 b2@5 b3@6\nu A a@1 b@1 a2@5 a3@6")
    hold_out(con, "leave_one_out", has_time=True)
    assert tasks(con)["train", "u"] == "a b x -> y"


def test_a_time_parts_the_splits(con: Connection) -> None:
    put(con, "u - a@1 b@2 c@10 d@12\nv - a@3 b@11 c@13\nw - d@14 a@15")
    hold_out(con, "10", has_time=True)
    assert tasks(con) == {
        ("train", "u"): "a -> b",
        ("train", "v"): "-> a",
        ("valid", "u#1"): "a b -> c",
        ("valid", "v#1"): "a -> b",
        ("valid", "u#2"): "a b c -> d",
        ("test", "v#1"): "a b -> c",
        ("test", "w#1"): "-> d",
        ("test", "w#2"): "d -> a",
    }


def test_a_date_is_a_time_in_the_unit_of_the_column(con: Connection) -> None:
    day = 86_400
    put(con, f"u - a@{1_700_000_000} b@{1_700_000_000 + 40 * day} c@{1_700_000_000 + 41 * day}")
    hold_out(con, "2023-12-01", has_time=True)
    assert tasks(con) == {("train", "u"): "-> a", ("valid", "u#1"): "a -> b", ("test", "u#1"): "a b -> c"}


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("time", "must be leave_one_out, leave_last_out, or the time from which on events are targets"),
        ("2023-12-01", "must be leave_one_out"),  # the column counts no unit of our days
        ("100", "name a time between the first, 1, and the last, 5"),
        ("0", "there are 3 events: name a time between"),
    ],
)
def test_a_time_that_is_none_is_refused(con: Connection, holdout: str, message: str) -> None:
    put(con, "u - a@1 b@2 c@5")
    with pytest.raises(ValueError, match=message):
        hold_out(con, holdout, has_time=True)


def test_a_time_needs_a_column(con: Connection) -> None:
    put(con, "u - a b c")
    with pytest.raises(ValueError, match=r"the events have no time: name its column in events\.yaml"):
        hold_out(con, "10", has_time=False)


def test_two_targets_are_never_one_task(con: Connection) -> None:
    put(con, "u|A B a b c\nu A|B d e f")
    with pytest.raises(ValueError, match=r"users 'u' and 'u\|A' would share the task 'u\|A\|B'"):
        hold_out(con, "leave_one_out", has_time=False)


def test_every_row_is_an_event_of_its_user_and_in_order(con: Connection) -> None:
    users = [f"u{i} {domain} " + " ".join(f"{domain}{(i * 7 + k) % 11}" for k in range(1 + (i + d) % 6))
             for i, (d, domain) in itertools.product(range(12), enumerate("ABC"))]  # fmt: skip
    put(con, "\n".join(users))
    hold_out(con, "leave_one_out", has_time=False)
    twice = "SELECT count(*) FROM (SELECT 1 FROM task_rows GROUP BY key, partition, position HAVING count(*) > 1)"
    strange = 'SELECT count(*) FROM (SELECT "user", item FROM task_rows EXCEPT SELECT "user", item FROM events)'
    queries = "SELECT count(*) FROM task_rows WHERE is_query"
    last = """SELECT count(*) FROM (SELECT 1 FROM task_rows GROUP BY key, partition
                                    HAVING max_by(is_query, position) AND count(*) FILTER (is_query) = 1)"""
    found = [con.execute(query).fetchone() for query in (twice, strange, queries, last)]
    groups = con.execute("SELECT count(DISTINCT (key, partition)) FROM task_rows").fetchone()
    assert found == [(0,), (0,), groups, groups]


# ------------------------------------------------------------------------------------------------ audit


def audited(con: Connection, lines: str, *, has_time: bool = False) -> tuple[dict[str, Any], str]:
    """The counts of an audit, and what is said of them."""
    put(con, lines)
    hold_out(con, "leave_one_out", has_time=has_time)
    make_catalogue(con, whole=True)
    found = audit_events(con, has_time=has_time, has_text=False)
    found["core"] = {"core": 0, "left_out": {}}
    return found, "\n".join(audit_lines({"audit": found}))


def test_an_audit_counts(con: Connection) -> None:
    found, told = audited(con, "u A a b c b\nu B x y\nv A a b new\nw A a\nt-new A b a new")
    assert (found["users"], found["items"], found["events"], found["catalogue"]) == (4, 6, 13, 6)
    assert found["users_by_domains"] == {"1": 3, "2": 1}
    assert found["users_of_one_event"] == 1
    assert found["repeated_events"] == 1
    assert found["targets"] == {"test": {"A": 3}, "valid": {"A": 3}}
    assert found["cold_targets"] == {"test": {"A": 2}, "valid": {"A": 1}}
    assert found["targets_in_history"] == {"test": 1}
    assert found["targets_in_user_id"] == {"test": 1}
    assert found["targets_of_new_users"] == {}
    assert "targets of test (cold: no training event has their item): A 3 (cold 2)" in told
    assert "WARNING: the user's id contains the id of the target in 1 of 3 targets of test" in told


def of_users(*, ascending: bool) -> str:
    """Sequences of 12 users whose items ascend by id, or do not."""
    items = [[f"i{(u * 5 + k * 3) % 20:02d}" for k in range(6)] for u in range(12)]
    return "\n".join(f"u{u} Toys {' '.join(sorted(row) if ascending else row)}" for u, row in enumerate(items))


def test_a_file_that_is_sorted_by_item_is_warned_of(con: Connection) -> None:
    found, told = audited(con, of_users(ascending=True))
    assert found["sorted_by_item"] == {"Toys": [12, 12]}
    assert told.startswith("WARNING: the events of Toys are sorted by item id, not by time: 12 of 12 sequences")


def test_so_is_one_that_is_sorted_by_number(con: Connection) -> None:
    _, told = audited(con, "\n".join(f"u{u} - 8 9 10 11 {12 + u}" for u in range(12)))
    assert told.startswith("WARNING: the events are sorted by item id, not by time: 12 of 12 sequences")


def test_a_file_in_another_order_is_not(con: Connection) -> None:
    found, told = audited(con, of_users(ascending=False))
    assert found["sorted_by_item"]["Toys"][1] == 12
    assert "WARNING" not in told


def test_nor_is_one_of_few_sequences(con: Connection) -> None:
    assert "WARNING" not in audited(con, "u - a b c d e\nv - b c d e f")[1]


def test_nor_is_one_with_times(con: Connection) -> None:
    """Ids of news ascend in time: there the order is known."""
    lines = "\n".join(f"u{u} - " + " ".join(f"n{k}@{k}" for k in range(5)) for u in range(12))
    assert "sorted_by_item" not in audited(con, lines, has_time=True)[0]


def test_but_one_whose_times_tell_nothing_is(con: Connection) -> None:
    """A log that says the day of its export for every event."""
    rows = of_users(ascending=True).splitlines()
    at_once = "\n".join(" ".join([*row.split()[:2], *(f"{item}@7" for item in row.split()[2:])]) for row in rows)
    found, told = audited(con, at_once, has_time=True)
    assert found["sorted_at_one_time"] == {"Toys": [12, 12]}
    assert told.startswith("WARNING: 12 sequences of Toys have one time for all of their events (4 or more), and 12")
