"""A scenario: what goes wrong in a run, who is slow, when and how much, who is killed.

The laboratory slows workers down as it says, and the simulator computes with it. It is pure: slowness follows from the
scenario and its seed alone.

    workers: 4
    seed: 1
    steps: 1000
    tasks_per_batch: 64
    slot_s: 0.00625        # seconds that a worker of speed 1 computes for a task
    fixed_s: 0.0           # seconds that any micro-batch takes at all
    comm_s: 0.0            # seconds that a step's exchanges take
    noise: 0.0             # standard deviation of a step's compute seconds, as a fraction
    restart_s: 10.0        # seconds to end and start all workers
    checkpoint_steps: 100  # steps between checkpoints
    report_s: 0.1          # seconds between a worker's reports
    ahead: 3               # batches that are loaded ahead
    devices:
      - {name: fast, count: 2, speed: 2.0, max_slots: 32}
    events:
      - {kind: deterministic, rank: 0, factor: 2}
      - {kind: transient, ranks: [1, 2], factor: 3, share: 0.2, mean_steps: 50}    # or mean_s
      - {kind: persistent, rank: 3, factor: 3, from_step: 200, until: restart}     # or from_s; until: never
      - {kind: contention, rank: 0, from_s: 5, for_s: 20}    # a real burner on the worker's core; laboratory only
      - {kind: pause, rank: 0, at_s: 5, for_s: 3}            # SIGSTOP, SIGCONT
      - {kind: kill, who: rank 2, at_step: 300}              # or at_s; or coordinator, rank 2 + coordinator
      - {kind: cut, at_s: 5, for_s: 30}                      # no connection to the coordinator

Only `workers` and `steps` are required. Ranks that are not in `devices` have speed 1.
"""

from __future__ import annotations

import bisect
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import yaml

from gmeta.elastic.balance import Worker, balanced, proportional


@dataclass(frozen=True)
class Devices:
    """The next `count` ranks have devices of this kind."""

    name: str
    count: int
    speed: float = 1.0
    max_slots: int | None = None

    def __post_init__(self) -> None:
        _check(self.count >= 1, "count", self.count, "must be at least 1")
        _check(0 < self.speed < math.inf, "speed", self.speed, "must be more than 0")
        _check(self.max_slots is None or self.max_slots >= 1, "max_slots", self.max_slots, "must be at least 1")


@dataclass(frozen=True)
class Deterministic:
    """A rank is so many times slower, all the time, on any machine."""

    rank: int
    factor: float


@dataclass(frozen=True)
class Transient:
    """Each of the ranks is slower in random bursts of exponential length, for a fraction `share` of the time.

    Bursts are counted in steps (`mean_steps`), so that they are the same whatever a policy does, or in seconds
    (`mean_s`).
    """

    ranks: tuple[int, ...]
    factor: float
    share: float
    mean_steps: float | None = None
    mean_s: float | None = None

    def __post_init__(self) -> None:
        _check(0 < self.share < 1, "share", self.share, "must be between 0 and 1")
        mean = self.mean_steps if self.mean_s is None else self.mean_s
        _check((self.mean_steps is None) != (self.mean_s is None), "mean_steps", self.mean_steps, "or mean_s, not both")
        _check(mean is not None and mean > 0, "mean_steps or mean_s", mean, "must be more than 0")


@dataclass(frozen=True)
class Persistent:
    """A rank is slower from some time on: for ever, or until it is moved to a fresh machine."""

    rank: int
    factor: float
    from_s: float | None = None
    from_step: int | None = None
    until: str = "never"

    def __post_init__(self) -> None:
        _check(self.until in ("never", "restart"), "until", self.until, "must be restart or never")
        _one_of(self, "from_s", "from_step", needed=False)


@dataclass(frozen=True)
class Contention:
    """Something else computes on the rank's core. Only the laboratory has it: no model says how slow that makes the
    rank."""

    rank: int
    from_s: float = 0.0
    for_s: float | None = None


@dataclass(frozen=True)
class Pause:
    """A rank is stopped, and goes on."""

    rank: int
    at_s: float
    for_s: float


