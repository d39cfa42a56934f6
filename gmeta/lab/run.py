"""`gmeta lab`: one scenario under one policy, by gmeta's own trainer, launcher and coordinator."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from gmeta.config.cluster import LabConfig
from gmeta.config.train import ElasticConfig, LoaderConfig, MetaConfig, ModelConfig, ScheduleConfig, TrainConfig
from gmeta.core.files import write_text
from gmeta.data.order import num_batches
from gmeta.data.pack import open_pack
from gmeta.elastic.scenario import Cut, Scenario, parse_scenario
from gmeta.lab.audit import audit
from gmeta.lab.coordinator import LabCoordinator, Line
from gmeta.lab.faults import Faults
from gmeta.lab.folder import LabFolder
from gmeta.lab.measure import LabResult, measure
from gmeta.lab.pack import write_lab_pack
from gmeta.lab.timeline import write_timeline
from gmeta.runs import checkpoint
from gmeta.runs.log import METRICS_FILE, read_metrics
from gmeta.training.supervise import supervise


def lab(config: LabConfig) -> LabResult:
    """Run the command. ValueError says why the scenario or the folder will not do."""
    file = Path(config.scenario)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"scenario {file} cannot be read ({error}): name a file such as those in examples") from None
    scenario = parse_scenario(text, str(file))
    if config.workers:
        scenario = scenario.scaled(config.workers)
    if config.steps:
        scenario = replace(scenario, steps=config.steps)
    return run_lab(scenario, config.policy, Path(config.out), compare=config.compare, max_restarts=config.max_restarts)


def run_lab(scenario: Scenario, policy: str, out: Path, *, compare: bool = False, max_restarts: int = 2) -> LabResult:
    """Run a scenario in the new folder `out`, and write result.json and report.html there.

    With `compare` the same training runs undisturbed as well, and the weights are compared. `max_restarts` workers may
    be replaced by the policy. ValueError when the folder is in use, or training did not end well.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder for the run")
    folder = LabFolder(out)
    out.mkdir(parents=True, exist_ok=True)
    folder.write_scenario(scenario)
    epochs = 2 if scenario.steps % 2 == 0 else 1
    write_lab_pack(folder.pack, scenario.tasks_per_batch * scenario.steps // epochs, scenario.seed)
    config = _train(folder, scenario, policy, epochs, max_restarts)
    result = _measured(folder, scenario, policy, config)
    if compare:
        calm = replace(scenario, events=(), devices=(), slot_s=1e-9, fixed_s=0.0, noise=0.0)
        plain = run_lab(calm, "static", out / "undisturbed", max_restarts=0)
        result.difference = difference(folder, LabFolder(out / "undisturbed"))
        result.difference |= {name: value - plain.metrics[name] for name, value in result.metrics.items()}
    shown = {**asdict(result), "achieved": result.achieved, "utilisation": result.utilisation}
    write_text(out / "result.json", json.dumps(shown, indent=1) + "\n")
    write_timeline(folder, scenario, result)
    return result


def _train(folder: LabFolder, scenario: Scenario, policy: str, epochs: int, max_restarts: int) -> TrainConfig:
    """Train with the faults of the scenario, and return the config that was used."""
    with ExitStack() as stack:
        coordinator = LabCoordinator(folder.path, policy, max_restarts)
        stack.callback(coordinator.close)
        line = Line(coordinator.port) if any(isinstance(event, Cut) for event in scenario.events) else None
        if line is not None:
            stack.callback(line.close)
        url = coordinator.url if line is None else line.url
        config = _train_config(folder, scenario, epochs, url, coordinator.token_file)
        write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        stack.callback(Faults(scenario, folder, coordinator, line).close)
        code = supervise(config, scenario.workers, [str(folder.path)], module="gmeta.lab")
    if code != 0:
        raise ValueError(f"training ended with {code}: see what it said above, and {folder.path / 'coordinator.log'}")
    return config


def _train_config(folder: LabFolder, scenario: Scenario, epochs: int, url: str, token_file: Path) -> TrainConfig:
    """Return the config of the smallest model, so that its computing is far below the emulated; in float64, so that
    runs can be compared.
    """
    return TrainConfig(
        pack=str(folder.pack),
        run_dir=str(folder.run_dir),
        model=ModelConfig(name="melu", embedding_dim=4, args={"hidden": [8]}),
        meta=MetaConfig(order="first"),  # half the CPU of second order: what two cores have left for four workers
        loader=LoaderConfig(
            tasks_per_batch=scenario.tasks_per_batch, window_batches=16, prefetch=max(1, scenario.ahead - 1)
        ),
        elastic=ElasticConfig(
            enabled=True, url=url, token_file=str(token_file), report_s=scenario.report_s, max_restarts=20
        ),
        schedule=ScheduleConfig(epochs=epochs, checkpoint_every=scenario.checkpoint_steps),
        seed=scenario.seed,
        precision="float64",
        device="cpu",
        timeout_s=120,
    )


def _measured(folder: LabFolder, scenario: Scenario, policy: str, config: TrainConfig) -> LabResult:
    records = read_metrics(folder.run_dir / METRICS_FILE)
    split = open_pack(folder.pack).split("train")
    result = measure(folder, scenario, policy, records, num_batches(split.num_tasks, scenario.tasks_per_batch))
    found = audit([record for record in records if record["kind"] == "train"], split, config)
    result.expected, result.lost, result.repeated = found.expected, found.lost, found.repeated
    result.problems = found.problems
    return result


def difference(folder: LabFolder, other: LabFolder) -> dict[str, float]:
    """Return the largest difference between two runs' last weights, relative to the largest weight; 0 is bit-equal."""
    found, reference = (_last_tensors(p) for p in (folder, other))
    worst = max(float(np.abs(found[name] - reference[name]).max(initial=0.0)) for name in reference)
    return {"weights": worst / max(float(np.abs(tensor).max(initial=0.0)) for tensor in reference.values())}


def _last_tensors(folder: LabFolder) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors of the last checkpoint, by file and name."""
    last = checkpoint.find_checkpoint(folder.run_dir / "checkpoints", "last")
    return {
        f"{file.name} {name}": tensor
        for file in sorted(last.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def summary(result: LabResult) -> str:
    """Return what the command prints."""
    lines = [
        f"{result.policy} on {result.workers} workers: {result.jct_s:.1f} s for {result.steps} steps, "
        f"{result.achieved:.0%} of the ideal speed ({result.ideal_s:.1f} s), computing {result.utilisation:.0%}",
        f"{result.decisions} decisions, {result.restarts} restarts, {result.repeated_steps} steps done again",
        f"of {result.expected:,} tasks {result.lost} lost, {result.repeated} repeated",
        *result.problems,
    ]
    if result.difference is not None:
        lines.append(f"weights differ from an undisturbed run's by {result.difference['weights']:.2g} of the largest")
    return "\n".join(lines)
