"""`gmeta export`: a model in a format that runs without gmeta, with what says how its inputs are encoded.

export.json              version, and of each graph its file, inputs (shape, dtype, feature) and outputs
model.pt2 / model.onnx   encoded examples -> logit and prediction, of tasks of which nothing is known
score.pt2 / score.onnx   state of tasks (as `gmeta export-states` writes it), encoded examples -> the same
schema.json  vocab/      how raw values become ids and numbers, as in the run directory
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gmeta.config.export import ExportConfig
from gmeta.core.files import sync
from gmeta.data.pack import lock_directory
from gmeta.data.schema import OOV
from gmeta.parallel.mesh import local_mesh
from gmeta.recommender.recommender import Recommender
from gmeta.serving.export_graphs import OUTPUTS, GivenState, Unadapted, require_exportable_model, trace
from gmeta.serving.files import same_checkpoint

FORMAT, FORMAT_VERSION = "gmeta-export", 1
SUFFIX = {"torch": "pt2", "onnx": "onnx"}


def export(config: ExportConfig) -> int:
    """Run `gmeta export`.

    Raises:
        ValueError: `out` exists, a package is missing, or the model, its engine or its inner loop cannot be exported.
    """
    source, out, mesh = Path(config.run_dir), Path(config.out), local_mesh("cpu")
    _require_free(out)
    if config.format == "onnx":
        _require_onnx()
    which = same_checkpoint(source, config.checkpoint, mesh)
    rec = Recommender(source, which, factory=None, trust_model=config.trust_model, mesh=mesh)
    if rec.schema.labels:
        names = ", ".join(rec.labels)
        raise ValueError(f"{source} predicts {names}, and export is for models of one label: serve it with gmeta serve")
    require_exportable_model(rec)
    graphs: dict[str, Unadapted | GivenState] = {"model": Unadapted(rec)}
    if config.score:
        graphs["score"] = GivenState(rec)
    partial = out.with_name(out.name + ".partial")
    try:
        lock = lock_directory(partial)
        try:
            with _without_logs():
                told = {name: _write(rec, graph, name, config.format, partial) for name, graph in graphs.items()}
            shutil.copyfile(source / "schema.json", partial / "schema.json")
            shutil.copytree(source / "vocab", partial / "vocab")
            (partial / "export.json").write_text(json.dumps(_describe(rec, told), indent=1) + "\n")
            sync(partial / "export.json")
            _require_free(out)
            os.rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; free space there or name another") from error
    for name, graph in told.items():
        print(f"{name}: {out / graph['file']}, {len(graph['inputs'])} inputs")
    print(f"version {rec.version}; export.json says what the inputs are")
    return 0


@contextmanager
def _without_logs() -> Iterator[None]:
    """Keep torch from logging every step, and the whole graph where a model cannot be traced: the error says why."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _write(rec: Recommender, graph: Unadapted | GivenState, name: str, kind: str, folder: Path) -> dict[str, Any]:
    """Write a graph, and return what export.json says of it."""
    file = folder / f"{name}.{SUFFIX[kind]}"
    program = trace(graph, rec.config.model.name)
    if kind == "torch":
        torch.export.save(program, file)
    else:
        _save_onnx(program, [one.name for one in graph.inputs], file)
    outputs = [{"name": output, "shape": list(graph.encoded.leading)} for output in OUTPUTS]
    return {"file": file.name, "inputs": [one.describe() for one in graph.inputs], "outputs": outputs}


def _save_onnx(program: torch.export.ExportedProgram, names: list[str], file: Path) -> None:
    with warnings.catch_warnings():  # torch 2.13 warns of its own code
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        found = torch.onnx.export(program, input_names=names, output_names=list(OUTPUTS), dynamo=True, verbose=False)
    assert found is not None
    found.save(file, external_data=True)


def _describe(rec: Recommender, graphs: dict[str, Any]) -> dict[str, Any]:
    """Return the content of export.json."""
    schema = rec.schema
    numeric = [{"name": c.name, "mean": c.mean, "std": c.std, "log": c.log} for c in schema.numeric]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "version": rec.version,
        "loss": rec.config.loss,
        "task": schema.task,
        "oov": OOV,
        "numeric": numeric,
        "max_support_rows": rec.config.loader.max_support_rows,
        "graphs": graphs,
    }


def _require_free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"out {out} exists: remove it or name another folder")


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ValueError(f"format is 'onnx', which needs {package}: pip install 'gmeta[export]'")
