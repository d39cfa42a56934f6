"""What embedding rows of fewer bytes cost: AUC and log-loss of one run, served from bundles of each kind of rows.

    python benchmarks/small_rows.py [--quick] [--json FILE]

A run is trained on a synthetic log and bundled with exact rows, fp16 and int8. Each bundle scores the test tasks of the
pack, after adaptation. `auc` and `logloss` are differences from exact rows, `bytes` those of the files of tables.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Record, arguments, here, publish, table

from gmeta.data.pack import open_pack
from gmeta.evaluation.score import score_split, validation_metrics
from gmeta.parallel.mesh import Mesh
from gmeta.recommender.build import load_system

KINDS = ("exact", "fp16", "int8")
MODELS = {
    "neural_linear": ("--meta.adapt", "[last_layer]"),
    "taste": ("--meta.adapt", "[decision]", "--meta.inner_steps", 5, "--meta.inner_lr", 0.1),
}
DIM = 32


def measure(folder: Path, users: int, epochs: int) -> list[Record]:
    """Return the records of all models and kinds."""
    here("synth", "--out", folder / "log", "--users", users)
    inputs = ("--input", folder / "log", "--schema", folder / "log" / "schema.yaml")
    here("prepare", "--out", folder / "pack", *inputs)
    test = open_pack(folder / "pack").split("test")
    records = []
    for model, settings in MODELS.items():
        run = folder / model
        sizes = ("--model.name", model, "--model.embedding_dim", DIM, "--schedule.epochs", epochs)
        here("train", "--pack", folder / "pack", "--run_dir", run, *sizes, *settings)
        exact: dict[str, float] = {}
        for kind in KINDS:
            bundle = folder / f"{model}-{kind}"
            here("bundle", "--run_dir", run, "--out", bundle, "--rows", kind, "--training", "false")
            system, config, _ = load_system(bundle, "best", Mesh())
            scores = score_split(system, test, tasks_per_batch=256, before=False)
            assert scores is not None
            found = {name: validation_metrics(scores, config.loss)[f"{name}_after"] for name in ("auc", "logloss")}
            exact = exact or found
            size = sum(file.stat().st_size for file in (bundle / "tables").iterdir())
            records += [Record(model, kind, name, value, "1") for name, value in found.items()]
            records += [Record(model, kind, f"{n}_difference", v - exact[n], "1") for n, v in found.items()]
            records.append(Record(model, kind, "bytes", size, "B"))
    return records


def main() -> None:
    args = arguments(__doc__ or "")
    users, epochs = (400, 1) if args.quick else (8000, 5)
    with tempfile.TemporaryDirectory() as folder:
        records = measure(Path(folder), users, epochs)
    cells = {(r.case, r.variant, r.metric): r.value for r in records}
    rows = [
        [
            model,
            kind,
            f"{cells[model, kind, 'auc']:.4f}",
            f"{cells[model, kind, 'auc_difference']:+.6f}",
            f"{cells[model, kind, 'logloss']:.4f}",
            f"{cells[model, kind, 'logloss_difference']:+.6f}",
            f"{cells[model, kind, 'bytes']:,.0f}",
        ]
        for model in MODELS
        for kind in KINDS
    ]
    head = ("model", "rows", "AUC", "difference", "log-loss", "difference", "bytes of tables")
    config = {"users": users, "epochs": epochs, "embedding_dim": DIM, "settings": str(MODELS)}
    publish("small_rows", table(head, rows), records, config, args)


if __name__ == "__main__":
    main()
