"""Factored engine = reference engine = an independent torch.func implementation, gradients included."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from problems import DIMS, FEATURES, NUM_NUMERIC, Problem, gradients, inputs_of, make_problem, poison_padding, textbook
from torch import Tensor, nn

from gmeta.core.batch import map_tensors
from gmeta.meta import factored
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.models.dlrm import DLRM
from gmeta.models.melu import MeLU


class Net(nn.Module):
    """Linear layers, layer norm, an element-wise parameter, dropout: everything the factored engine adapts."""

    head = "out"
    decision_layers = ("first", "second", "out")

    def __init__(self, features: tuple[str, ...] = tuple(FEATURES), dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        width = sum(DIMS[FEATURES[name][0]] for name in features) + NUM_NUMERIC
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(width, 7)
            self.norm = nn.LayerNorm(7)
            self.second = nn.Linear(7, 5, bias=False)
            self.context = nn.Parameter(torch.randn(5))
            self.scale = nn.Parameter(torch.rand(5) + 0.5)
            self.out = nn.Linear(5, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in self.features] + [dense], -1)
        x = self.dropout(torch.tanh(self.norm(self.first(x))))
        x = torch.tanh(self.scale * self.second(x) + self.context)
        return self.out(x).squeeze(-1)


LOOP = {field.name for field in fields(InnerLoop)}


def learner_of(model: nn.Module, dtype: torch.dtype = torch.float64, **settings: object) -> MetaLearner:
    """`settings` are those of the inner loop and of the learner, in one; the model reads `features`."""
    names = settings.pop("features", tuple(FEATURES))
    loop = {name: settings.pop(name) for name in [*settings] if name in LOOP and name != "loss"}
    if "inner_loss" in settings:
        loop["loss"] = settings.pop("inner_loss")
    inner_loop = InnerLoop(**{"adapt": ["embeddings", "dense"], "lr": 0.3} | loop)
    features = {name: DIMS[FEATURES[name][0]] for name in names}
    return MetaLearner(model.to(dtype), features, NUM_NUMERIC, inner_loop, **settings).to(dtype)


def both(problem: Problem, model: nn.Module, **settings: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(loss, outputs and gradients) of the factored and of the reference engine."""
    results = []
    for engine in ("factored", "reference"):
        learner = learner_of(model, problem.batch.support.dense.dtype, engine=engine, **settings)
        loss, out = learner(problem.rows, problem.batch)
        mask = problem.batch.query.mask
        seen = {"loss": loss.detach(), "logits": torch.where(mask, out.query_logits, 0)}
        seen |= {"query_loss": out.query_loss, "support_loss": out.support_loss}
        results.append(seen | gradients(problem, learner, loss))
    return results[0], results[1]


def by_textbook(problem: Problem, learner: MetaLearner, **extra: object) -> dict[str, Tensor]:
    adapted = learner.adapted
    rate_of = {name: adapted.rate_of(name) for name in adapted.parameters} | {f"table {g}": 0 for g in DIMS}
    rates = learner.inner_lr
    if rates is None:
        rates = torch.full((learner.inner_loop.steps, len(adapted.rates)), learner.inner_loop.lr, dtype=torch.float64)
    loss = textbook(
        problem,
        learner.model,
        adapted.parameters,
        adapted.features,
        rates,
        rate_of,
        learner.inner_loop.order == "second",
        nn.BCEWithLogitsLoss(reduction="none"),
        nn.BCEWithLogitsLoss(reduction="none"),
        **extra,
    )
    return {"loss": loss.detach()} | gradients(problem, learner, loss)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in theirs.items():
        difference = (ours[name] - value).abs().max().item() if value.numel() else 0.0
        assert difference <= tolerance * max(1.0, value.abs().max().item() if value.numel() else 0), name


ADAPTED_SETS = [
    ["embeddings", "dense"],
    ["embeddings"],
    ["head"],
    ["decision"],
    ["dense"],
    ["embeddings.item"],
    ["embeddings.history", "embeddings.tags", "first.*"],
    ["*.bias", "context"],
    ["*.weight"],
]


