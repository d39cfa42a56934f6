"""The tracks of the benchmark: which models are trained on which pack, with which settings.

Rates and passes were chosen on the valid rows of a clone (docs/antm2c.md); real files deserve their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gmeta.benchmark.cells import Cell
from gmeta.config.benchmark import BenchmarkConfig
from gmeta.data.antm2c.published import SCENES

SCENARIOS, INPUTS, TOWERS, NEW_USERS, NEW_SCENE = "scenarios", "inputs", "towers", "new_users", "new_scene"
POOLED = ("dnn", "deepfm", "dcn", "dlrm")
"""Models that know a scene as a feature, of all scenes' rows together; `dnn` is gmeta's melu, which adapts nothing."""
SEPARATE = ("dnn", "deepfm", "dcn")
"""Those that are trained for every scene by itself too."""
GATES = "pepnet over dlrm"
"""`pepnet` whose layers read what the top of `dlrm` reads, made of scaled inputs; the model whose inputs vary."""
MANY = ("shared_bottom", "mmoe", "ple", "star", "pepnet", "hamur", GATES)
"""Models with parts for scenes."""
ADAPTED = "adapted"
"""Every task solves a Bayesian last layer over learned vectors of its rows (`neural_linear`)."""
NEGOTIATED = "dlrm negotiated"
"""`dlrm` whose batches go scene by scene, with half of the way of each round kept (MAMDR's domain negotiation)."""
SHARED = "dlrm without user_scene"
"""`dlrm` in which a user has one row for all scenes."""
KNOWN = (100, 1000, 10_000)
"""Rows that are known of a new scene, besides none."""
BASE = "dlrm"
"""What others are held against where users or a scene are new."""
BEGUN = (BASE, GATES, NEGOTIATED)
"""What is fine-tuned to a new scene."""

KEPT = "kept vectors"
TRAINED = {
    KEPT: ("none", "0.003"),
    "kept vectors at a low rate": ("none", "0.0003"),
    "upper layers by lora": ("lora", "0.003"),
    "upper layers": ("full", "0.0003"),
}
"""What of the encoder is trained in track towers, and the rate of all layers."""

IDS = ("user_id", "user_scene", "item_id", "scene")
OF_USERS = ("user_id", "user_scene")
"""A user, and a user in a scene, whose row is the user's taste of it. A task that solves a last layer is that row."""
TEXTS = ("item_title", "bill_entity_seq", "service_entity_seq", "query_entity_seq")
IMAGES = ("image", "has_image")
_PLAIN = (
    *("--meta.adapt", "[]", "--loader.episode_rows", "8", "--loader.tasks_per_batch", "256"),
    *("--embedding.lr", "0.2", "--embedding.id_dropout", "0.2", "--dense.lr", "0.003", "--model.embedding_dim", "6"),
)
_SOLVED = (
    *("--meta.adapt", "[last_layer]", "--loader.episode_rows", "16", "--loader.tasks_per_batch", "128"),
    *("--embedding.lr", "0.1", "--embedding.init_std", "0.1", "--dense.lr", "0.005", "--model.embedding_dim", "9"),
    *("--dense.decay", "linear"),
)
_NEGOTIATION = ("--meta.negotiation", "0.5")
_FEW = ("--schedule.epochs", "3", "--loader.episode_rows", "8", "--loader.tasks_per_batch", "32")
FINE_TUNED = {
    "fine-tuned": ("--embedding.lr", "0.05", "--dense.lr", "0.001"),
    "fine-tuned gently": ("--embedding.lr", "0.01", "--dense.lr", "0.0001"),
}
"""Few rows have no valid rows to choose rates by, so that there are two pairs."""
_BY_VALID = ("--schedule.metric", "auc")
EPOCHS, SOLVED_EPOCHS = 5, 3
"""Passes, of those that solve a last layer fewer: at rates that do not fall they learned users by heart in one."""


class Tracks:
    """What the cells of one benchmark are."""

    def __init__(self, config: BenchmarkConfig, known: dict[int, int]) -> None:
        self.config = config
        self.scenes = [scene for scene in range(SCENES) if known.get(scene)]
        self.known = known
        self.images = IMAGES if config.images else ()
        self.end = self._end(EPOCHS)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells, those of the first seed first; a cell comes after those that it needs."""
        for seed in range(1 if self.config.quick else self.config.seeds):
            yield from self._scenarios(seed)
            yield from self._inputs(seed)
            yield from self._towers(seed)
            yield from self._new_users(seed)
            for scene in self.scenes[:1] if self.config.quick else self.scenes:
                yield from self._new_scene(seed, scene)

    def rows_of(self, scene: int) -> tuple[int, ...]:
        """Return the numbers of known rows of a new scene: of `KNOWN` those that it has."""
        return tuple(number for number in KNOWN if number <= self.known[scene])

    def _end(self, epochs: int) -> tuple[str, ...]:
        return ("--schedule.max_steps", "20") if self.config.quick else ("--schedule.epochs", str(epochs))

    def _scenarios(self, seed: int) -> Iterator[Cell]:
        for model in (*POOLED, *MANY):
            yield Cell(SCENARIOS, model, seed, "all", self._plain(model))
        solved = self._solved(("user_id", "scene", "bill_entity_seq", "service_entity_seq", "query_entity_seq"))
        yield Cell(SCENARIOS, ADAPTED, seed, "in_scenes", solved)
        yield Cell(SCENARIOS, SHARED, seed, "all", self._plain(BASE, without=("user_scene",)))
        yield Cell(SCENARIOS, NEGOTIATED, seed, "in_scenes", (*self._plain(BASE), *_NEGOTIATION))
        for model in SEPARATE:
            for scene in self.scenes:
                alone = self._plain(model, without=("user_scene",))  # of one scene, that is the user again
                yield Cell(SCENARIOS, f"{model}, scene {scene}", seed, f"scene_{scene}", alone)

    def _inputs(self, seed: int) -> Iterator[Cell]:
        yield Cell(INPUTS, "ids", seed, "all", self._plain(GATES, texts={}, images=False))
        if self.images:
            yield Cell(INPUTS, "ids, texts", seed, "all", self._plain(GATES, images=False))
            yield Cell(INPUTS, "ids, images", seed, "all", self._plain(GATES, texts={}))

    def _towers(self, seed: int) -> Iterator[Cell]:
        for name, (tune, rate) in TRAINED.items():
            small = ("--loader.tasks_per_batch", "32", "--dense.lr", rate)  # of a twentieth of the rows
            words = (*self._plain(BASE, texts={**self._texts, "tune": tune}), *small)
            yield Cell(TOWERS, name, seed, "some_users", words)

    def _new_users(self, seed: int) -> Iterator[Cell]:
        yield Cell(NEW_USERS, BASE, seed, "new_users", self._plain(BASE, without=OF_USERS))
        yield Cell(NEW_USERS, GATES, seed, "new_users", self._plain(GATES, without=OF_USERS))
        solved = self._solved(("scene", "bill_entity_seq", "service_entity_seq", "query_entity_seq"), without=OF_USERS)
        yield Cell(NEW_USERS, ADAPTED, seed, "new_users", solved)

    def _new_scene(self, seed: int, scene: int) -> Iterator[Cell]:
        track, pack = f"{NEW_SCENE}_{scene}", f"new_{scene}"
        plain = Cell(track, BASE, seed, pack, self._plain(BASE))
        yield plain
        gates = Cell(track, GATES, seed, pack, self._plain(GATES))
        yield gates
        negotiated = Cell(track, NEGOTIATED, seed, pack, (*self._plain(BASE), *_NEGOTIATION))
        yield negotiated
        about = ("scene", "item_title", *self.images)
        yield Cell(track, ADAPTED, seed, pack, self._solved(about, without=("user_scene", "item_id")))
        for number in self.rows_of(scene):
            rows = f"known_{scene}_{number}"
            for begun in (plain, gates, negotiated):
                more = ("--meta.negotiation", "0") if begun is negotiated else ()  # of one scene
                for how, rates in FINE_TUNED.items():
                    name = f"{begun.variant} {how}, {number}"
                    yield Cell(track, name, seed, rows, (*_FEW, *rates, *more), begins=begun.name, valid=False)
            # a scenario's embedding is new, and so is all that has an id; layers and gates stay as they are
            still = (*_FEW, "--embedding.lr", "0.05", "--dense.lr", "0")
            for begun in (plain, gates):
                yield Cell(track, f"{begun.variant} rows, {number}", seed, rows, still, begins=begun.name, valid=False)
            words = (*self._plain(BASE), *_FEW, *FINE_TUNED["fine-tuned"])
            yield Cell(track, f"from scratch, {number}", seed, rows, words, valid=False)

    def _plain(
        self,
        model: str,
        *,
        without: Sequence[str] = (),
        texts: Mapping[str, Any] | None = None,
        images: bool = True,
    ) -> tuple[str, ...]:
        """Return the words of a training that adapts nothing; `texts` is how these are read, {} not at all."""
        texts = self._texts if texts is None else texts
        ids = [name for name in IDS if name not in without]
        features = [*ids, *(TEXTS if texts else ()), *(self.images if images else ())]
        return plain_words(model, features, "scene", texts or None, self.end)

    def _solved(self, about: Sequence[str], *, without: Sequence[str] = ("user_scene",)) -> tuple[str, ...]:
        """Return the words of a training whose tasks solve their last layer; `about` says what a task is."""
        features = [name for name in (*IDS, *TEXTS, *self.images) if name not in without]
        lists = [name for name in about if name in TEXTS]
        told = [name for name in about if name not in TEXTS] + [f"text of {name}" for name in lists]
        args: dict[str, Any] = {"task_features": told, "hidden": [64], "dropout": 0.1}
        if "item_id" in without:
            args["item"] = "user_id"  # rows of users are the bases of an item
        return (
            *_SOLVED,
            *self._end(SOLVED_EPOCHS),
            *_BY_VALID,
            "--model.features",
            _listed(features),
            *_beside("neural_linear", args, self._texts),
        )

    @property
    def _texts(self) -> dict[str, Any]:
        """Return how `with_texts` reads texts."""
        return {"encoder": self.config.encoder, "layers": self.config.layers, "target": TEXTS[0], "lists": TEXTS[1:]}


def plain_words(
    model: str, features: Sequence[str], scenario: str, texts: Mapping[str, Any] | None, end: Sequence[str]
) -> tuple[str, ...]:
    """Return the words of a training that adapts nothing: a model of `features`, beside `texts` where there are some,
    which ends as `end` says. The first features are ids; gates of layers are made of those but the scenario.
    """
    words = (*_PLAIN, *end, *_BY_VALID, "--model.features", _listed(features))
    # the paper's gates of layers are made of who and what
    ids = list(features[: features.index(scenario)])
    args: dict[str, Any] = {"personal": ids} if model in ("pepnet", GATES) else {}
    if model in ("dlrm", GATES):
        args |= {"bottom": [64], "hidden": []}  # which weigh products: layers over these learn less (decision 284)
    name = {"dnn": "melu", GATES: "pepnet"}.get(model, model)
    if texts is None:
        return (*words, "--model.name", name, *(("--model.args", json.dumps(args)) if args else ()))
    return (*words, *_beside(name, args, texts))


def _beside(model: str, args: Mapping[str, Any], texts: Mapping[str, Any]) -> tuple[str, ...]:
    return ("--model.name", "with_texts", "--model.args", json.dumps({"model": model, "args": args, **texts}))


def _listed(names: Sequence[str]) -> str:
    return f"[{','.join(names)}]"
