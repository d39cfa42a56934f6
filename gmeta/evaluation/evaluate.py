"""`gmeta evaluate`: measure a run before and after adaptation, beside a plain twin and baselines without a network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from gmeta.config.evaluation import EvaluateConfig, FactorConfig
from gmeta.config.train import TrainConfig
from gmeta.core.files import make_folder
from gmeta.data.coverage import unknown_columns, unknown_warning
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.shards import PackSplit
from gmeta.evaluation.baseline_settings import BaselineSettings, read_baseline_settings
from gmeta.evaluation.evaluate_next_item import RankedSplit, rank_next_items, require_options
from gmeta.evaluation.next_item import print_next_item
from gmeta.evaluation.predictions import Variants, scenarios_of, task_keys, write_predictions
from gmeta.evaluation.report import build_report
from gmeta.evaluation.score import Floats, Scores
from gmeta.evaluation.slices import evaluation_records, of_labels, print_headline, relabelled, write_evaluation
from gmeta.evaluation.support_curve import SupportCurve, print_curve
from gmeta.evaluation.variants import Network, NetworkFree, plain_network
from gmeta.parallel.collectives import on_rank_0
from gmeta.parallel.mesh import Mesh, close_mesh, open_mesh
from gmeta.recommender.build import load_system
from gmeta.runs.data import is_own_pack, require_fitting_pack, require_same_training_data
from gmeta.runs.directory import read_config


def evaluate(config: EvaluateConfig) -> int:
    """Run `gmeta evaluate` on this rank; rank 0 prints a table and writes the evaluation and the predictions.

    Those of the run's own pack are `evaluation.json` and `predictions.parquet` in the run directory. Those of another
    pack get its name too. With `out` they are written there, with a report.

    Raises:
        ValueError: the pack was not encoded as the run's own, or `plain_run` was trained on other data, both with what
            differs; or `out` cannot be a folder, or is a run.
    """
    mesh = open_mesh(config.device, config.timeout_s)
    try:
        evaluate_on(mesh, config)
    finally:
        close_mesh(mesh)
    return 0


def _pack_of(config: EvaluateConfig, run_dir: Path) -> TaskPack:
    own = read_config(run_dir).pack
    if config.pack is None and not Path(own).exists():
        raise ValueError(f"{own}, the pack of {run_dir}, is not there any more: name where it is with --pack")
    return open_pack(config.pack or own)


def evaluate_on(mesh: Mesh, config: EvaluateConfig) -> None:
    """Run `gmeta evaluate` on a mesh that is open; collective. Errors as `evaluate`."""
    run_dir = Path(config.run_dir)
    pack = _pack_of(config, run_dir)
    require_fitting_pack(run_dir, pack)
    require_options(config, next_item=pack.schema.next_item)
    split = pack.split(config.split)
    if config.plain_run is not None:
        require_same_training_data(run_dir, Path(config.plain_run))
    on_rank_0(lambda: _prepare_out(config.out), mesh)
    tuned = BaselineSettings()
    if config.baseline_settings is not None:
        tuned = read_baseline_settings(Path(config.baseline_settings), run_dir, config.plain_run)
    if mesh.rank == 0:
        _warn_of_unknown_columns(pack, split)
    system, trained, step = load_system(
        run_dir, config.checkpoint, mesh, trust_model=config.trust_model, text_tables=pack.text_tables()
    )
    settings: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "step": step,
        "split": config.split,
        "pack": str(pack.path),
    }
    if pack.schema.next_item:
        _write_ranks(config, rank_next_items(mesh, config, system, trained, pack, split), settings)
        return
    if pack.schema.labels and config.truth is not None:
        raise ValueError(f"truth is {config.truth}: it is of one label, and {pack.path} has several; leave it out")
    if config.relevant_label is not None and set(pack.schema.losses(trained.loss)) == {"bce"}:
        raise ValueError(
            f"relevant_label is {config.relevant_label:g}: it is for ratings, of clicks those labelled 1 are"
        )
    if config.relevant_label is not None:
        settings["relevant_label"] = config.relevant_label
    if pack.schema.weight is not None:
        settings["weight"] = pack.schema.weight
    if config.sizes:
        settings["support_sizes"] = list(config.sizes)
    after = "after" if trained.meta.adapt else None
    networks = [Network("before", after, system, trained.loss, steps=config.steps, inner_lr=config.inner_lr)]
    if config.plain_run is not None:
        plain, told = plain_network(config, trained, pack, mesh, tuned.finetuned)
        networks.append(plain)
        settings |= told
    if config.baselines and tuned.factors is not None:
        settings["factor-analysis"] = asdict(tuned.factors)
    most = trained.loader.max_support_rows
    scores = [network.score(split, config.tasks_per_batch, most) for network in networks]
    by_size = _score_by_size(config, networks, split)
    known = [found for found in scores if found is not None]
    if known:  # on rank 0; the others are done
        _measure(_Measured(config, trained, pack, split, networks, known, settings, tuned.factors), by_size)


def _write_ranks(config: EvaluateConfig, ranked: RankedSplit | None, settings: dict[str, Any]) -> None:
    """Measure the ranks of a next-item run, write them and print them; nothing on other ranks than 0."""
    if ranked is not None:
        evaluation = ranked.document(config.resamples, config.seed)
        write = partial(ranked.write, step=settings["step"])
        _write(config, ranked.pack, evaluation, settings | ranked.told, write, print_next_item)


def _score_by_size(config: EvaluateConfig, networks: list[Network], split: PackSplit) -> dict[int, list[Floats | None]]:
    """Return the logits after adaptation to at most so many support rows, by size, of each network; collective.

    None for a network that adapts nothing, for size 0, and on other ranks than 0. Sizes beyond the longest support are
    scored once.
    """
    longest = int(split.num_support.max(initial=0))
    found: dict[int, list[Floats | None]] = {0: [None] * len(networks)}
    for rows in (min(size, longest) for size in config.sizes):
        if rows not in found:
            scores = [n.score(split, config.tasks_per_batch, rows) if n.after else None for n in networks]
            found[rows] = [None if one is None else one.after for one in scores]
    return {size: found[min(size, longest)] for size in config.sizes}


@dataclass(frozen=True)
class _Measured:
    """What is measured: query rows of one split, scored by networks."""

    config: EvaluateConfig
    trained: TrainConfig
    pack: TaskPack
    split: PackSplit
    networks: list[Network]
    scores: list[Scores]  # of each network
    settings: dict[str, Any]  # of evaluation.json
    factors: FactorConfig | None  # settings of the factor analysis, where it was tuned
    label: int = 0  # number of the label that is measured

    def of_label(self, number: int) -> _Measured:
        """Return the same of one label, for all query rows."""
        labels = self.pack.schema.labels
        if not labels:
            return self
        networks = [replace(network, loss=labels[number].loss) for network in self.networks]
        scores = [one.of_label(number) for one in self.scores]
        return replace(self, networks=networks, scores=scores, label=number)

    @property
    def binary(self) -> bool:
        """Whether the label is a click."""
        return self.networks[0].loss == "bce"

    def columns(self, labelled: Scores) -> dict[str, Any]:
        """Return what metrics need besides scores, with the settings of the bootstrap."""
        columns: dict[str, Any] = {"label": labelled.label, "task": labelled.task, "weight": labelled.weight}
        columns |= {key: getattr(self.config, key) for key in ("resamples", "seed")}
        relevant = None if self.binary else self.config.relevant_label
        return columns | {"binary": self.binary, "relevant_label": relevant}


def _measure(measured: _Measured, by_size: dict[int, list[Floats | None]]) -> None:
    """Measure what was scored, each label for itself, write it and print it; on rank 0."""
    evaluations, found = {}, []
    for number, name in enumerate(measured.pack.schema.label_names):
        evaluations[name], variants = _measure_label(measured.of_label(number), by_size)
        found.append(variants)
    evaluation = of_labels(evaluations) | {"left_out": measured.pack.left_out(measured.config.split)}
    curves = {name: one["support_curve"] for name, one in evaluations.items() if "support_curve" in one}
    if len(curves) > 1:
        first, kinds = next(iter(curves.values())), ("records", "differences", "gains")
        by_label = relabelled({name: {kind: curve[kind] for kind in kinds} for name, curve in curves.items()})
        evaluation["support_curve"] = {**first, **by_label}
    evaluation["notes"] += measured.pack.warnings()
    settings, scores = measured.settings, measured.scores[0]
    told = {"step": settings["step"], "loss": measured.trained.loss}
    write = partial(write_predictions, pack=measured.pack, split=measured.split, scores=scores, found=found, **told)
    _write(measured.config, measured.pack, evaluation, settings, write, _print_scored)


def _measure_label(measured: _Measured, by_size: dict[int, list[Floats | None]]) -> tuple[dict[str, Any], Variants]:
    """Return the evaluation of one label on the rows that have it, and what was predicted for all query rows."""
    pack, split, scored = measured.pack, measured.split, measured.scores[0]
    free = NetworkFree.build(measured.config, pack, split, measured.factors, measured.label)
    found = _network_variants(measured).joined(free.variants())
    known, first = ~np.isnan(scored.label), scored.labelled()
    of_rows = found.where(known)
    columns = measured.columns(first)
    evaluation = evaluation_records(
        of_rows.predictions,
        ranking=of_rows.ranking,
        support_size=support_used(split, measured.trained)[first.task],
        item_cold=split.columns(()).item_cold[first.row],
        task_cold=cold_tasks(pack, split)[first.task],
        scenario=scenarios_of(pack, split, first.row),
        **columns,
    )
    if by_size:
        curve = SupportCurve(evaluation["variants"], evaluation["reference"], **columns)
        for size, logits in by_size.items():
            at_size = free.variants(size)
            for network, scores, after in zip(measured.networks, measured.scores, logits, strict=True):
                of_label = after if after is None or after.ndim == 1 else after[:, measured.label]
                at_size = at_size.joined(
                    network.variants(scores.before, scores.before if of_label is None else of_label)
                )
            curve.add(size, at_size.where(known))
        evaluation["support_curve"] = curve.document(split.num_support[np.unique(first.task)])
        evaluation["notes"] += curve.notes
    return evaluation, found


def _network_variants(measured: _Measured) -> Variants:
    """Name what the networks scored; fine-tuning that diverged on a task of this split is left out, with a note."""
    found = Variants({}, {})
    for network, scores in zip(measured.networks, measured.scores, strict=True):
        found = found.joined(network.variants(scores.before, scores.after))
    tuned = found.ranking.get("plain-finetuned")
    if tuned is not None and not np.isfinite(tuned).all():  # its rate was right for the tasks of the valid split
        found.predictions.pop("plain-finetuned")
        found.ranking.pop("plain-finetuned")
        measured.settings["plain-finetuned"]["left_out"] = "it diverges on a task of this split"
        print("evaluate: plain-finetuned is left out: it diverges on a task of this split", file=sys.stderr)
    _require_finite(measured, found)
    return found


def _require_finite(measured: _Measured, found: Variants) -> None:
    """Raise ValueError that names the first task whose scores are not all finite: nothing measures them."""
    for variant, scores in found.ranking.items():
        if np.isfinite(scores).all():
            continue
        tasks = np.unique(measured.scores[0].task[~np.isfinite(scores)])
        (key,) = task_keys(measured.pack, measured.split.task_id[tasks[:1]]).to_pylist()
        others = f" (one of {len(tasks):,} such tasks)" if len(tasks) > 1 else ""
        raise ValueError(
            f"task {key!r}{others} has scores that are not finite in variant {variant!r}: look at its numeric columns; "
            "where steps of the inner loop diverge, lower inner_lr"
        )


def _write(
    config: EvaluateConfig,
    pack: TaskPack,
    evaluation: dict[str, Any],
    settings: dict[str, Any],
    write_predicted: Callable[[Path], None],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """Write the evaluation, the predictions and, into a folder of their own, a report; show what was measured."""
    run_dir, name = Path(config.run_dir), ""
    folder = run_dir if config.out is None else Path(config.out)
    if config.out is None and not is_own_pack(run_dir, pack):
        # Packs of one name in two folders must not replace each other's evaluation, so the checksum is added.
        name = f"-{pack.path.resolve().name}-{pack.manifest['xxh3'][:8]}"
    write_evaluation(folder / f"evaluation{name}.json", evaluation, settings)
    write_predicted(folder / f"predictions{name}.parquet")
    show(evaluation)
    if config.out is not None:
        print(f"written to {folder}: evaluation.json, predictions.parquet, {build_report(run_dir, folder).name}")
    elif name:
        print(f"{pack.path} is not the run's own pack: written to {folder / f'evaluation{name}.json'}")


def _print_scored(evaluation: dict[str, Any]) -> None:
    print_headline(evaluation)
    if "support_curve" in evaluation:
        print_curve(evaluation)


def _prepare_out(out: str | None) -> None:
    """Make the folder of an evaluation. Raises ValueError where it cannot be, or is a run: that has its own."""
    if out is None:
        return
    if (Path(out) / "config.yaml").exists():
        raise ValueError(f"out is {out}: it holds a run, whose own evaluation would be replaced; name another folder")
    make_folder("out", out)


def _warn_of_unknown_columns(pack: TaskPack, split: PackSplit) -> None:
    fractions: dict[str, float] = {}
    for feature in pack.schema.features:  # one at a time: a copy of all columns may not fit in memory
        fractions |= unknown_columns({feature.name: split.feature_ids(feature.name)}, pack.schema.task)
    if (warning := unknown_warning(fractions, f"{pack.path}, split {split.name},")) is not None:
        print(f"evaluate: {warning}", file=sys.stderr)


def support_used(split: PackSplit, trained: TrainConfig) -> NDArray[np.int64]:
    """Return the support rows that each task adapts to, [num_tasks]."""
    most = trained.loader.max_support_rows
    return np.minimum(split.num_support, most) if most else np.asarray(split.num_support)


def cold_tasks(pack: TaskPack, split: PackSplit) -> NDArray[np.bool_]:
    """Say of each task whether its key names no training task, [num_tasks]: a partition may repeat a user."""
    trained = pc.is_in(task_keys(pack, split.task_id), value_set=task_keys(pack, pack.split("train").task_id))
    cold: NDArray[np.bool_] = ~trained.to_numpy().astype(np.bool_)
    return cold