@dataclass(frozen=True)
class Kill:
    """A process gets SIGKILL, once. A coordinator is started again after `away_s`."""

    who: str
    at_s: float | None = None
    at_step: int | None = None
    away_s: float = 1.0

    def __post_init__(self) -> None:
        known = re.fullmatch(r"rank \d+|coordinator|rank \d+ \+ coordinator", self.who)
        _check(known is not None, "who", self.who, "must be rank N, coordinator, or rank N + coordinator")
        _one_of(self, "at_s", "at_step", needed=True)

    @property
    def rank(self) -> int | None:
        """Return the rank whose worker is killed; None where none is."""
        found = re.match(r"rank (\d+)", self.who)
        return int(found[1]) if found else None

    @property
    def coordinator(self) -> bool:
        """Whether the coordinator is killed."""
        return "coordinator" in self.who

    def due(self, step: int, time_s: float) -> bool:
        """Whether its time has come."""
        return time_s >= self.at_s if self.at_s is not None else step >= (self.at_step or 0)


@dataclass(frozen=True)
class Cut:
    """There is no connection between workers and coordinator."""

    at_s: float
    for_s: float


Event = Deterministic | Transient | Persistent | Contention | Pause | Kill | Cut
EVENT_KINDS: dict[str, type] = {
    kind.__name__.lower(): kind for kind in (Deterministic, Transient, Persistent, Contention, Pause, Kill, Cut)
}


