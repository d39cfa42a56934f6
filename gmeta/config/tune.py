"""Settings of `gmeta tune`, besides those of `gmeta train`."""

from __future__ import annotations

from dataclasses import dataclass

from gmeta.config.train import TrainConfig
from gmeta.core.errors import require, require_numbers


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Tune settings of `gmeta train` on the valid split, by successive halving; the same command goes on after a stop.
    All keys of `gmeta train` say what the trials share.
    """

    out: str
    """Directory to create or to go on with: the journal, a run directory for each trial and seed, and best.yaml."""
    train: TrainConfig
    """What all trials share."""
    space: str | None = None
    """YAML file that says which settings vary, and how; a small space for the model when unset. It is printed."""
    trials: int = 9
    """Settings to try: all that the space has, where these are no more, else as many drawn by the seed."""
    seeds: int = 2
    """Trainings of each trial, with seeds from `seed` on; the mean of their metrics ranks the trials."""
    budget_minutes: float = 30.0
    """Minutes of training, over all starts of the command, after which no more trials begin; the one that runs is
    finished. 0 only shows what would be tried."""

    baselines: bool = False
    """After the trials, tune factor-analysis on valid too, for as many minutes; into baselines.json, for `gmeta
    evaluate --baseline_settings`."""
    plain_run: str | None = None
    """With baselines: a run trained on this pack with `meta.adapt: []`; tunes plain-finetuned too, for as many minutes
    again."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.trials >= 1, "trials", self.trials, "must be at least 1")
        require(self.seeds >= 1, "seeds", self.seeds, "must be at least 1")
        require(self.budget_minutes >= 0, "budget_minutes", self.budget_minutes, "must not be negative")
        unused = self.plain_run is not None and not self.baselines
        require(not unused, "plain_run", self.plain_run, "has no effect without --baselines true")
        require(not self.train.elastic.enabled, "elastic.enabled", True, "trials are not elastic; leave it out")
        require(not self.train.resume, "resume", True, "tune goes on from what out holds by itself; leave it out")
