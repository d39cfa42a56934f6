"""From cells to leaderboards: one for each track, with intervals, and records of fixed names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.benchmark.cells import Cell, CellFolder
from gmeta.benchmark.measure import OfScenes, gain_of, measure_scenes, told
from gmeta.benchmark.packs import SOME_ROWS
from gmeta.benchmark.scored import AFTER, Scored, aligned, read_scored, rows_of_all
from gmeta.benchmark.tracks import (
    ADAPTED,
    BASE,
    BEGUN,
    FINE_TUNED,
    GATES,
    INPUTS,
    KEPT,
    MANY,
    NEGOTIATED,
    NEW_SCENE,
    NEW_USERS,
    POOLED,
    SCENARIOS,
    SEPARATE,
    SHARED,
    TOWERS,
)
from gmeta.data.pack import open_pack

KeptCells = Mapping[Cell, dict[str, Any]]
_METRICS = ("gauc", "logloss", "logloss_corrected", "calibration", "calibration_corrected")
_HEAD = ("GAUC", "log-loss", "corrected", "predicted / observed", "corrected")
NONE = "-"
_OF_REFERENCES = (
    "In italics: what the truth of the clone tells. prior is each scene's click rate; ids, ids+image, ids+text are all "
    "that can be learned of these, posterior of all inputs; oracle knows the tastes themselves."
)
_OF_TOWERS = (
    f"{BASE} of users who have about {SOME_ROWS:,} rows before test, and their rows of test: does it pay to train the "
    "encoder's layers above those that kept vectors are made by?"
)


@dataclass
class Board:
    """A leaderboard, the best first."""

    title: str
    about: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    points: list[tuple[str, float, float, float]] = field(default_factory=list)  # variant, AUC, its interval

    def markdown(self) -> str:
        """Return the board as Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", self.about, table, *self.notes])


def boards_of(
    folder: CellFolder, kept: KeptCells, reference: Mapping[str, Mapping[str, Any]], resamples: int
) -> list[Board]:
    """Return a board for each track that has cells. `reference` has AUCs of a clone's references, by name."""
    boards: list[Board] = []
    scored = _by_variant(folder, kept, SCENARIOS, "test")
    valid = _by_variant(folder, kept, SCENARIOS, "valid")
    if scored:
        boards += _scenarios(folder, kept, scored, valid, reference, resamples)
    inputs = _by_variant(folder, kept, INPUTS, "test")
    if inputs:
        if GATES in scored:
            inputs["all of these"] = scored[GATES]
        boards.append(_inputs(kept, inputs, reference, resamples))
    towers = _by_variant(folder, kept, TOWERS, "test")
    if towers:
        measured = measure_scenes(towers, _by_variant(folder, kept, TOWERS, "valid"), resamples)
        boards.append(_board("towers", "Trained towers", _OF_TOWERS, kept, TOWERS, measured, KEPT))
    users = _by_variant(folder, kept, NEW_USERS, "test")
    if users:
        of_valid = _by_variant(folder, kept, NEW_USERS, "valid")
        for found, split in ((users, "test"), (of_valid, "valid")):
            before = _by_variant(folder, kept, NEW_USERS, split, "before").get(ADAPTED)
            if before:
                found[f"{ADAPTED}, before"] = before
        boards.append(_new_users(kept, users, of_valid, resamples))
    scenes = sorted({cell.track for cell in kept if cell.track.startswith(NEW_SCENE)})
    if scenes:
        boards.append(_new_scene(folder, kept, scenes, resamples))
    return boards


def _by_variant(
    folder: CellFolder, kept: KeptCells, track: str, split: str, variant: str = AFTER
) -> dict[str, list[Scored]]:
    """Return variant -> rows of each seed; models of one scene each are joined where all scenes are there, which a
    model of all scenes tells.
    """
    found: dict[str, list[Scored]] = {}
    parts: dict[tuple[str, int], list[Scored]] = {}
    first: Scored | None = None
    for cell in kept:
        if cell.track != track or (split == "valid" and not cell.valid):
            continue
        scored = read_scored(folder.predictions(cell.name, split), cell.pack, variant)
        if ", scene " in cell.variant:
            parts.setdefault((cell.variant.partition(", ")[0], cell.seed), []).append(scored)
            continue
        first = scored if first is None else first
        found.setdefault(cell.variant, []).append(aligned(first, scored, cell.name))
    for (name, _), of in parts.items():
        if first is not None and sum(len(part.unit) for part in of) == len(first.unit):
            every = aligned(first, rows_of_all(of), f"{track}, {name} of each scene")
            found.setdefault(f"{name}, separate", []).append(every)
    return found


