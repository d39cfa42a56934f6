"""`gmeta deliver`: from a day's rows to the version that serves, in stages that a delivery which stopped goes on from.

    fetch    the registry's current version, with what a warm start needs
    prepare  a task pack of the new rows, whose ids continue that version's
    train    a warm start on the pack; of the first version a training by recipe
    bundle   a checkpoint as one version
    gate     candidate against current, on tasks of the pack that nobody trained on
    publish  the version and its verdict; the pointer moves where the gate passed it

What a stage makes is whole or absent, and `delivery.json` says which stages ended and what they took.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from gmeta.config.data import PrepareConfig
from gmeta.config.deliver import DeliverConfig
from gmeta.config.delivery import BundleConfig, GateConfig
from gmeta.config.evaluation import EvaluateConfig
from gmeta.config.parse import parse_mapping, train_config
from gmeta.config.train import TrainConfig
from gmeta.core.files import make_folder, read_mapping, write_text
from gmeta.data.layout import checksum_file
from gmeta.data.pack import open_pack
from gmeta.data.prepare.prepare import prepare, print_summary
from gmeta.data.sources import find_files
from gmeta.delivery.bundle import make_bundle
from gmeta.delivery.gate import HELD_OUT, judge
from gmeta.delivery.registry import publish
from gmeta.delivery.rule_files import judged_by, read_rules
from gmeta.delivery.sound_day import newest_sound_day
from gmeta.evaluation.documents import read_evaluation
from gmeta.evaluation.evaluate import evaluate
from gmeta.evaluation.slices import headline_metrics
from gmeta.parallel.launch import EXIT_REFUSED, EXIT_STOPPED, launch
from gmeta.runs.bundle import read_manifest
from gmeta.runs.directory import read_config, read_schema
from gmeta.runs.lease import hold_lease
from gmeta.runs.registry import Pointer, Registry, open_registry
from gmeta.training.defaults import with_defaults
from gmeta.training.supervise import supervise
from gmeta.training.trainer import train

RECORD = "delivery.json"
LEASE = "delivering.json"
"""Key of a registry that says which delivery to it is running."""
_CURE = "remove the folder to begin this delivery anew"


class Stopped(Exception):
    """Training was asked to stop, and has saved; the exit code is the argument."""


@dataclass(frozen=True)
class Delivery:
    """One delivery: its settings, where its files lie, and the version that it goes on from (None: the first)."""

    config: DeliverConfig
    registry: Registry
    folder: Path
    base: int | None
    record: dict[str, Any]  # of delivery.json: stage -> seconds, and what the last stages found

    @property
    def base_bundle(self) -> Path:
        """Return the folder of the current version, once it was fetched."""
        return Path(self.record["fetched"])

    def save(self) -> None:
        """Write delivery.json."""
        write_text(self.folder / RECORD, json.dumps(self.record, indent=1) + "\n")


def deliver(config: DeliverConfig) -> int:
    """Run `gmeta deliver`. Returns 0 where a version was published, 3 where the gate refused it, 75 where training was
    asked to stop.

    Raises ValueError for what is the user's to mend: of every stage, and another delivery to the registry that runs, or
    that has published meanwhile.
    """
    train_config({"pack": "", "run_dir": "", **config.train_with})  # mistakes come before the work
    work = make_folder("work", config.work)
    registry = open_registry(config.registry)
    with hold_lease(registry.store, LEASE, f"a delivery to {registry.url}"):
        delivery = _open(config, registry, work)
        try:
            for name, stage in STAGES.items():
                _run(delivery, name, stage)
        except Stopped as stopped:
            print("stopped and saved: the same command goes on")
            return int(stopped.args[0])
        except ValueError:
            if "prepare" not in delivery.record["seconds"]:
                shutil.rmtree(delivery.folder)  # it holds a copy of the current version, and nothing of its own
            raise
        _tell(delivery)
    if delivery.record["passed"] and not config.keep:
        shutil.rmtree(delivery.folder)
    return 0 if delivery.record["passed"] else EXIT_REFUSED


def _open(config: DeliverConfig, registry: Registry, work: Path) -> Delivery:
    """Find the delivery of these rows onto the registry's current version, or begin it."""
    current = registry.current()
    base = None if current is None else current.version
    inputs = {checksum_file(file): str(file) for file in find_files(config.inputs)}
    folder = work / _name(config, list(inputs))
    if (folder / RECORD).exists():
        record = read_mapping(folder / RECORD, _CURE)
        if record["base"] == base or _is_published(folder / "bundle", current):
            return Delivery(config, registry, folder, record["base"], record)
        _set_aside(folder, record)
    begins = base is None or config.full
    meaning = {"schema": config.schema, "events": config.events}
    given = [key for key, file in meaning.items() if file is not None]
    if begins and not given:
        why = "full is true" if config.full else f"registry {config.registry} is empty"
        raise ValueError(f"{why}: name the schema of the rows with --schema, or of events their columns with --events")
    if not begins and given:
        raise ValueError(f"{given[0]} is {meaning[given[0]]!r}: a day has that of the current version, leave it out")
    before = [] if base is None or config.full else registry.manifest(base).get("delivered", [])
    for known in (checksum for checksum in inputs if checksum in before):
        raise ValueError(
            f"{inputs[known]} was delivered already, with version {base} of {config.registry} or one before it: leave "
            "it out"
        )
    folder.mkdir(exist_ok=True)
    return Delivery(config, registry, folder, base, {"base": base, "delivered": [*before, *inputs], "seconds": {}})


