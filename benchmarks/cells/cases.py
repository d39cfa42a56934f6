"""The cases of the quality benchmark; docs/quality.md has their protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from cells import raw
from cells.raw import Place, Views, Words

EARLY = ("--schedule.patience", 4)  # plain training ends when the valid metric no longer improves


@dataclass(frozen=True)
class Case:
    """Raw rows, the models trained on them, and what is measured; the first metric is the one compared."""

    name: str
    data: str  # in DATA; nothing where the case makes its own
    make: Callable[[Place], Views]
    models: dict[str, Words]  # model -> words of `gmeta train`; files are named from the root of the repository
    metrics: tuple[str, ...]
    plain: dict[str, Words] = field(default_factory=lambda: {"plain": EARLY})
    """Plain twin -> what it is trained with besides `meta.adapt: []`."""
    seeds: int = 5
    truth: bool = False  # the log is synthetic
    quick: bool = True  # takes part in --quick

    @property
    def loss(self) -> str:
        """Return the loss that means this kind of label."""
        return "l1" if "mae" in self.metrics else "bce"


def _example(name: str) -> Words:
    return "--config", f"examples/{name}.yaml"


CLICKS = ("auc", "gauc", "logloss")
DEFAULT: dict[str, Words] = {"default": ()}
"""What `gmeta train` does with a pack when nothing but the seed is set."""

CASES = (
    Case(
        name="ml-1m-melu/user_item_cold",
        data="ml-1m-subset",
        make=partial(raw.named, config="examples/ml-1m-melu-prepare.yaml", folder="ml-1m-subset"),
        models={
            "neural_linear": _example("ml-1m-melu-neural-linear"),
            "taste": _example("ml-1m-melu"),
            "melu": _example("ml-1m-melu-own-features"),
        },
        plain={"plain": EARLY, "plain-huber": ("--loss", "huber", *EARLY)},
        metrics=("mae",),
    ),
    Case(
        name="ml-100k/user_cold",
        data="ml-100k",
        make=partial(raw.named, config="examples/ml-100k-prepare.yaml", folder="ml-100k"),
        models={"neural_linear": _example("ml-100k-neural-linear"), "taste": _example("ml-100k")},
        metrics=CLICKS,
        seeds=10,
    ),
    Case(
        name="ml-1m-ads/new films",
        data="ml-1m-ads",
        make=raw.films,
        models={
            "neural_linear": _example("ml-1m-ads-neural-linear"),
            "melu": ("--config", "benchmarks/cells/ml-1m-ads-melu.yaml"),
        },
        metrics=CLICKS,
    ),
    Case(
        name="synthetic",
        data="",
        make=raw.synthetic,
        models=DEFAULT | {"taste": _example("demo")},
        metrics=CLICKS,
        truth=True,
    ),
    *(
        Case(
            name=f"ml-100k/defaults, {columns}",
            data="ml-100k",
            make=partial(raw.ratings, side=columns != "ids"),
            models=DEFAULT,
            metrics=CLICKS,
            seeds=10,
        )
        for columns in ("ids", "side features")
    ),
    *(
        Case(
            name=f"ml-100k/defaults, {users} users",
            data="ml-100k",
            make=partial(raw.few_ratings, users=users),
            models=DEFAULT,
            metrics=CLICKS,
            seeds=10,
            quick=users == 100,
        )
        for users in (100, 200, 400)
    ),
    *(
        Case(
            name=f"amazon/{domain.lower()}",
            data="amazon-3domain",
            make=partial(raw.shop, domain=domain),
            models=DEFAULT,
            metrics=CLICKS,
            quick=domain == "Beauty",
        )
        for domain in ("Beauty", "Toys")
    ),
)
"""Toys is looked at when all settings are fixed: `--quick`, which develops this benchmark, leaves it out."""