def _scenarios(
    folder: CellFolder,
    kept: KeptCells,
    scored: dict[str, list[Scored]],
    valid: dict[str, list[Scored]],
    reference: Mapping[str, Mapping[str, Any]],
    resamples: int,
) -> list[Board]:
    measured = measure_scenes(scored, valid, resamples)
    about = (
        "All rows of test. A scene's base rate is corrected by its valid rows; intervals are over users. adapted knows "
        "a user's last 50 rows in the scene before test, those of valid among them, which others have not learned."
    )
    board = _board("scenarios", "Scenarios", about, kept, SCENARIOS, measured, "dnn")
    for name, of in reference.items():
        aucs = [f"{value:.4f}" for value in of["auc"]]
        board.rows.append([f"*{name}*", NONE, f"{of['auc_macro']:.4f}", NONE, *aucs, *[NONE] * (len(_HEAD) + 2)])
        board.records.append(_record("scenarios", f"reference, {name}", "auc_macro", of["auc_macro"]))
    board.notes += [_OF_REFERENCES] * bool(reference)
    board.notes += _of_sharing(measured)
    boards = [board]
    of_all = [cell for cell in kept if cell.track == SCENARIOS and cell.pack == "all"]
    cold = _new_items(folder, of_all[0]) if of_all else None
    first = next(iter(scored.values()))[0]
    first = first if cold is None else first.where(cold)
    if cold is not None and _has_both(first):
        rows = {name: [replace(first, logit=one.logit[cold]) for one in of] for name, of in scored.items()}
        about = "Rows of test whose item no row of train has."
        boards.append(
            _board("new_items", "New items", about, kept, SCENARIOS, measure_scenes(rows, {}, resamples), "dnn")
        )
    return boards


def _has_both(scored: Scored) -> bool:
    """Whether every scene that rows have has labels of both kinds: else there is no AUC."""
    labels = [np.unique(scored.label[scored.scene == scene]) for scene in np.unique(scored.scene)]
    return bool(labels) and all(len(of) == 2 for of in labels)


def _new_items(folder: CellFolder, cell: Cell) -> NDArray[np.bool_]:
    """Return which rows of test, in the order of `Scored`, have an item that train lacks."""
    rows = read_scored(folder.predictions(cell.name, "test"), cell.pack).row
    return open_pack(folder.pack(cell.pack)).split("test").columns(()).item_cold[rows]


def _of_sharing(measured: Mapping[str, OfScenes]) -> Iterator[str]:
    """Say what pooling scenes and parts of scenes gain, and in which scenes pooling loses."""
    best = {
        kind: max((n for n in names if n in measured), key=lambda n: measured[n].auc_macro[0], default=None)
        for kind, names in (("many", MANY), ("pooled", POOLED), ("separate", [f"{n}, separate" for n in SEPARATE]))
    }
    for kind in ("pooled", "separate"):
        one, other = best["many"], best[kind]
        if one is not None and other is not None:
            gain = told(gain_of(measured[one].auc_macro, measured[other].auc_macro))
            yield f"{one}, the best with parts for scenes, against {other}, the best {kind} one: macro AUC {gain}."
    for one, other in ((BASE, SHARED), (NEGOTIATED, BASE)):
        if one in measured and other in measured:
            gain = told(gain_of(measured[one].auc_macro, measured[other].auc_macro))
            yield f"{one} against {other}: macro AUC {gain}."
    for name in SEPARATE:
        alone = measured.get(f"{name}, separate")
        if name in measured and alone is not None:
            gains = {s: gain_of(measured[name].auc[s], alone.auc[s]) for s in alone.auc}
            loses = [f"{s} ({told(gain)})" for s, gain in gains.items() if gain["high"] < 0]
            macro = told(gain_of(measured[name].auc_macro, alone.auc_macro))
            where = f"loses in scene {', '.join(loses)}" if loses else "loses in no scene outside the interval"
            yield f"Negative transfer: {name} of all scenes against {name} of each alone {where}; macro AUC {macro}."


