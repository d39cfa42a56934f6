"""Which version of the model answers: load, warm up, check the smoke sample, and only then serve it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from gmeta.data.schema import data_schema_from_json
from gmeta.meta.recorded import Programs
from gmeta.models.registry import is_foreign, source_hash
from gmeta.recommender.next_items import NextItems
from gmeta.recommender.recommender import Recommender, load
from gmeta.recommender.smoke import check_smoke
from gmeta.recommender.tasks import TaskState, state_without_support
from gmeta.runs.bundle import MANIFEST, read_manifest
from gmeta.runs.directory import read_schema
from gmeta.runs.registry import Registry
from gmeta.serving.metrics import Metrics
from gmeta.serving.refusal import Declined
from gmeta.serving.wire import Columns

_AGAIN_S = 60.0
"""Seconds after which a version that was refused is tried again: its files may have been mended."""


class Source(Protocol):
    """Where versions come from."""

    def poll(self) -> tuple[str, Path] | None:
        """Return what is to be served now: a mark that changes with it, and its bundle; None where there is nothing.

        ValueError or OSError where the place cannot be read.
        """


class FolderSource:
    """A bundle in a folder, or a link to one, that another takes the place of."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def poll(self) -> tuple[str, Path] | None:
        """Return what tells one manifest from another, and the folder that a link leads to."""
        path = self._path.resolve()
        manifest = read_manifest(path)
        return f"{manifest['xxh3']} {path} {(path / MANIFEST).stat().st_mtime_ns}", path


class RegistrySource:
    """The current version of a registry, or the one that is pinned; fetched into `cache`."""

    def __init__(self, registry: Registry, cache: Path, pin: int | None) -> None:
        self._registry, self._cache, self._pin = registry, cache, pin
        self._fetched: tuple[int, Path] | None = None  # to fetch means to verify every byte

    def poll(self) -> tuple[str, Path] | None:
        """Return the version's number and its local folder."""
        number = self._pin
        if number is None:
            pointer = self._registry.current()
            number = None if pointer is None else pointer.version
        if number is None:
            return None
        if self._fetched is None or self._fetched[0] != number:
            self._fetched = (number, self._registry.fetch(number, self._cache, training=False))
        return str(number), self._fetched[1]


@dataclass(frozen=True)
class Scorer:
    """What scores examples."""

    rec: Recommender
    nothing: TaskState  # of a task of which nothing is known
    columns: Columns


@dataclass(frozen=True)
class Version:
    """A version that is ready to answer: it scores examples, or finds next items."""

    id: str
    model: Scorer | NextItems
    manifest: dict[str, Any]
    since: float

    @property
    def scorer(self) -> Scorer:
        """Return what scores. Raises `Declined` where the version finds next items."""
        if isinstance(self.model, NextItems):
            reason = "the version that serves finds next items and scores no examples: ask POST /v1/recommend"
            raise Declined(404, "scores_nothing", reason)
        return self.model

    @property
    def next_items(self) -> NextItems:
        """Return what finds next items. Raises `Declined` where the version scores examples."""
        if isinstance(self.model, Scorer):
            reason = "the version that serves scores examples and finds no next items: ask POST /v1/score"
            raise Declined(404, "finds_nothing", reason)
        return self.model

    @property
    def rec(self) -> Recommender:
        """Return the model that scores."""
        return self.scorer.rec

    @property
    def nothing(self) -> TaskState:
        """Return the state of a task of which nothing is known."""
        return self.scorer.nothing

    @property
    def columns(self) -> Columns:
        """Return the columns that requests have."""
        return self.scorer.columns


