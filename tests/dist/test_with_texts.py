"""Texts beside what any model reads: what their vectors are, and that ranks and engines learn the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from commands import fails, gmeta
from encoders import WHY, tiny
from harness import run_ranks
from test_division import changing, run_divided
from test_train import assert_same, config, run_steps
from text_models import TEXTS, in_words, text_pack, text_rows

import gmeta as package
from gmeta.config.train import MetaConfig, ModelConfig, TrainConfig
from gmeta.core.batch import text_ids_of
from gmeta.data.pack import open_pack
from gmeta.models.inputs import InputSpec
from gmeta.models.layers import Standardised
from gmeta.models.melu import MeLU
from gmeta.parallel.mesh import Mesh

pytest.importorskip("transformers", reason=WHY)
pytestmark = pytest.mark.dist

SCENES = {**TEXTS, "scenario": "place"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def pack(folder: Path) -> Path:
    return text_pack(folder, SCENES, **in_words(text_rows()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("encoder") / "bert", "bert")


def args_of(encoder: Path, model: str, **args: Any) -> dict[str, Any]:
    found = {"model": model, "encoder": str(encoder), "layers": 2, "max_tokens": 8}
    return {**found, "args": {"hidden": [6]}, **args}


def settings_of(pack: Path, encoder: Path, model: str, **changes: Any) -> TrainConfig:
    return config(pack, model=ModelConfig(name="with_texts", embedding_dim=4, args=args_of(encoder, model)), **changes)


def test_vectors_are_those_of_the_equations(encoder: Path) -> None:
    """Each example by itself: the target's text, the mean over a list, their product, and a vector of the data; zeros
    for what is not there.
    """
    from gmeta.text.beside import WithTexts

    texts = ("", "w4 w5", "w6", "w7 w8 w9")
    inputs = InputSpec(
        {"user": 4, "title": 4},
        ("x",),
        0.3,
        sequences={"seen": 4},
        tables={"user": "user", "title": "text", "seen": "text"},
        texts={"title": 4, "seen": 4},
        text_tables={"text": texts},
        vectors={"image": 5},
    )
    torch.manual_seed(0)
    model = WithTexts(inputs, **args_of(encoder, "melu")).double().eval()
    assert isinstance(model.base, MeLU)
    title, seen = torch.tensor([[1], [3], [0]]), torch.tensor([[1, 2, 3], [2, 0, 0], [0, 0, 0]])
    embedded = {name: torch.randn(3, 4).double() for name in ("user", "title")}
    embedded |= {"seen": torch.randn(3, 3, 4).double(), "seen.mask": seen > 0}
    embedded |= {text_ids_of("title"): title, text_ids_of("seen"): seen}
    embedded["image"] = torch.randn(3, 5).double() * torch.tensor([[1], [0], [1]])
    dense = torch.randn(3, 1).double()

    pictures = torch.randn(9, 5)
    model.see_vectors({"image": pictures})
    texts_kept = model.source.kept[1:, 0]

    def read(place: int, vector: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(sample.double(), 0, correction=0)
        return model.towers[str(place)]((vector - mean) / std) if vector.any() else torch.zeros(4).double()

    def vector(place: int, text: int) -> torch.Tensor:
        return read(place, model.source.kept[text, 0].double() * (text > 0), texts_kept)

    for row in range(3):
        target = vector(0, int(title[row, 0]))
        there = [text for text in seen[row].tolist() if text]
        listed = sum((vector(1, text) for text in there), torch.zeros(4).double()) / max(1, len(there))
        made = {"text of title": target, "text of seen": listed, "text of seen*": listed * target}
        made["image"] = read(2, embedded["image"][row], pictures)
        one = {name: value[row] for name, value in embedded.items()}
        expected = model.base(dense[row], {**one, **made})
        torch.testing.assert_close(model(dense, embedded)[row], expected, rtol=1e-5, atol=1e-6)  # statistics are fp32


@pytest.mark.parametrize("tune", ["full", "lora", "norms"])
def test_upper_layers_read_lists_as_sequences(encoder: Path, tune: str) -> None:
    """Each example by itself: the states of the target's text alone, and the mean of those of a list, standardised by
    what the upper layers make of each text when the model is made; they are trained as `tune` says.
    """
    from gmeta.text.beside import WithTexts

    texts = ("", "w4 w5", "w6", "w7 w8 w9")
    inputs = InputSpec(
        {"user": 4, "title": 4},
        (),
        0.3,
        sequences={"seen": 4},
        tables={"user": "user", "title": "text", "seen": "text"},
        texts={"title": 4, "seen": 4},
        text_tables={"text": texts},
    )
    torch.manual_seed(0)
    model = WithTexts(inputs, **args_of(encoder, "melu", layers=1, tune=tune, rank=2)).double().train()
    assert model.high is not None
    high, kept = model.high, model.source.kept[:, 0].double()
    alone = torch.cat([high(kept[None, i : i + 1], torch.ones(1, 1, dtype=torch.bool))[0] for i in (1, 2, 3)])
    std, mean = torch.std_mean(alone.detach(), 0, correction=0)
    of = model.of_texts
    torch.testing.assert_close((of.mean, 1 / of.scale), (mean, std), rtol=1e-4, atol=1e-5)  # statistics are fp32
    title, seen = torch.tensor([[1], [3], [0]]), torch.tensor([[1, 2, 3], [3, 1, 0], [0, 0, 0]])
    embedded = {name: torch.randn(3, 4).double() for name in ("user", "title")}
    embedded |= {"seen": torch.randn(3, 3, 4).double(), "seen.mask": seen > 0}
    embedded |= {text_ids_of("title"): title, text_ids_of("seen"): seen}
    dense = torch.zeros(3, 0).double()

    def read(place: int, ids: list[int]) -> torch.Tensor:
        if not ids:
            return torch.zeros(4).double()
        states = high(kept[None, ids], torch.ones(1, len(ids), dtype=torch.bool))[0]
        return model.towers[str(place)]((states.mean(0) - of.mean) * of.scale)

    found = model(dense, embedded)
    for row in range(3):
        target, listed = (read(n, [i for i in ids[row].tolist() if i]) for n, ids in enumerate((title, seen)))
        one = {name: value[row] for name, value in embedded.items()}
        made = {"text of title": target, "text of seen": listed, "text of seen*": listed * target}
        expected = model.base(dense[row], {**one, **made})
        torch.testing.assert_close(found[row], expected)
    found.sum().backward()
    trained = {name for name, p in high.named_parameters() if p.grad is not None and p.grad.any()}
    part = {"full": "", "lora": ".up.", "norms": "norm"}[tune]  # what leads down has no gradient while up is 0
    assert trained
    assert all(part in name.lower() for name in trained)


def test_products_have_texts_and_vectors_among_them(encoder: Path) -> None:
    """Models of products multiply them with the embeddings of ids, but for the id of the target's text."""
    from gmeta.text.beside import WithTexts

    texts = ("", "w4 w5", "w6")
    tables = {"user": "user", "place": "place", "title": "text", "seen": "text"}
    inputs = InputSpec(
        {"user": 4, "place": 4, "title": 4},
        (),
        0.3,
        scenario="place",
        sequences={"seen": 4},
        tables=tables,
        texts={"title": 3, "seen": 3},
        text_tables={"text": texts},
        vectors={"image": 5},
    )
    read = {"user", "place", "seen", "text of title", "text of seen", "image"}
    model = WithTexts(inputs, **args_of(encoder, "dlrm"))
    assert set(model.base.vectors) == read
    assert "title" not in model.features, "rows of it are not asked for"
    assert set(WithTexts(inputs, **args_of(encoder, "deepfm")).base.pairs) == read
    gates = WithTexts(inputs, **args_of(encoder, "pepnet", args={"personal": ["user"], "bottom": [4]})).base
    assert set(gates.multiplied) == read - {"place"}


