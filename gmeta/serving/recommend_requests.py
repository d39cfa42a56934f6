"""Requests for next items: what `POST /v1/recommend` reads, and one pass over those of several requests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmeta.data.events.raw_events import RawEvents
from gmeta.data.prepare.direct import text_of
from gmeta.recommender.next_items import NextItems
from gmeta.serving.metrics import Metrics
from gmeta.serving.passes import compute_or_refuse, run_by_version
from gmeta.serving.refusal import Declined
from gmeta.serving.versions import Version, Versions
from gmeta.serving.wire import RequestLimits, kind_of, refuse_unknown

_KNOWN = ("user", "events", "k", "domain")


class WantedItems(NamedTuple):
    """What a user of a request gets."""

    user: Any  # as it was given
    k: int
    domain: str | None  # None: k items of each domain


@dataclass(eq=False)
class RecommendJob:
    """What a request asks for, and the answer: a JSON object for each user."""

    users: list[WantedItems]
    events: RawEvents
    wanted_version: str | None = None  # None: the current one
    error: Declined | None = None
    version: str = ""
    found: list[dict[str, Any]] = field(default_factory=list)


def job_of_json(document: Mapping[str, Any], model: NextItems, limits: RequestLimits) -> RecommendJob:
    """Read the body of `/v1/recommend`. Raises `Declined` that names the field."""
    refuse_unknown(document, ("users", "version"), "the body")
    users, version = document.get("users"), document.get("version")
    if not isinstance(users, list) or not users:
        told = "empty" if users == [] else kind_of(users)
        raise Declined(422, "invalid_users", f"users is {told}: give a list of one user or more")
    if len(users) > limits.tasks:
        raise Declined(413, "too_many_users", f"{len(users)} users are more than {limits.tasks}: send them in parts")
    if version is not None and not isinstance(version, str):
        raise Declined(422, "invalid_version", f"version is {kind_of(version)}: give the name of a version")
    reader = _EventsOfUsers(model.columns.time is not None, limits)
    wanted = [reader.read(user, f"users[{place}]") for place, user in enumerate(users)]
    return RecommendJob(wanted, reader.events(), version)


class _EventsOfUsers:
    """Collects the events of the users of a body."""

    def __init__(self, has_time: bool, limits: RequestLimits) -> None:
        self._has_time, self._limits = has_time, limits
        self._num_users = 0
        self._user: list[int] = []
        self._item: list[str] = []
        self._domain: list[str | None] = []
        self._time: list[int | float] = []

    def read(self, given: Any, where: str) -> WantedItems:
        """Read a user with its events."""
        if not isinstance(given, dict):
            raise Declined(422, "invalid_users", f"{where} is {kind_of(given)}: it must be an object")
        refuse_unknown(given, _KNOWN, where)
        _text(given.get("user"), f"{where}.user")
        k, events, most = given.get("k", 10), given.get("events"), self._limits.values
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise Declined(422, "invalid_k", f"{where}.k is {k!r}: it must be a whole number in [1, {most}]")
        if k > most:
            raise Declined(413, "list_too_long", f"{where}.k is {k}: {most} are the most")
        domain = None if given.get("domain") is None else _text(given["domain"], f"{where}.domain")
        if not isinstance(events, list):
            raise Declined(422, "invalid_events", f"{where}.events is {kind_of(events)}: give a list of events")
        if len(self._user) + len(events) > self._limits.rows:
            reason = f"{where}: more than {self._limits.rows:,} events; send the users in parts"
            raise Declined(413, "too_many_events", reason)
        for place, event in enumerate(events):
            self._event(event, f"{where}.events[{place}]")
        self._num_users += 1
        return WantedItems(given["user"], k, domain)

    def events(self) -> RawEvents:
        """Return all events."""
        users = [str(number) for number in range(self._num_users)]  # no two users are taken for one
        nothing: list[str | None] = [None] * len(self._item)
        # as they are: beside a fraction whole numbers beyond 2**53 would be rounded
        time: NDArray[Any] | None = np.array(self._time, object) if self._has_time else None
        return RawEvents(users, np.array(self._user, np.int64), self._item, self._domain, nothing, time)

    def _event(self, event: Any, where: str) -> None:
        if not isinstance(event, dict):
            raise Declined(422, "invalid_events", f"{where} is {kind_of(event)}: it must be an object")
        refuse_unknown(event, ("item", "domain", "time"), where)
        self._user.append(self._num_users)
        self._item.append(_text(event.get("item"), f"{where}.item"))
        domain = event.get("domain")
        self._domain.append(None if domain is None else _text(domain, f"{where}.domain"))
        time = event.get("time")
        if self._has_time:
            if isinstance(time, bool) or not isinstance(time, int | float) or not _fits(time):
                number = isinstance(time, int | float) and not isinstance(time, bool)
                told = f"{time!r}, which 64 bits do not hold" if number else kind_of(time)
                reason = f"{where}.time is {told}: give a number, by which a user's events are ordered"
                raise Declined(422, "invalid_time", reason)
            self._time.append(time)
        elif time is not None:
            reason = f"{where} has a time, and the run's events had none: leave it out, and give events in their order"
            raise Declined(422, "invalid_time", reason)


def _fits(time: float) -> bool:
    return abs(time) < 2**63 if isinstance(time, int) else math.isfinite(time)


def _text(value: Any, where: str) -> str:
    """Return an id in its one form."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Declined(422, "invalid_value", f"{where} is {kind_of(value)}: give a text or a whole number")
    text = text_of(str(value))
    if isinstance(text, int):
        raise Declined(422, "invalid_value", f"{where} is {value!r}, which is no id: give its own")
    return text


