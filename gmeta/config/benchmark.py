"""Settings of `gmeta benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, field

from gmeta.core.errors import require, require_numbers


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Train and measure all models on AntM2C's files, or a clone of them. The same command goes on after a stop.

    Tracks are scenarios (with new items as a slice of it), inputs (ids, texts, images), new_users and new_scene.
    """

    do: list[str] = field(default_factory=list)
    """What is measured: antm2c."""
    root: str
    """Directory with the log's files, as `gmeta prepare --dataset antm2c` reads them."""
    out: str
    """Folder to create, or to go on with: packs, cells, results.json, results.md and report.html."""
    encoder: str
    """Folder of the text encoder that makes vectors of titles and entities, once for each."""
    layers: int = 5
    """Its lower layers, whose states are kept as vectors."""
    images: str | None = None
    """Folder of vectors that `gmeta embed-images` made of the images. Unset: models read no images."""
    seeds: int = 3
    """Trainings of every cell, with seeds from 0 on."""
    cells: str = ""
    """Run only those cells whose names begin so, such as scenarios-pepnet; what is kept of others is told too."""
    resamples: int = 400
    """Bootstrap resamples (over users; in new_scene over items) of the confidence intervals."""
    quick: bool = False
    """One seed, 20 steps a training (three passes where it goes on from another), and one scene that is new: whether
    all of it runs, no more."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.do == ["antm2c"], "do", " ".join(self.do), "say what is measured: gmeta benchmark antm2c")
        require(self.seeds >= 1, "seeds", self.seeds, "must be at least 1")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