def open_version(
    programs: Programs,
    note: Callable[[str], None],
    path: Path,
    *,
    trust_model: bool,
    device: Literal["auto", "cpu", "cuda"],
    trusted: dict[str, Any] | None = None,
) -> Version:
    """Load a bundle, warm it up, and check the scores that it carries of its smoke sample.

    `programs` are those of the versions before, and `note` is told why passes cannot be recorded, if they cannot.
    `trusted` is the `model` entry of the version that was trusted first: another model, or other code, is refused.
    ValueError for what is damaged, not trusted, or scores otherwise than where it was made.
    """
    manifest = read_manifest(path)
    model = manifest["model"]
    if trusted is not None and model != trusted:
        raise ValueError(
            f"{path} has the model {model.get('name')} of source {model.get('source')}, this server trusts "
            f"{trusted.get('name')} of source {trusted.get('source')}: start it anew with that version"
        )
    schema, data_schema = read_schema(path)
    open_model = NextItems.open if schema.next_item else load
    rec = open_model(path, trust_model=trust_model, device=device, mapped=True)
    if is_foreign(model["name"]) and source_hash(model["name"]) != model["source"]:
        raise ValueError(
            f"the code of {model['name']} that is installed here is not what {path} was made with: install that, or "
            "make the bundle again"
        )
    check_smoke(rec)
    if isinstance(rec, NextItems):
        rec.shelves(None, "domain")  # which computes the vectors of all items
        return Version(str(manifest["id"]), rec, manifest, time.time())
    nothing = state_without_support(rec)
    rec.record(programs, note)
    scorer = Scorer(rec, nothing, Columns.of(data_schema_from_json(data_schema)))
    return Version(str(manifest["id"]), scorer, manifest, time.time())


class Versions:
    """The version that answers, and the shadow beside it."""

    def __init__(
        self,
        source: Source,
        metrics: Metrics,
        *,
        trust_model: bool,
        device: Literal["auto", "cpu", "cuda"],
        shadow: Path | None = None,
    ) -> None:
        self._source, self._metrics = source, metrics
        self._open = partial(open_version, Programs(), metrics.note, trust_model=trust_model, device=device)
        found = source.poll()
        if found is None:
            raise ValueError("there is no version to serve yet: publish one, then start the server")
        self._mark, path = found
        self._refused, self._again = "", 0.0  # the mark that was refused, and when to try it again
        self.current = self._open(path)
        self._trusted = self.current.manifest["model"]
        self.shadow = None if shadow is None else self._open(shadow, trusted=self._trusted)
        self._count()

    @property
    def names(self) -> list[str]:
        """Return the versions that a request may name."""
        return [self.current.id, *([] if self.shadow is None else [self.shadow.id])]

    @property
    def task(self) -> str:
        """Return the task column."""
        return self.current.columns.task

    def find(self, name: str) -> Version | None:
        """Return a version by name, None for one that is not served."""
        return next((v for v in (self.current, self.shadow) if v is not None and v.id == name), None)

    def refresh(self) -> bool:
        """Look for a new version and take it up; where it cannot be served, stay and say so.

        Return whether the version changed.
        """
        try:
            found = self._source.poll()
        except (ValueError, OSError) as error:
            self._say(f"cannot look for a new version ({error}); {self.current.id} goes on serving")
            return False
        if found is None or found[0] == self._mark:
            return False
        if found[0] == self._refused and time.monotonic() < self._again:
            return False
        mark, path = found
        try:
            version = self._open(path, trusted=self._trusted)
        except (ValueError, OSError) as error:
            self._refused, self._again = mark, time.monotonic() + _AGAIN_S
            self._metrics.count_reload("refused")
            self._say(f"refused a new version ({error}); {self.current.id} goes on serving")
            return False
        self._mark, self._refused, self.current = mark, "", version
        self._count()
        self._metrics.note(f"serves {version.id}")
        return True

    _said = ""

    def _say(self, sentence: str) -> None:
        """Note what is wrong, once."""
        if sentence != self._said:
            self._said = sentence
            self._metrics.note(sentence)

    def _count(self) -> None:
        interval = self.current.manifest.get("interval") or [None, None]
        last = interval[1]
        self._metrics.count_reload("served", trained_until=None if last is None else last / 1e6)