def _name(config: DeliverConfig, inputs: Sequence[str]) -> str:
    """Return a name of what is delivered where: rows by their checksums, and settings, those in files by content."""
    files = [None if file is None else _text(file) for file in (config.schema, config.events, config.rules)]
    what = [config.registry, config.full, config.checkpoint, config.prepare_with, config.train_with, files, inputs]
    return xxhash.xxh3_64(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): name a YAML file") from None


def _set_aside(folder: Path, record: Mapping[str, Any]) -> None:
    """Make way for a delivery that begins anew, because another version is current than when this one began.

    ValueError where it was published: the day was delivered.
    """
    if "publish" not in record["seconds"]:
        print("deliver: another version is current than when this delivery began: it begins anew")
        shutil.rmtree(folder)
    elif record["passed"]:
        raise ValueError(f"these rows were delivered already, as version {record['version']}: leave them out")
    else:
        folder.rename(folder.with_name(f"{folder.name}-version-{record['version']}"))


def _is_published(bundle: Path, current: Pointer | None) -> bool:
    return current is not None and bundle.exists() and current.id == read_manifest(bundle)["id"]


def _run(delivery: Delivery, name: str, stage: Callable[[Delivery], None]) -> None:
    seconds = delivery.record["seconds"]
    if name in seconds:
        print(f"deliver: {name} is done already")
        return
    print(f"deliver: {name}", flush=True)
    start = time.perf_counter()
    stage(delivery)
    seconds[name] = round(time.perf_counter() - start, 3)
    delivery.save()


def _fetch(delivery: Delivery) -> None:
    rules = delivery.config.rules
    if delivery.base is not None:
        delivery.record["fetched"] = str(delivery.registry.fetch(delivery.base, _cache(delivery)))
        if rules is not None:
            # a mistake comes before the work
            schema = read_schema(delivery.base_bundle)[0]
            read_rules(rules, kind=judged_by(schema, read_config(delivery.base_bundle).loss), labels=schema.labels)


def _cache(delivery: Delivery) -> Path:
    return delivery.folder / "cache"


def _prepare(delivery: Delivery) -> None:
    out = delivery.folder / "pack"
    if not out.exists():  # a pack is whole or absent
        config = delivery.config
        begins = delivery.base is None or config.full
        first = {"schema": config.schema} if config.events is None else {"events": config.events}
        start = first if begins else {"base": str(delivery.base_bundle)}
        given = {"out": str(out), "input": config.inputs, **start, **config.prepare_with}
        print_summary(prepare(parse_mapping(PrepareConfig, given, "prepare_with")))
    if delivery.base is not None and not set(HELD_OUT) & set(open_pack(out).splits):
        shutil.rmtree(out)
        raise ValueError("the day has no task that is held out, and nothing could be judged: add more files to it")


def _train(delivery: Delivery) -> None:
    config, run_dir = delivery.config, delivery.folder / "run"
    settings: dict[str, Any] = {"pack": str(delivery.folder / "pack"), "run_dir": str(run_dir), "resume": True}
    if delivery.base is not None and not config.full:
        settings["warm_start"] = str(delivery.base_bundle)
    whole = train_config({**settings, **config.train_with}, with_defaults)
    code = _trained(whole, config.nproc, delivery.folder / "train.yaml")
    if code == EXIT_STOPPED:
        raise Stopped(code)
    if code:
        raise ValueError(f"training ended with exit code {code}, see above: the same command goes on")