def test_standardised_vectors() -> None:
    """What does not vary is 0, none is none, and one vector alone tells nothing."""
    part = Standardised(3)
    sample = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 6.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(part(sample), sample)
    part.see(sample[:1])
    torch.testing.assert_close(part(sample), sample)
    part.see(sample)
    torch.testing.assert_close(part(sample), torch.tensor([[-1.0, 0, -1], [1, 0, 1], [0, 0, 0]]))


@pytest.mark.parametrize("nproc", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_sees_vectors_of_train_on_any_number_of_ranks(encoder: Path, tmp_path: Path, nproc: int) -> None:
    """Its bundle has their statistics."""
    rows = text_rows()
    pictures = np.random.default_rng(0).normal(3, 1, (len(rows["user"]), 3)).astype(np.float32)
    schema = {**SCENES, "vector": [{"name": "picture", "dim": 3}]}
    pack = text_pack(tmp_path, schema, **{**in_words(rows), "picture": pictures.tolist()})
    split = open_pack(pack).split("train")
    seen = split.vectors("picture", split.num_rows)
    assert len(seen) == split.num_rows
    assert 5 <= len(split.vectors("picture", 5)) < 12
    words = ["--pack", pack, "--model.name", "with_texts", "--model.embedding_dim", 4, "--schedule.max_steps", 2]
    words += ["--loader.tasks_per_batch", 4, "--model.args", json.dumps(args_of(encoder, "dlrm"))]
    gmeta("train", "--run_dir", tmp_path / "run", "--nproc", nproc, *words)
    gmeta("bundle", "--run_dir", tmp_path / "run", "--out", tmp_path / "bundle")
    model = package.load(tmp_path / "bundle").system.objective.model
    of = model.of_vectors["0"]
    torch.testing.assert_close(of.mean, torch.from_numpy(seen.mean(0)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1 / of.scale, torch.from_numpy(seen.std(0)), rtol=1e-5, atol=1e-6)


def test_a_warm_start_keeps_the_statistics(encoder: Path, tmp_path: Path) -> None:
    rows = text_rows()
    pictures = np.random.default_rng(0).normal(3, 1, (len(rows["user"]), 3)).astype(np.float32)
    schema, start = {**SCENES, "vector": [{"name": "picture", "dim": 3}]}, list[Path]()
    means = []
    for name, shift in (("first", 0), ("second", 5)):
        (tmp_path / name).mkdir()
        pack = text_pack(tmp_path / name, schema, **{**in_words(rows), "picture": (pictures + shift).tolist()})
        run, bundle = tmp_path / name / "run", tmp_path / name / "bundle"
        words = ["--pack", pack, "--run_dir", run, "--model.name", "with_texts", "--model.embedding_dim", 4]
        words += ["--schedule.max_steps", 1, "--model.args", json.dumps(args_of(encoder, "dlrm"))]
        gmeta("train", *words, *(word for path in start for word in ("--warm_start", path)))
        gmeta("bundle", "--run_dir", run, "--out", bundle)
        start = [bundle]
        means.append(package.load(bundle).system.objective.model.of_vectors["0"].mean)
    assert torch.equal(*means)


@pytest.mark.parametrize(("model", "adapt"), [("mmoe", ["decision"]), ("dlrm", []), ("neural_linear", ["last_layer"])])
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_learn_the_same(pack: Path, encoder: Path, model: str, adapt: list[str], nproc: int) -> None:
    settings = settings_of(pack, encoder, model, meta=MetaConfig(adapt=adapt))
    expected = run_steps(Mesh(), settings, 2)
    assert_same(run_ranks(nproc, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-8)


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_the_same_upper_layers(pack: Path, encoder: Path, nproc: int) -> None:
    args = args_of(encoder, "dlrm", layers=1, tune="full")
    model = ModelConfig(name="with_texts", embedding_dim=4, args=args)
    settings = config(pack, model=model, meta=MetaConfig(adapt=[]))
    expected = run_steps(Mesh(), settings, 2)
    assert any(".high." in name for name in expected)
    assert_same(run_ranks(nproc, run_divided, settings, 2, changing)[0]["learned"], expected, 1e-8)


@pytest.mark.parametrize("model", ["mmoe", "melu"])
def test_engines_learn_the_same(pack: Path, encoder: Path, model: str) -> None:
    both = [
        settings_of(pack, encoder, model, meta=MetaConfig(adapt=["decision"], inner_steps=2, engine=engine))
        for engine in ("auto", "reference")
    ]
    assert_same(*(run_steps(Mesh(), one, 2) for one in both), 1e-8)


def test_it_is_evaluated_bundled_and_loaded(pack: Path, encoder: Path, folder: Path, tmp_path: Path) -> None:
    """The bundle brings encoder and vectors along; new texts are read."""
    settings: dict[str, Any] = {"pack": str(pack), "run_dir": str(tmp_path / "run"), "schedule": {"max_steps": 3}}
    settings["model"] = {"name": "with_texts", "embedding_dim": 4, "args": args_of(encoder, "mmoe")}
    run = package.train(settings).path
    gmeta("evaluate", "--run_dir", run, "--resamples", 10, "--baselines", "false")
    gmeta("bundle", "--run_dir", run, "--out", tmp_path / "bundle")
    rows = pa.table(in_words(text_rows()))
    user = rows["user"][0].as_py()
    mine = rows.filter(pc.equal(rows["user"], user))
    support, query = mine.slice(0, 4), mine.slice(4)
    away = encoder.rename(encoder.with_name("away"))
    try:
        expected = np.asarray(package.load(tmp_path / "bundle").adapt(support).predict(query))
    finally:
        away.rename(encoder)
    np.testing.assert_allclose(package.load(run).adapt(support).predict(query), expected, atol=1e-5)
    new = query.set_column(query.column_names.index("item"), "item", pa.array(["w50 w51"] * len(query)))
    assert not np.allclose(package.load(run).adapt(support).predict(new), expected)


def test_what_cannot_be_is_named(pack: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--pack", pack, "--run_dir", tmp_path / "run", "--model.name", "with_texts"]
    words += ["--model.args.encoder", encoder, "--model.args.layers", 2, "--model.args.model"]
    fails([*words, "mmo"], capsys, "did you mean 'mmoe'")
    fails([*words, "with_texts"], capsys, "reads texts itself")
    fails([*words, "mmoe", "--model.args.args", "{expert: 2}"], capsys, "mmoe has no argument 'expert'")
    fails([*words, "mmoe", "--model.args.target", "last"], capsys, "model.args.target names 'last'")
    fails([*words, "mmoe", "--model.args.tune", "all"], capsys, "must be one of full, lora, norms, none")