@dataclass(frozen=True)
class Scenario:
    """A run and its troubles. Durations are in seconds."""

    workers: int
    steps: int
    seed: int = 0
    tasks_per_batch: int = 64
    slot_s: float = 0.00625
    fixed_s: float = 0.0
    comm_s: float = 0.0
    noise: float = 0.0
    restart_s: float = 10.0
    checkpoint_steps: int = 100
    report_s: float = 0.1
    ahead: int = 3
    devices: tuple[Devices, ...] = ()
    events: tuple[Event, ...] = ()
    _bursts: dict[tuple[int, int], list[float]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _slow: dict[int, list[tuple[int, Event]]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("workers", "steps", "tasks_per_batch", "checkpoint_steps", "ahead"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("fixed_s", "comm_s", "noise", "restart_s"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name in ("slot_s", "report_s"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "must be more than 0")
        counted = sum(device.count for device in self.devices)
        _check(counted <= self.workers, "devices", counted, f"must not be of more than {self.workers} workers")
        for event in self.events:
            for rank in _ranks(event):
                _check(0 <= rank < self.workers, "rank", rank, f"must be 0 to {self.workers - 1}")
            for name in ("factor", "from_s", "from_step", "at_s", "at_step", "for_s", "away_s"):
                value = getattr(event, name, None)
                _check(value is None or value >= 0, name, value, "must not be negative")
            _check(getattr(event, "factor", 1.0) > 0, "factor", getattr(event, "factor", 1.0), "must be more than 0")
        for number, event in enumerate(self.events):  # kept by rank, because every rank is asked for at every step
            if isinstance(event, Deterministic | Transient | Persistent):
                for rank in set(_ranks(event)):
                    self._slow.setdefault(rank, []).append((number, event))

    def device(self, rank: int) -> Devices | None:
        """Return the rank's kind of device; None where none is given."""
        for device in self.devices:
            if rank < device.count:
                return device
            rank -= device.count
        return None

    def slowdown(self, rank: int, *, step: int, time_s: float, incarnation: int = 0) -> float:
        """Return how many times longer than at speed 1 the rank takes to compute, its device included.

        `time_s` counts from the start of the run. `incarnation` counts the machines that the rank has had (a SIGKILL
        alone does not change it): `until: restart` ends with the first one.
        """
        device = self.device(rank) if self.devices else None
        factor = 1.0 / device.speed if device else 1.0
        for number, event in self._slow.get(rank, ()):
            if isinstance(event, Deterministic):
                factor *= event.factor
            elif isinstance(event, Persistent):
                begun = time_s >= event.from_s if event.from_s is not None else step >= (event.from_step or 0)
                factor *= event.factor if begun and (event.until == "never" or not incarnation) else 1.0
            elif isinstance(event, Transient):
                now = float(step) if event.mean_steps is not None else time_s
                factor *= event.factor if self._bursting(number, event, rank, now) else 1.0
        return factor

    def _bursting(self, number: int, event: Transient, rank: int, now: float) -> bool:
        """Whether a burst is on. `_bursts` holds when bursts begin and end, and is drawn as far as it was asked for."""
        mean = event.mean_steps if event.mean_steps is not None else event.mean_s
        assert mean is not None
        times = self._bursts.setdefault((number, rank), [])
        if not times or times[-1] <= now:
            draws = random.Random(f"{self.seed} {number} {rank}")
            quiet = mean * (1 - event.share) / event.share
            times[:] = [0.0 if draws.random() < event.share else draws.expovariate(1 / quiet)]
            while times[-1] <= 2 * now + mean:
                times.append(times[-1] + draws.expovariate(1 / (mean if len(times) % 2 else quiet)))
        return bisect.bisect_right(times, now) % 2 == 1

    def ideal_step_s(self, tasks: int, factors: Sequence[float]) -> float:
        """Return the seconds of a step of `tasks` with the best possible division among ranks that are so many times
        slower.
        """
        workers = [Worker(1 / (self.slot_s * factor), self.fixed_s * factor) for factor in factors]
        return max(w.seconds(n) for w, n in zip(workers, balanced(tasks, workers), strict=True))

    def scaled(self, workers: int) -> Scenario:
        """Return the same scenario for another number of workers: batch and devices in proportion, slow ranks
        repeated.
        """
        if workers == self.workers:
            return self
        counts = [device.count for device in self.devices]
        rest = self.workers - sum(counts)
        shares = proportional(workers, [*counts, rest]) if counts else []
        devices = tuple(replace(d, count=n) for d, n in zip(self.devices, shares, strict=False) if n)
        events: list[Event] = []
        for event in self.events:
            copies = [r + i for i in range(0, workers, self.workers) for r in _ranks(event) if r + i < workers]
            if isinstance(event, Transient):
                events += [replace(event, ranks=tuple(copies))] if copies else []
            elif isinstance(event, Deterministic | Persistent | Contention):
                events += [replace(event, rank=rank) for rank in copies]
            elif not _ranks(event) or copies:
                events.append(event)
        batch = max(1, round(self.tasks_per_batch * workers / self.workers))
        return replace(self, workers=workers, tasks_per_batch=batch, devices=devices, events=tuple(events))


def parse_scenario(text: str, where: str) -> Scenario:
    """Return a scenario from YAML; `where` names it in errors. ValueError says what is wrong, where, and what is
    expected.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML ({' '.join(str(error).split())}): correct it") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply: correct it") from None
    values = dict(_mapping(values, where))
    values["devices"] = tuple(
        _build(Devices, d, f"{where}, devices {i}") for i, d in enumerate(_list(values, "devices", where))
    )
    values["events"] = tuple(_event(e, f"{where}, event {i}") for i, e in enumerate(_list(values, "events", where)))
    found: Scenario = _build(Scenario, values, where)
    return found


def _event(values: Any, where: str) -> Event:
    values = dict(_mapping(values, where))
    kind = values.pop("kind", None)
    if kind not in EVENT_KINDS:
        raise ValueError(f"{where}: kind is {kind!r}: must be one of {', '.join(EVENT_KINDS)}")
    if isinstance(values.get("ranks"), list):
        values["ranks"] = tuple(values["ranks"])
    found: Event = _build(EVENT_KINDS[kind], values, f"{where} ({kind})")
    return found


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """Return `kind(**values)`, after a check that no key is unknown or missing and no value has another type."""
    known = {f.name: f for f in fields(kind) if not f.name.startswith("_")}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: unknown key {name}: must be one of {', '.join(known)}")
        expected = str(known[name].type)
        wrong = expected in _TYPES and (not isinstance(value, _TYPES[expected]) or isinstance(value, bool))
        if expected == "tuple[int, ...]":
            wrong = not (isinstance(value, tuple) and value and all(isinstance(rank, int) for rank in value))
        if wrong and expected.startswith("float") and isinstance(value, str) and _is_number(value):
            raise ValueError(f"{where}: {name} is {value}, which YAML takes for text: write {float(value):.17g}")
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{where}: {name} is {value!r}: must be {expected.replace('tuple[int, ...]', 'a list')}")
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing: give it")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} is {values!r}: must hold `key: value` lines")
    return values


def _list(values: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    found = values.get(key) or []
    if not isinstance(found, list):
        raise ValueError(f"{where}: {key} is {found!r}: must be a list")
    return found


def _ranks(event: Event) -> tuple[int, ...]:
    """Return the ranks that an event is about."""
    if isinstance(event, Transient):
        return event.ranks
    rank = getattr(event, "rank", None)
    return () if rank is None else (rank,)


def _one_of(event: Persistent | Kill, first: str, second: str, needed: bool) -> None:
    given = [name for name in (first, second) if getattr(event, name) is not None]
    if len(given) > 1 or (needed and not given):
        raise ValueError(f"{' and '.join(given) or 'nothing'} is given: must be {first} or {second}")


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise ValueError(f"{key} is {value!r}: {rule}")
