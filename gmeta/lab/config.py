"""The configuration of `gmeta lab`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Run a scenario of slow workers and faults on this machine, by real training on emulated devices."""

    scenario: str
    """YAML file that says who is slow, and what is killed, stopped or cut off, when (docs/elastic.md)."""
    out: str
    """Folder to create: the run, what was done to it, result.json and report.html."""
    policy: str = "nd"
    """Who decides on stragglers: nd, dd, lb_bsp, backup, static, or one's own as module:function."""
    workers: int = 0
    """Workers; 0 is the scenario's number. Batch, devices and slow ranks grow in proportion."""
    steps: int = 0
    """Steps; 0 is the scenario's number."""
    compare: bool = False
    """Train undisturbed as well, and compare the weights."""
    max_restarts: int = 2
    """Slow workers that the policy may replace."""

    def __post_init__(self) -> None:
        for key in ("workers", "steps", "max_restarts"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}: must not be negative")