def _inputs(
    kept: KeptCells, scored: dict[str, list[Scored]], reference: Mapping[str, Mapping[str, Any]], resamples: int
) -> Board:
    measured = measure_scenes(scored, {}, resamples)
    board = _board("inputs", f"Inputs of {GATES}", "All rows of test.", kept, INPUTS, measured, "ids")
    bound = reference.get("posterior")
    if bound and "ids" in measured and "all of these" in measured:
        ids, every = measured["ids"].auc_macro[0], measured["all of these"].auc_macro[0]
        share = (every - ids) / (bound["auc_macro"] - ids)
        what = "Texts and images close" if {"ids, texts", "ids, images"} & {*measured} else "Texts close"
        board.notes.append(f"{what} {share:.0%} of the gap between ids and all that can be learned.")
        board.records.append(_record("inputs", "all of these", "gap_closed", share))
    return board


def _new_users(
    kept: KeptCells, scored: dict[str, list[Scored]], valid: dict[str, list[Scored]], resamples: int
) -> Board:
    about = "Users that no row of train has; a task knows the last 50 rows of its user before the split."
    measured = measure_scenes(scored, valid, resamples)
    return _board("new_users", "New users", about, kept, NEW_USERS, measured, BASE)


def _board(
    case: str, title: str, about: str, kept: KeptCells, track: str, measured: Mapping[str, OfScenes], against: str
) -> Board:
    """Return the leaderboard of variants that are measured on the same rows."""
    scenes = sorted(next(iter(measured.values())).scenes)
    against = against if against in measured else next(iter(measured))
    head = ["variant", "seeds", "macro AUC", f"- {against}", *(f"scene {s}" for s in scenes), *_HEAD, "CPU s", "MB"]
    board = Board(title, about, head)
    for name, of in sorted(measured.items(), key=lambda item: -item[1].auc_macro[0]):
        macro, gain = of.auc_macro, gain_of(of.auc_macro, measured[against].auc_macro)
        spread = "" if of.spread is None else f" ± {of.spread:.4f}"
        aucs = [f"{of.scenes[scene]['auc']:.4f}" for scene in scenes]
        others = [f"{of.macro[m]:.4f}" if m in of.macro else NONE for m in _METRICS]
        cpu, peak = _spent(kept, track, name)
        difference_told = NONE if name == against else told(gain)
        board.rows.append([name, str(of.seeds), f"{macro[0]:.4f}{spread}", difference_told, *aucs, *others, cpu, peak])
        interval = gain_of(macro, np.zeros_like(macro))
        board.points.append((name, interval["value"], interval["low"], interval["high"]))
        board.records.append(_record(case, name, "auc_macro", interval))
        board.records.append(_record(case, f"{name} - {against}", "auc_macro", gain))
        for metric, value in of.macro.items():
            if metric != "auc":
                board.records.append(_record(case, name, metric, value))
        board.records += [_record(f"{case}/{s}", name, "auc", of.scenes[s]["auc"]) for s in scenes]
    return board


def _spent(kept: KeptCells, track: str, variant: str) -> tuple[str, str]:
    """Return CPU seconds of a seed's training, the mean over seeds, and the largest memory."""
    name, _, separate = variant.partition(", ")
    prefix = f"{name}, scene " if separate == "separate" else f"{variant}\n"
    mine = {c: v for c, v in kept.items() if c.track == track and (f"{c.variant}\n").startswith(prefix)}
    if not mine:
        return NONE, NONE
    seeds = len({cell.seed for cell in mine})
    return f"{sum(v['cpu_s'] for v in mine.values()) / seeds:.0f}", f"{max(v['peak_mb'] for v in mine.values()):.0f}"


