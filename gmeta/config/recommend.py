"""Settings of `gmeta recommend`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmeta.core.errors import require, require_numbers, require_size


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Recommend items to users by their events, with a run that finds next items."""

    run_dir: str
    """Run directory made by `gmeta train`, or a bundle."""
    events: list[str] | str
    """Files, directories or globs of the users' events (Parquet or CSV), with the columns that the events had which the
    run's pack was made of. Events of items that the run does not know are left out, unless it reads texts and the event
    has one."""
    out: str | None = None
    """Parquet file to write: user, rank, item, domain, score."""
    k: int = 10
    """Items for each user, of each domain."""
    users: list[str | int | float] | str | int | None = None
    """Users to recommend to: their ids, separated by commas or as a list, or a Parquet or CSV file with the column of
    users. All in the events when unset."""
    exclude_history: bool = True
    """Leave out the items that a user had already."""
    domain: str | None = None
    """Recommend items of this domain alone."""
    candidates: Literal["domain", "all"] = "domain"
    """domain: k items of every domain, whose scores were trained to be compared. all: k items over all domains."""
    items: str | None = None
    """File of items that the run was trained without (the columns item, domain and text of events): a model that reads
    texts can recommend them, and finds them in histories."""
    popular_for_unknown: bool = False
    """Give users without a known event the items that most training events have, without scores. They are left out
    otherwise."""
    item_vectors: str | None = None
    """Parquet file to write: item, domain and vector of all items."""
    user_vectors: str | None = None
    """Parquet file to write: user and vector of all users with a known event. A score is the product of two vectors."""
    index: Literal["exact", "faiss"] = "exact"
    """exact: compare with every item. faiss: with about a quarter of them, the nearest cells of an approximate index,
    which needs `pip install 'gmeta[faiss]'`; how much of the exact lists it finds is told."""
    checkpoint: str = "best"
    """Checkpoint to load: best, last, or a step number."""
    memory_limit: str = "2GB"
    """Memory that DuckDB may use before it spills to disk beside what is written."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own, as the run names it; without it such a run is refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    @property
    def inputs(self) -> list[str]:
        """Return what `events` names, as a list."""
        return [self.events] if isinstance(self.events, str) else list(self.events)

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.k >= 1, "k", self.k, "must be at least 1")
        require(bool(self.inputs), "events", self.events, "name the files of the users' events")
        files = {key: getattr(self, key) for key in ("out", "item_vectors", "user_vectors")}
        named = [name for name in files.values() if name is not None]
        if not named:
            raise ValueError("nothing is to be written: name a file with --out, --item_vectors or --user_vectors")
        for key, name in files.items():
            require(name is None or name.endswith(".parquet"), key, name, "must end in .parquet")
            require(name is None or named.count(name) == 1, key, name, "is written twice: name another file")
        require_size("memory_limit", self.memory_limit)