class Recommending:
    """Computes jobs, one pass at a time."""

    def __init__(self, versions: Versions, metrics: Metrics) -> None:
        self._versions, self._metrics = versions, metrics

    def run(self, jobs: Sequence[RecommendJob]) -> None:
        """Compute jobs; each has its answer or its error then."""
        run_by_version(jobs, self._versions, lambda job: job.wanted_version, self._compute)

    def _compute(self, version: Version, jobs: Sequence[RecommendJob]) -> None:
        def timed(some: Sequence[RecommendJob]) -> None:
            with self._metrics.timed("score"):
                _pass(version, some)

        compute_or_refuse(jobs, timed, self._metrics)
        answered = [job for job in jobs if job.error is None]
        self._metrics.count_events(
            sum(len(job.events.item) for job in answered),
            sum(user["unknown_events"] for job in answered for user in job.found),
        )


def _pass(version: Version, jobs: Sequence[RecommendJob]) -> None:
    """Find the items of the users of all jobs, those of one kind of times together."""
    events = _joined([job.events for job in jobs])
    wanted = [user for job in jobs for user in job.users]
    answers: list[dict[str, Any]] = [{}] * len(wanted)
    for users, some in _by_kind_of_time(events):
        found = _found(version.next_items, some, [wanted[user] for user in users], users)
        for user, answer in zip(users, found, strict=True):
            answers[user] = answer
    start = 0
    for job in jobs:
        job.found = answers[start : start + len(job.users)]
        job.version = version.id
        start += len(job.users)


def _by_kind_of_time(events: RawEvents) -> Iterator[tuple[list[int], RawEvents]]:
    """Yield positions of users and their events: of those whose times are all whole numbers, then of the others."""
    if events.time is None:
        yield list(range(len(events.users))), events
        return
    fractions = np.array([not _is_whole(time) for time in events.time.tolist()], bool)
    fractional = np.bincount(events.user, fractions, len(events.users)) > 0
    for kind, dtype in ((False, np.int64), (True, np.float64)):
        users = np.flatnonzero(fractional == kind)
        if len(users) == len(events.users):  # nearly always all are of one kind, and nothing is parted
            yield users.tolist(), replace(events, time=events.time.astype(dtype))
        elif len(users):
            at = np.flatnonzero(fractional[events.user] == kind)
            places = at.tolist()
            time: NDArray[Any] = events.time[at].astype(dtype)
            part = replace(
                events,
                users=[events.users[user] for user in users.tolist()],
                user=np.searchsorted(users, events.user[at]),
                item=[events.item[place] for place in places],
                domain=[events.domain[place] for place in places],
                text=[events.text[place] for place in places],
                time=time,
            )
            yield users.tolist(), part


def _is_whole(time: float) -> bool:
    return isinstance(time, int) or (time.is_integer() and abs(time) < 2**63)


def _found(
    model: NextItems, events: RawEvents, wanted: Sequence[WantedItems], places_of: Sequence[int]
) -> list[dict[str, Any]]:
    """Find the items of users, those of one domain together. `places_of` are the users' places in the pass."""
    histories = model.encode(events)
    given = np.bincount(events.user, minlength=len(wanted))
    answers: list[dict[str, Any]] = [
        {"user": user.user, "known_events": known, "unknown_events": total - known, "items": []}
        for user, known, total in zip(wanted, histories.length.tolist(), given.tolist(), strict=True)
    ]
    for domain in dict.fromkeys(user.domain for user in wanted):
        try:
            shelves = model.shelves(domain, "domain")
        except ValueError as error:
            first = next(place for place, user in enumerate(wanted) if user.domain == domain)
            raise ValueError(
                f"users[{places_of[first]}].{error}"
            ) from None  # the place is that of a request which is computed alone
        mine = np.array([user.domain == domain for user in wanted]) & (histories.length > 0)
        places = np.flatnonzero(mine).tolist()
        if not places:
            continue
        some = histories.where(mine)
        best = model.best(some, max(wanted[place].k for place in places), shelves)
        found = model.table_of(best, list(map(str, places))).to_pydict()
        columns = [name for name in ("item", "domain", "score") if name in found]
        for row, (place, rank) in enumerate(zip(map(int, found["user"]), found["rank"], strict=True)):
            if rank <= wanted[place].k:
                answers[place]["items"].append({name: found[name][row] for name in columns})
    return answers


def _joined(parts: Sequence[RawEvents]) -> RawEvents:
    """Return the events of all parts, whose users stay apart."""
    first = np.cumsum([0, *(len(part.users) for part in parts)])
    times = [part.time for part in parts if part.time is not None]
    return RawEvents(
        [user for part in parts for user in part.users],
        np.concatenate([part.user + start for part, start in zip(parts, first, strict=False)]),
        [item for part in parts for item in part.item],
        [domain for part in parts for domain in part.domain],
        [text for part in parts for text in part.text],
        np.concatenate(times) if times else None,
    )