def _new_scene(folder: CellFolder, kept: KeptCells, tracks: Sequence[str], resamples: int) -> Board:
    """Return the board of scenes that are left out, by known rows; of each scene its items are resampled."""
    about = (
        "A scene is left out of train, its last so many rows before test are known, and its rows of test are judged. "
        "adapted: each item solves its last layer; fine-tuned: a model goes on with the known rows; rows: with its "
        "embeddings alone; from scratch: dlrm; negotiated: batches go scene by scene, half of each round's way is kept "
        "(MAMDR). Intervals are over items."
    )
    scenes = [int(track.rpartition("_")[2]) for track in tracks]
    measured = {s: _of_new_scene(folder, kept, track, resamples) for s, track in zip(scenes, tracks, strict=True)}
    names = list(dict.fromkeys(name for of in measured.values() for name in of))
    everywhere = [name for name in names if all(name in of for of in measured.values())]
    board = Board("A new scene", about, ["variant", "known rows", "macro AUC", *(f"scene {s}" for s in scenes)])
    macro = {name: np.mean([measured[s][name].auc_macro for s in scenes], 0) for name in everywhere}
    for name in sorted(names, key=lambda n: (int(n.split(", ")[1]), -macro[n][0] if n in macro else 0.0)):
        variant, rows = name.split(", ")
        aucs = {s: float(measured[s][name].auc_macro[0]) for s in scenes if name in measured[s]}
        told_macro = f"{macro[name][0]:.4f}" if name in macro else NONE
        board.rows.append([variant, rows, told_macro, *(f"{aucs[s]:.4f}" if s in aucs else NONE for s in scenes)])
        if name in macro:
            interval = gain_of(macro[name], np.zeros_like(macro[name]))
            board.points.append((name, interval["value"], interval["low"], interval["high"]))
            board.records.append(_record(f"leave-one-out/all/{rows}", variant, "auc_macro", interval))
        for scene, value in aucs.items():
            board.records.append(_record(f"leave-one-out/{scene}/{rows}", variant, "auc", value))
    tuned = [f"{model} {how}" for model in BEGUN for how in FINE_TUNED]
    learn = (ADAPTED, f"{BASE} rows", f"{GATES} rows")
    for name in everywhere:
        variant, rows = name.split(", ")
        run = {macro[f"{other}, {rows}"][0]: other for other in tuned if f"{other}, {rows}" in macro}
        best = run[max(run)] if run else ""
        for other in (*tuned, *learn[1:], "from scratch", *BEGUN):
            against = f"{other}, {rows}" if f"{other}, {rows}" in macro else f"{other}, 0"
            if variant in learn and variant != other and against in macro and (rows != "0" or against.endswith(", 0")):
                gain = gain_of(macro[name], macro[against])
                if other in (best, "from scratch"):
                    board.notes.append(f"{variant}, {rows} known rows, against {against}: macro AUC {told(gain)}.")
                board.records.append(_record(f"leave-one-out/all/{rows}", f"{variant} - {other}", "auc_macro", gain))
    return board


def _of_new_scene(folder: CellFolder, kept: KeptCells, track: str, resamples: int) -> dict[str, OfScenes]:
    """Return "variant, known rows" -> what it measures of one scene."""
    found: dict[str, list[Scored]] = {}
    for cell in kept:
        if cell.track != track:
            continue
        scored = read_scored(folder.predictions(cell.name, "test"), cell.pack)
        if ", " in cell.variant:
            found.setdefault(cell.variant, []).append(scored)
            continue
        for rows in np.unique(scored.known).tolist() if cell.variant == ADAPTED else [0]:
            found.setdefault(f"{cell.variant}, {rows}", []).append(scored.where(scored.known == rows))
    first = next(iter(found.values()))[0]
    shared = {name: [aligned(first, of, f"{track}, {name}") for of in seeds] for name, seeds in found.items()}
    return measure_scenes(shared, {}, resamples)


def _record(case: str, variant: str, metric: str, value: float | Mapping[str, float]) -> dict[str, Any]:
    of = {"value": value} if isinstance(value, float) else dict(value)
    return {"case": case, "variant": variant, "metric": metric, **of, "unit": ""}