@pytest.mark.parametrize("adapt", ADAPTED_SETS, ids=lambda names: "+".join(names))
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["first", "second"])
def test_engines_agree_with_torch_func(adapt: list[str], steps: int, order: str) -> None:
    problem, model = poison_padding(make_problem()), Net().double()
    settings = {"adapt": adapt, "steps": steps, "order": order}
    fast, slow = both(problem, model, **settings)
    assert_same(fast, slow)
    assert_same(fast, by_textbook(problem, learner_of(model, **settings)))


@pytest.mark.parametrize("adapt", [["embeddings", "dense"], ["*.bias", "context"], ["embeddings.item"]])
@pytest.mark.parametrize("learn_inner_lr", [False, True])
def test_recomputed_inner_steps_give_the_same(adapt: list[str], learn_inner_lr: bool) -> None:
    problem, model = make_problem(), Net(dropout=0.3).double()
    settings = {"adapt": adapt, "steps": 3, "learn_lr": learn_inner_lr, "prior": 0.5}
    kept, _ = both(problem, model, **settings)
    again, _ = both(problem, model, **settings, recompute=True)
    assert_same(again, kept, 1e-13)
    assert kept.keys() == again.keys()


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("steps", [1, 3])
def test_float32(order: str, steps: int) -> None:
    problem, model = make_problem(torch.float32), Net()
    fast, slow = both(problem, model, steps=steps, order=order)
    assert_same(fast, slow, 1e-5)


@examples(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=4),
    adapt=st.sampled_from(ADAPTED_SETS),
    steps=st.integers(1, 3),
    order=st.sampled_from(["first", "second"]),
    features=st.sets(st.sampled_from(sorted(FEATURES)), min_size=1),
    seed=st.integers(0, 99),
)
def test_engines_agree_on_any_shape(
    sizes: list[tuple[int, int]], adapt: list[str], steps: int, order: str, features: set[str], seed: int
) -> None:
    names = tuple(sorted(features))
    adapt = [name for name in adapt if name.partition(".")[2] in features or not name.startswith("embeddings.")]
    problem = make_problem(
        support=tuple(s for s, _ in sizes), query=tuple(q for _, q in sizes), seed=seed, features=names
    )
    assert_same(*both(problem, Net(names).double(), adapt=adapt, steps=steps, order=order, features=names))


def test_an_index_made_ahead_changes_nothing() -> None:
    problem, learner = make_problem(), learner_of(Net().double())
    num_rows = {table: len(weight) for table, weight in problem.rows.weights.items()}
    index = learner.index(problem.rows.support, problem.rows.query, num_rows)
    assert torch.equal(learner(problem.rows, problem.batch, index)[0], learner(problem.rows, problem.batch)[0])
    for ahead, here in zip(
        learner.predict(problem.rows, problem.batch, index),
        learner.predict(problem.rows, problem.batch),
        strict=True,
    ):
        assert torch.equal(ahead, here)


def test_second_order_is_material() -> None:
    """The parity tests would notice a first-order engine: gradients differ by far more than their tolerance."""
    problem, model = make_problem(), Net().double()
    second, _ = both(problem, model, order="second")
    first, _ = both(problem, model, order="first")
    assert_same(first, {"loss": second["loss"]})
    for name in ("model.first.weight", "table wide", "table narrow"):
        assert (first[name] - second[name]).norm() > 0.05 * second[name].norm(), name


