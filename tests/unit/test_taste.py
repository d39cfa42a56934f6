"""The taste model: where it starts, what it adapts and by which engine, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gmeta.config.data import PrepareConfig
from gmeta.config.train import ModelConfig
from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch, map_tensors
from gmeta.data.pack import open_pack
from gmeta.data.prepare.prepare import prepare
from gmeta.data.schema import Feature, NumericColumn, PackSchema
from gmeta.data.schema_difference import schema_difference
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.models.inputs import base_rate
from gmeta.recommender.build import make_model

NAMES = ("item_id", "genre", "age", "zip")
DIM = 4


def schema(label_mean: float = 3.5, binary: bool = False, num_numeric: int = 2) -> PackSchema:
    return PackSchema(
        features=tuple(Feature(name=n, kind="categorical", num_ids=9, table=n) for n in NAMES),
        numeric=tuple(NumericColumn(name=f"x{i}") for i in range(num_numeric)),
        label="y",
        binary_label=binary,
        task="user_id",
        label_mean=label_mean,
    )


def config(**settings: object) -> ModelConfig:
    args = {"bottom": [5], "hidden": [6], "task_features": ["age", "zip"], **settings}
    return ModelConfig(name="taste", embedding_dim=DIM, args=args)


def inputs(*leading: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    embedded = {n: torch.randn(*leading, DIM, generator=generator) for n in NAMES}
    return torch.randn(*leading, 2, generator=generator), embedded


@pytest.mark.parametrize("settings", [{}, {"task_features": []}, {"hidden": [7, 6], "bottom": []}, {"dropout": 0.5}])
def test_any_leading_dimensions(settings: dict) -> None:
    model = make_model(config(**settings), schema()).eval()
    if model.prior is not None:
        torch.nn.init.normal_(model.prior.weight)
    dense, embedded = inputs(2, 3)
    logits = model(dense, embedded)
    for t in range(2):
        for s in range(3):
            one = model(dense[t, s], {n: e[t, s] for n, e in embedded.items()})
            torch.testing.assert_close(one, logits[t, s])
    assert model(*inputs(0, 5)).shape == (0, 5)


def test_task_features_reach_the_weights_only() -> None:
    model = make_model(config(), schema()).eval()
    dense, embedded = inputs(2, 3)
    logits = model(dense, embedded)
    other = embedded | {name: embedded[name] + 1 for name in ("age", "zip")}
    assert torch.equal(model(dense, other), logits)  # the prior starts at 0
    torch.nn.init.normal_(model.prior.weight)
    assert not torch.equal(model(dense, other), model(dense, embedded))


def test_the_output_starts_at_the_base_rate() -> None:
    for name in ("taste", "melu", "dlrm"):
        low, high = (make_model(ModelConfig(name=name, embedding_dim=DIM), schema(mean)).eval() for mean in (0.0, 3.5))
        assert torch.allclose(high(*inputs(2, 3)), low(*inputs(2, 3)) + 3.5, atol=1e-5), name
    assert base_rate(schema(0.8, binary=True)) == pytest.approx(math.log(4))
    assert base_rate(schema(1.0, binary=True)) == pytest.approx(math.log(999))
    assert base_rate(schema(0.0, binary=True)) == 0.0  # 0 stands for a mean that a pack does not record


def test_prepare_stores_the_mean_of_training_labels(tmp_path: Path) -> None:
    rows = [(user, item, (user * 7 + item) % 5 + 1) for user in range(20) for item in range(4)]
    lines = "".join(f"{user},{item},{label}\n" for user, item, label in rows)
    (tmp_path / "rows.csv").write_text("user,item,label\n" + lines)
    (tmp_path / "schema.yaml").write_text("task: user\nlabel: label\ncategorical: [item]\n")
    config = PrepareConfig(
        out=str(tmp_path / "pack"),
        input=[str(tmp_path / "rows.csv")],
        schema=str(tmp_path / "schema.yaml"),
        query_size=1,
        split_query="random",
        test_fraction=0.3,
    )
    prepare(config, report=lambda *_: None)
    pack = open_pack(tmp_path / "pack")
    train, every = pack.split("train").columns().label.mean(), np.mean([label for *_, label in rows])
    assert pack.schema.label_mean == pytest.approx(float(train), abs=1e-12)
    assert abs(pack.schema.label_mean - every) > 1e-3
    other = replace(pack.schema, label_mean=0.0)
    assert schema_difference(pack.schema, other) == []


def one_group() -> tuple[EmbeddedRows, TaskBatch]:
    """3 tasks of 4 + 2 rows, their last support row padding."""
    generator = torch.Generator().manual_seed(0)

    def side(length: int) -> tuple[dict[str, Lookup], Examples]:
        lookups = {n: Lookup("rows", torch.randint(9, (3, length), generator=generator)) for n in NAMES}
        mask = torch.arange(length).expand(3, -1) < 3
        label = 3.5 + torch.randn(3, length, generator=generator)
        dense = torch.randn(3, length, 2, generator=generator)
        return lookups, Examples({}, {}, dense, label * mask, mask, torch.zeros(3, length, dtype=torch.int64), ~mask)

    (support, examples), (query, queries) = side(4), side(2)
    weights = {"rows": torch.randn(9, DIM, generator=generator).requires_grad_()}
    batch = TaskBatch(examples, queries, torch.arange(3), num_tasks_global=3, epoch=0, index=0)
    return EmbeddedRows(weights, support, query), batch


def learner(engine: str, **settings: object) -> MetaLearner:
    model = make_model(config(dropout=0.3), schema()).double()
    values = {"adapt": ["decision"], "steps": 3, "lr": 0.5, "learn_lr": True, "loss": "huber", "prior": 5.0}
    features = dict.fromkeys(model.features, DIM)
    return MetaLearner(model, features, 2, InnerLoop(**{**values, **settings}), loss="l1", engine=engine).double()


def as_double(rows: EmbeddedRows, batch: TaskBatch) -> tuple[EmbeddedRows, TaskBatch]:
    rows = map_tensors(rows, lambda t: t.detach().double() if t.is_floating_point() else t)
    for weight in rows.weights.values():
        weight.requires_grad_()
    return rows, map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)


def test_the_factored_engine_adapts_the_decision() -> None:
    auto = learner("auto")
    rows, batch = as_double(*one_group())
    auto(rows, batch)
    assert auto.engine_reason == "factored"
    assert auto.adapted.parameters == ("taste.value", "offset.value", "shift.value", "output.weight")
    assert auto.rate_names == ("taste", "offset", "shift", "output")


def test_engines_agree() -> None:
    found = []
    for engine in ("factored", "reference"):
        ours = learner(engine)
        rows, batch = as_double(*one_group())
        loss, _ = ours(rows, batch)
        loss.backward()
        grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "rows": rows.weights["rows"].grad, **grads})
    assert found[0].keys() >= {"inner_lr", "model.tower.0.weight", "model.taste.value", "model.output.weight"}
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_adaptation_moves_towards_the_support() -> None:
    """A task that rates everything higher than the mean is predicted higher on other items."""
    ours = learner("auto", learn_lr=False).eval()
    rows, batch = as_double(*one_group())
    batch.support.label[0] += 2.0 * batch.support.mask[0]
    before, after = ours.predict(rows, batch)
    assert (after - before)[0].mean() > 0.2


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"task_features names every feature"):
        make_model(config(task_features=list(NAMES)), schema())
    with pytest.raises(ValueError, match=r"model\.args\.hidden is \[\]"):
        make_model(config(hidden=[]), schema())
    with pytest.raises(ValueError, match=r"model\.args\.task_features names 'ages', .* did you mean 'age'"):
        make_model(config(task_features=["ages"]), schema())
