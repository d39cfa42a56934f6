"""`gmeta export`: exported graphs, in torch.export and in onnxruntime, score as the recommender does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import fails, gmeta
from packs import make_pack
from packs import user_rows as rows
from torch import Tensor

import gmeta as api
from gmeta.core.batch import Examples
from gmeta.serving.export_graphs import Unadapted, trace

SETTINGS: dict[str, dict[str, Any]] = {
    "solved": {
        "model": {"name": "neural_linear", "args": {"task_features": ["group"]}},
        "meta": {"adapt": ["last_layer"]},
    },
    "taste": {
        "model": {"name": "taste", "args": {"task_features": ["group"], "hidden": [8], "bottom": [8]}},
        "meta": {"adapt": ["decision"], "inner_steps": 2, "inner_lr": 0.5},
    },
    "melu": {
        "model": {"name": "melu", "args": {"hidden": [8], "layer_norm": True}},
        "meta": {"adapt": ["decision", "embeddings"], "inner_lr": 0.5},
    },
    "dlrm": {
        "model": {"name": "dlrm", "args": {"hidden": [8], "bottom": [8]}},
        "meta": {"adapt": ["head"], "inner_lr": 0.5},
    },
    "masked": {
        "embedding": {"generator": {"item": ["tags"]}, "init_std": 0.5},
        "meta": {"adapt": ["head"], "inner_lr": 0.5},
    },
    "modulated": {"meta": {"adapt": ["head"], "modulation": "film"}},
    "reference": {"meta": {"engine": "reference"}},
    "plain": {"meta": {"adapt": []}},
}
SCORED = ("solved", "taste", "melu", "dlrm", "masked")
Graph = Callable[[Mapping[str, Tensor]], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def trained(place: Path) -> Callable[[str], Path]:
    """A run of one of `SETTINGS`, trained when it is first asked for."""
    pack = make_pack(place / "pack")

    def run_of(name: str) -> Path:
        path = place / name
        if not path.exists():
            config = {"model": {"name": "melu"}, "embedding": {"init_std": 0.5}, **SETTINGS[name]}
            config |= {"pack": str(pack), "run_dir": str(path), "schedule": {"epochs": 1}}
            api.train({"loader": {"tasks_per_batch": 20}, **config})
        return path

    return run_of


def in_torch(file: Path, names: list[str]) -> Graph:
    graph = torch.export.load(file).module()
    return lambda given: tuple(out.detach().numpy() for out in graph(*(given[name] for name in names)))  # type: ignore[return-value]


def in_onnx(file: Path, names: list[str]) -> Graph:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}  # what no output depends on is left out
    return lambda given: session.run(None, {name: given[name].numpy() for name in names if name in wanted})


RUNTIME = {"torch": in_torch, "onnx": in_onnx}
QUICK = {("solved", "torch")}


def opened(folder: Path, kind: str, name: str) -> tuple[dict[str, Any], Graph]:
    about = json.loads((folder / "export.json").read_text())["graphs"][name]
    return about, RUNTIME[kind](folder / about["file"], [one["name"] for one in about["inputs"]])


def of_examples(about: dict[str, Any], examples: Examples) -> dict[str, Tensor]:
    """The inputs of a graph that hold examples [T, Q]."""
    given: dict[str, Tensor] = {}
    for one in about["inputs"]:
        if "pooling" in one:
            bag = examples.bags[one["feature"]]
            longest = int(bag.lengths.max())
            padded = torch.zeros(*bag.lengths.shape, longest, dtype=torch.int64)
            padded[torch.arange(longest) < bag.lengths.unsqueeze(-1)] = bag.values
            given |= {one["name"]: padded, f"lengths_{one['feature']}": bag.lengths}
        elif "feature" in one:
            given[one["name"]] = examples.ids[one["feature"]]
        elif one["name"] == "dense":
            given["dense"] = examples.dense
    return given


def of_state(about: dict[str, Any], state: Mapping[str, Tensor], num_tasks: int) -> dict[str, Tensor]:
    """The inputs of a graph that hold the state of tasks, from a `FastWeights.state_dict`."""
    given = {}
    for one in (one for one in about["inputs"] if "state" in one):
        tensor = state[one["state"]]
        kind, *of = json.loads(one["state"])
        if kind in ("pairs", "deltas"):
            task = state[json.dumps(["pairs", *of])][:, 0]
            own = [tensor[task == number] for number in range(num_tasks)]
            values = [part[:, 1] if kind == "pairs" else part for part in own]
            tensor = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=one.get("padding", 0))
        given[one["name"]] = tensor
    return given


def gathered(rec: api.Recommender, candidates: pa.Table) -> tuple[list[str], Examples, np.ndarray]:
    """Candidates [T, Q] in the run's encoding, and the row of each among `candidates`."""
    encoded = rec._encode(candidates, "candidates")
    assert encoded is not None
    with rec._rows(encoded) as (at, split):
        _, query, _ = split.gather(at)
    return encoded.keys, query, encoded.query_row[query.row.numpy()]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
        for name in SCORED
        for kind in RUNTIME
    ],
)
def test_graphs_score_as_the_recommender_does(
    trained: Callable[[str], Path], tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    gmeta("export", "--run_dir", trained(name), "--out", tmp_path / "out", "--format", kind)
    rec = api.load(trained(name))
    score, model = opened(tmp_path / "out", kind, "score"), opened(tmp_path / "out", kind, "model")
    for num_tasks, each in ((6, 4), (1, 3)):
        support, candidates = rows(num_tasks, 5, 1, label=True), rows(num_tasks, each, 2, label=False)
        users = rec.adapt(support)
        keys, query, row = gathered(rec, candidates)
        assert keys == list(users.keys)
        state = of_state(score[0], users.state()["fast_weights"][0], num_tasks)
        _, predictions = score[1]({**state, **of_examples(score[0], query)})
        expected = users.predict(candidates)
        np.testing.assert_allclose(predictions, expected[row], atol=1e-5)
        flat = {key: value.flatten(0, 1) for key, value in of_examples(model[0], query).items()}
        logits, unadapted = model[1](flat)
        before = rec.adapt({}).predict(candidates)
        np.testing.assert_allclose(unadapted, before[row].ravel(), atol=1e-5)
        np.testing.assert_allclose(1 / (1 + np.exp(-logits)), unadapted, atol=1e-6)
        assert np.abs(expected - before).max() > 1e-3


def test_a_folder_says_what_it_needs(trained: Callable[[str], Path], tmp_path: Path) -> None:
    gmeta("export", "--run_dir", trained("solved"), "--out", tmp_path / "out", "--score", "false")
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["version"] == api.load(trained("solved")).version
    assert about["graphs"].keys() == {"model"}
    assert [column["name"] for column in about["numeric"]] == ["age", "price"]
    for file in ("item", "tags", "group"):
        stored = trained("solved") / "vocab" / f"{file}.parquet"
        assert (tmp_path / "out" / "vocab" / f"{file}.parquet").read_bytes() == stored.read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modulated", ("meta.modulation is 'film'", "gmeta.load")),
        ("reference", ("the reference engine", "--score false")),
        ("plain", ("adapts nothing", "--score false")),
    ],
)
def test_what_cannot_be_exported_is_named(
    trained: Callable[[str], Path], tmp_path: Path, name: str, said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(["export", "--run_dir", trained(name), "--out", tmp_path / "out"], capsys, *said)
    assert not list(tmp_path.iterdir())


class Peeking(torch.nn.Module):
    """Computes by what it sees, which no graph can hold."""

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        logits = embedded["item"].sum(-1)
        return logits if float(logits.sum()) > 0 else -logits


def test_a_model_that_cannot_be_traced_is_named(trained: Callable[[str], Path]) -> None:
    rec = api.load(trained("melu"))
    rec.system.learner.model = Peeking()
    graph = Unadapted(rec)
    with pytest.raises(ValueError, match=r"model own:Peeking cannot be exported .* tensor operations"):
        trace(graph, "own:Peeking")


def test_mistakes(trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--run_dir", trained("solved"), "--out"]
    fails([*words, tmp_path], capsys, f"out {tmp_path} exists")
    (tmp_path / "file").write_text("")
    fails([*words, tmp_path / "file" / "out"], capsys, "cannot write")
    gmeta("bundle", "--run_dir", trained("solved"), "--out", tmp_path / "bundle", "--training", "false")
    words[2] = tmp_path / "bundle"
    fails([*words, tmp_path / "out", "--checkpoint", "3"], capsys, "a bundle is one version: leave it out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file"]