def _trained(config: TrainConfig, nproc: int, file: Path) -> int:
    """Train in this process, or in workers where there are several; returns the exit code."""
    if nproc == 1 and not config.elastic.enabled:
        return train(config).exit_code
    write_text(file, yaml.safe_dump(_plain(config), sort_keys=False))
    words = ["train", "--config", str(file)]
    return supervise(config, nproc, words) if config.elastic.enabled else launch(nproc, words)


def _bundle(delivery: Delivery) -> None:
    out = delivery.folder / "bundle"
    if not out.exists():
        config, run_dir = delivery.config, str(delivery.folder / "run")
        usual = "best" if delivery.base is None or config.full else "last"
        which = config.checkpoint or usual
        make_bundle(BundleConfig(run_dir=run_dir, out=str(out), checkpoint=which, trust_model=config.trust_model))


def _gate(delivery: Delivery) -> None:
    config, folder = delivery.config, delivery.folder
    if delivery.base is None:
        _measure_first(delivery)
        return
    gate = GateConfig(
        candidate=str(folder / "bundle"),
        current=str(delivery.base_bundle),
        pack=str(folder / "pack"),
        rules=config.rules,
        out=str(folder / "gate"),
        trust_model=config.trust_model,
    )
    verdict = judge(gate, newest_sound_day(delivery.registry, delivery.base))
    delivery.record.update({"passed": verdict.passed, "metrics": verdict.document["metrics"]})


def _measure_first(delivery: Delivery) -> None:
    """Measure a first version, which has none to be compared with: the next one's gate asks how good it was."""
    out = delivery.folder / "evaluation"
    split = next((name for name in HELD_OUT if name in open_pack(delivery.folder / "pack").splits), None)
    if split is not None:
        run_dir, trust = str(delivery.folder / "run"), delivery.config.trust_model
        evaluate(EvaluateConfig(run_dir=run_dir, split=split, out=str(out), baselines=False, trust_model=trust))
    evaluation = read_evaluation(out / "evaluation.json")
    delivery.record.update({"passed": True, "metrics": None if evaluation is None else headline_metrics(evaluation)})


def _publish(delivery: Delivery) -> None:
    registry, record = delivery.registry, delivery.record
    bundle, verdict = delivery.folder / "bundle", delivery.folder / "gate" / "verdict.json"
    stored = next((one for one in registry.versions() if one.id == read_manifest(bundle)["id"]), None)
    current = registry.current()
    if stored is not None and (stored.refused or _is_published(bundle, current)):
        record["version"] = stored.number  # by this delivery, which was stopped before it could note it
        return
    document = json.loads(verdict.read_text()) if verdict.exists() else None
    record["version"] = publish(
        registry,
        bundle,
        verdict=document,
        metrics=record["metrics"],
        delivered=record["delivered"],
        cache=_cache(delivery),
    )


def _tell(delivery: Delivery) -> None:
    record = delivery.record
    total = sum(record["seconds"].values())
    took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record["seconds"].items())
    print(f"delivered in {total:.1f} s ({took})")
    pointer = delivery.registry.current()
    if record["passed"] and pointer is not None and pointer.version != record["version"]:
        print(
            f"version {record['version']} is stored in {delivery.config.registry}, and version {pointer.version} stays "
            f"{'pinned' if pointer.pinned else 'current'}: `gmeta registry rollback --to {record['version']}` makes it "
            "current" + (", after `gmeta registry unpin`" if pointer.pinned else "")
        )
    elif record["passed"]:
        print(f"version {record['version']} of {delivery.config.registry} is current")
    else:
        print(
            f"the gate refused the candidate: it is kept as version {record['version']}, and version {delivery.base} "
            f"stays current; the reasons: {delivery.folder / 'gate' / 'verdict.html'}"
        )


def _plain(config: TrainConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(config))))


STAGES: dict[str, Callable[[Delivery], None]] = {
    "fetch": _fetch,
    "prepare": _prepare,
    "train": _train,
    "bundle": _bundle,
    "gate": _gate,
    "publish": _publish,
}
