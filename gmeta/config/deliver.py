"""Settings of `gmeta deliver`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gmeta.core.errors import require, require_numbers


@dataclass(frozen=True, kw_only=True)
class DeliverConfig:
    """Make the next version of a registry's model from new rows: prepare, warm start, bundle, gate, publish."""

    registry: str
    """Registry of the model: a folder, or a prefix of an object store such as s3://bucket/model."""
    input: list[str] | str
    """The new rows: Parquet or CSV file, glob or directory, or a list of them."""
    schema: str | None = None
    """YAML file that says what the columns mean, for the registry's first version and for full ones; a day has that of
    the current version."""
    events: str | None = None
    """YAML file that makes the new rows events of next items, in place of `schema`."""
    prepare_with: dict[str, Any] = field(default_factory=dict)
    """Settings of `gmeta prepare`, such as {query_size: 5}."""
    train_with: dict[str, Any] = field(default_factory=dict)
    """Settings of `gmeta train`, such as {schedule: {epochs: 2}}. What is left out is as the current version's, and of
    a first version as a recipe chooses."""
    checkpoint: Literal["best", "last"] | None = None
    """Checkpoint that becomes the version. Unset: the best of a first or full version, and the last of a day, whose few
    valid tasks do not tell one validation from another."""
    rules: str | None = None
    """YAML file with the rules of the gate; its own when unset."""
    full: bool = False
    """Train anew on the input alone, which then holds all rows, instead of going on from the current version: ids of
    evicted values are used again, and means and deviations are those of the input."""
    nproc: int = 1
    """Processes that train on this machine. train_with {elastic: {enabled: true}} makes them an elastic group."""
    work: str = "deliveries"
    """Folder of what is being made. The same command goes on with a delivery that was stopped."""
    keep: bool = False
    """Keep pack, run and bundle when the version is published, and not only of one that was refused."""
    trust_model: bool = False
    """Import the code of a model that is not gmeta's own; without it such a version is refused."""

    @property
    def inputs(self) -> list[str]:
        """Return `input` as a list."""
        return [self.input] if isinstance(self.input, str) else self.input

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.nproc >= 1, "nproc", self.nproc, "must be at least 1")
        both = self.schema is not None and self.events is not None
        require(not both, "events", self.events, "rows have a schema, or are events: leave one of the two out")
        own = {
            "prepare_with": ("base", "input", "out", "schema", "events"),
            "train_with": ("warm_start", "pack", "run_dir", "resume"),
        }
        for section, keys in own.items():
            for key in keys:
                given = key in getattr(self, section)
                require(not given, f"{section}.{key}", getattr(self, section).get(key), "deliver sets it; leave it out")