def test_finite_differences() -> None:
    problem, learner = make_problem(), learner_of(Net().double(), steps=2, learn_lr=True)
    loss, _ = learner(problem.rows, problem.batch)
    generator = torch.Generator().manual_seed(1)
    for name, grad in gradients(problem, learner, loss).items():
        leaf = {**dict(learner.named_parameters()), **{f"table {g}": w for g, w in problem.rows.weights.items()}}[name]
        way = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                leaf.add_(way, alpha=step)
            values.append(learner(problem.rows, problem.batch)[0].item())
            with torch.no_grad():
                leaf.sub_(way, alpha=step)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((grad * way).sum().item(), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("order", ["first", "second"])
def test_learned_rates_have_exact_gradients(order: str) -> None:
    problem, model = make_problem(), Net().double()
    settings = {"steps": 3, "learn_lr": True, "order": order}
    fast, slow = both(problem, model, **settings)
    assert fast["inner_lr"].abs().min() > 1e-7
    assert_same(fast, slow)
    assert_same(fast, by_textbook(problem, learner_of(model, **settings)))


def test_tasks_share_rows_and_sides_overlap() -> None:
    """Every lookup is row 1: all tasks, both sides and all features of a table meet in one row."""
    problem = make_problem()
    rows = map_tensors(problem.rows, lambda t: t if t.is_floating_point() else torch.ones_like(t))
    lengths = {
        side: {n: replace(lo, lengths=getattr(problem.rows, side)[n].lengths) for n, lo in getattr(rows, side).items()}
        for side in ("support", "query")
    }
    weights = {table: weight.detach().requires_grad_() for table, weight in problem.rows.weights.items()}
    problem = Problem(replace(rows, weights=weights, **lengths), problem.batch)
    model = Net().double()
    fast, slow = both(problem, model, steps=3)
    assert_same(fast, slow)
    assert_same(fast, by_textbook(problem, learner_of(model, steps=3)))
    assert fast["table wide"][0].abs().sum() == 0 < fast["table wide"][1].abs().sum()


@pytest.mark.parametrize(("loss", "inner_loss"), [("mse", None), ("l1", "mse"), ("huber", "l1"), ("bce", "huber")])
def test_losses(loss: str, inner_loss: str | None) -> None:
    fast, slow = both(make_problem(binary=loss == "bce"), Net().double(), loss=loss, inner_loss=inner_loss)
    assert_same(fast, slow)


@pytest.mark.parametrize("order", ["first", "second"])
def test_pseudo_rows(order: str) -> None:
    problem, model = make_problem(), Net().double()
    fast, slow = both(problem, model, prior=2.5, steps=3, order=order)
    assert_same(fast, slow)
    without, _ = both(problem, model, steps=3, order=order)
    assert_same({"first": fast["support_loss"]}, {"first": without["support_loss"]})
    assert (fast["loss"] - without["loss"]).abs() > 1e-4


def test_pseudo_rows_scale_a_tasks_steps_by_its_rows() -> None:
    """n / (n + prior) of the rate: with n = 4 rows everywhere, a prior of 4 halves it."""
    problem, model = make_problem(support=(4, 4, 4, 4)), Net().double()
    half, _ = both(problem, model, lr=0.15)
    same, _ = both(problem, model, prior=4.0)
    assert_same(same, half)


@pytest.mark.parametrize("adapt", [["embeddings", "dense"], []])
def test_dropout_is_the_same_in_any_slot_and_engine(adapt: list[str]) -> None:
    problem, model = make_problem(), Net(dropout=0.4).double()
    fast, slow = both(problem, model, adapt=adapt, steps=2)
    assert_same(fast, slow)
    alone = make_problem(support=(4, 2, 0, 3, 6), query=(2, 3, 2, 0, 5))  # other numbers: only the masks can agree
    masks = [_dropped_units(p, adapt) for p in (problem, alone)]
    for task in range(4):
        for side in range(2):
            length = masks[0][side].shape[1]
            assert torch.equal(masks[0][side][task], masks[1][side][task, :length])
    assert 0.2 < masks[1][0].double().mean() < 0.6
    learner = learner_of(model, adapt=adapt)
    again = replace(problem.batch, index=problem.batch.index + 1)
    assert learner(problem.rows, problem.batch)[0] != learner(problem.rows, again)[0]
    learner.eval()
    assert learner(problem.rows, problem.batch)[0] == learner(problem.rows, again)[0]


def _dropped_units(problem: Problem, adapt: list[str]) -> list[Tensor]:
    """Which units dropout zeroed: [T, S, width] of the support's and of the query's pass."""
    model, dropped = Net(dropout=0.4).double(), []
    learner = learner_of(model, adapt=adapt, engine="factored")
    model.dropout.register_forward_hook(lambda _module, _args, out: dropped.append(out == 0))
    learner(problem.rows, problem.batch)
    if adapt:
        return dropped
    shapes = [side.mask.shape for side in (problem.batch.support, problem.batch.query)]
    parts = dropped[0].split([shape.numel() for shape in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


@pytest.mark.parametrize("engine", ["factored", "reference"])
@pytest.mark.parametrize("adapt", [["embeddings", "dense"], []])
@pytest.mark.parametrize("support", [(), (0, 0)])
def test_no_tasks_or_no_support(engine: str, adapt: list[str], support: tuple[int, ...]) -> None:
    problem = make_problem(support=support, query=(0,) * len(support))
    learner = learner_of(Net().double(), engine=engine, adapt=adapt, steps=2, learn_lr=True)
    loss, out = learner(problem.rows, problem.batch)
    loss.backward()
    assert loss == 0
    assert out.query_logits.shape == (len(support), 0)
    assert out.query_loss.shape == out.support_loss.shape == (len(support),)
    for leaf in (*learner.parameters(), *problem.rows.weights.values()):
        assert leaf.grad is None or not leaf.grad.any()


def test_a_task_without_support_is_not_adapted() -> None:
    problem, learner = make_problem(), learner_of(Net().double(), steps=2)
    before, after = learner.predict(problem.rows, problem.batch)
    mask = problem.batch.query.mask
    assert torch.equal(before[2][mask[2]], after[2][mask[2]])
    assert (before[0] - after[0])[mask[0]].abs().min() > 1e-4


def test_plain_training_is_the_mean_over_support_and_query() -> None:
    problem, model = make_problem(), Net().double()
    learner = learner_of(model, adapt=[])
    loss, out = learner(problem.rows, problem.batch)
    adapting = learner_of(model, engine="reference")
    _, by_side = adapting(problem.rows, problem.batch)
    sizes = [side.mask.sum(1) for side in (problem.batch.support, problem.batch.query)]
    expected = (out.support_loss * sizes[0] + out.query_loss * sizes[1]) / (sizes[0] + sizes[1])
    assert loss.item() == pytest.approx(expected.sum().item() / problem.batch.num_tasks_global, rel=1e-12)
    torch.testing.assert_close(out.support_loss, by_side.support_loss)
    before, after = learner.predict(problem.rows, problem.batch)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, out.query_logits)


@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_predict(engine: str) -> None:
    problem, model = make_problem(), Net(dropout=0.4).double()
    mask = problem.batch.query.mask
    learner = learner_of(model, engine=engine, steps=2)
    with torch.no_grad():
        before, after = learner.predict(problem.rows, problem.batch)
    assert not before.requires_grad
    assert not after.requires_grad
    assert all(weight.grad is None for weight in problem.rows.weights.values())
    trained = learner.eval()(problem.rows, problem.batch)[1].query_logits
    torch.testing.assert_close(after[mask], trained[mask], rtol=0, atol=1e-12)
    unadapted = learner_of(model, adapt=[]).eval()(problem.rows, problem.batch)[1].query_logits
    torch.testing.assert_close(before[mask], unadapted[mask], rtol=0, atol=1e-12)
    more, one = (
        learner_of(model, engine=engine, steps=n, lr=0.05).predict(problem.rows, problem.batch)[1] for n in (4, 1)
    )
    torch.testing.assert_close(learner.predict(problem.rows, problem.batch, steps=4, inner_lr=0.05)[1], more)
    torch.testing.assert_close(learner.predict(problem.rows, problem.batch, steps=1, inner_lr=0.05)[1], one)
    frozen = Problem(replace(problem.rows, weights={g: w.detach() for g, w in problem.rows.weights.items()}), None)
    torch.testing.assert_close(learner.requires_grad_(False).predict(frozen.rows, problem.batch)[1], after)


def test_learned_rates_repeat_beyond_their_last_step() -> None:
    problem = make_problem()
    learner = learner_of(Net().double(), steps=2, learn_lr=True)
    with torch.no_grad():
        learner.inner_lr[1] *= 0.5
    longer = learner_of(learner.model, steps=4, learn_lr=True)
    with torch.no_grad():
        longer.inner_lr.copy_(learner.inner_lr[[0, 1, 1, 1]])
    expected = longer.predict(problem.rows, problem.batch)[1]
    torch.testing.assert_close(learner.predict(problem.rows, problem.batch, steps=4)[1], expected)


def test_forming_weights_is_exact_and_chosen_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, model = make_problem(), Net().double()
    chosen: list[bool] = []
    count = factored.forming_is_cheaper
    monkeypatch.setattr(factored, "forming_is_cheaper", lambda *args: chosen.append(count(*args)) or chosen[-1])
    as_counted, _ = both(problem, model, steps=3)
    assert any(chosen)
    assert not all(chosen)
    for always in (True, False):
        monkeypatch.setattr(factored, "forming_is_cheaper", lambda *args, always=always: always)
        assert_same(as_counted, both(problem, model, steps=3)[0])


@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_bf16_autocast_stays_near_float32(engine: str) -> None:
    """Losses within 2 %, gradients within 5 % of their norm; what the inner loop differentiates stays float32."""
    problem, model = make_problem(torch.float32), Net()
    exact, _ = both(problem, model, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        learner = learner_of(model, torch.float32, steps=2, engine=engine)
        steps: list[Tensor] = []
        hook = learner.model.first.register_forward_hook(lambda _module, _args, out: steps.append(out))
        loss, out = learner(problem.rows, problem.batch)
    hook.remove()
    assert engine == "reference" or all(step.dtype == torch.float32 for step in steps)
    assert out.query_logits.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact["loss"].item(), rel=0.02)
    assert loss.item() != exact["loss"].item()
    for name, grad in gradients(problem, learner, loss).items():
        assert (grad - exact[name]).norm() <= 0.05 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize("name", ["melu", "dlrm"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_models(name: str, order: str) -> None:
    """The models of gmeta/models, with everything switched on."""
    features = ("user", "item", "history")
    problem = make_problem(features=features)
    inputs = inputs_of(features, DIMS["wide"], NUM_NUMERIC)
    sizes = {"hidden": [8, 5], "layer_norm": True, "dropout": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MeLU(inputs, **sizes) if name == "melu" else DLRM(inputs, bottom=[4], **sizes)
    for adapt in (["embeddings", "dense"], ["decision"], ["head"]):
        settings = {"adapt": adapt, "features": features, "order": order, "steps": 2}
        assert_same(*both(problem, model.double(), **settings))


class Tied(Net):
    """Uses one layer twice, which the factored engine refuses."""

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.tanh(self.first(torch.cat([*embedded.values(), dense], -1)))
        x = torch.tanh(self.norm(self.square(torch.tanh(self.square(x)))))
        return self.out(self.second(x) * self.scale + self.context).squeeze(-1)

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(7, 7)
        with torch.no_grad():
            self.square.weight.copy_(torch.eye(7).roll(1, 0))


def test_auto_takes_the_reference_for_what_factored_cannot() -> None:
    problem, learner = make_problem(), learner_of(Tied().double(), steps=2)
    loss, _ = learner(problem.rows, problem.batch)
    assert "cannot adapt 'square.weight'" in learner.engine_reason
    assert_same({"loss": loss} | gradients(problem, learner, loss), by_textbook(problem, learner))
    with pytest.raises(factored.Unsupported, match=r"square.weight.* twice.*set meta.engine to 'reference'"):
        learner_of(Tied().double(), engine="factored")(problem.rows, problem.batch)
    untied = learner_of(Tied().double(), adapt=["embeddings", "head", "first.*"], steps=2)
    loss, _ = untied(problem.rows, problem.batch)
    assert untied.engine_reason == "factored"
    assert_same({"loss": loss} | gradients(problem, untied, loss), by_textbook(problem, untied))


def kept_bytes(problem: Problem, learner: MetaLearner) -> int:
    """Bytes of all tensors that the graph of one step keeps for the backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        learner(problem.rows, problem.batch)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_memory_grows_by_a_constant_for_each_inner_step(layer_norm: bool) -> None:
    """For K = 1..5; a copy of all earlier steps in each would grow faster. Recomputing keeps a step's state alone."""
    problem = make_problem(torch.float32, support=(6,) * 8, query=(6,) * 8, features=("user", "item", "history"))
    inputs = inputs_of(problem.rows.support, DIMS["wide"], NUM_NUMERIC)
    model = MeLU(inputs, hidden=[64, 32], layer_norm=layer_norm)
    layer_inputs = 4 * 8 * 6 * sum(layer.in_features for layer in (*model.layers, model.output))
    slopes = {}
    for recompute in (False, True):
        learners = [
            learner_of(model, torch.float32, features=model.features, steps=steps, recompute=recompute)
            for steps in range(1, 6)
        ]
        sizes = [kept_bytes(problem, learner) for learner in learners]
        slopes[recompute] = [(after - before) / layer_inputs for before, after in itertools.pairwise(sizes)]
        assert max(slopes[recompute]) < 1.4 * min(slopes[recompute])
    assert max(slopes[False]) < (12 if layer_norm else 4), slopes
    assert max(slopes[True]) < 0.8 * max(slopes[False]) or not layer_norm, slopes
