"""The last layer in closed form: against an independent float64 reference, and whatever surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import DIMS, FEATURES, NUM_NUMERIC, Problem, gradients, make_problem, poison_padding, tasks_of
from test_adapt_and_score import apart, query_of, stored
from test_engines import assert_same, learner_of
from torch import Tensor, nn
from torch.func import grad, jacrev

from gmeta.meta import closed_form
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.learner import MetaLearner
from gmeta.models.last_layer import BayesianLinear

LOSSES = {"bce": nn.BCEWithLogitsLoss(reduction="none"), "mse": nn.MSELoss(reduction="none")}


class Solved(nn.Module):
    """A layer, an embedding in the offset, and a last layer whose prior is anything but its start."""

    last_layer = "end"
    head = "first"

    def __init__(self, dropout: float = 0.0, width: int = 4) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(3)
        inputs = sum(DIMS[table] for table, _ in FEATURES.values()) + NUM_NUMERIC
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(inputs, width)
        self.end = BayesianLinear(width)
        with torch.no_grad():
            for parameter in self.end.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
        self.dropout = nn.Dropout(dropout)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        x = torch.cat([embedded[name] for name in FEATURES] + [dense], -1)
        return self.end(self.dropout(torch.tanh(self.first(x))), embedded["city"].sum(-1))


def solved(adapt: tuple[str, ...] = ("last_layer",), dropout: float = 0.0, **settings: object) -> MetaLearner:
    return learner_of(Solved(dropout), adapt=adapt, **settings)


def bases_of(learner: MetaLearner, problem: Problem, side: str) -> tuple[Tensor, Tensor]:
    """Bases [T, S, d + 1] and offsets [T, S], from dense products of lookups."""
    model, batch = learner.model, problem.batch
    examples, lookups = getattr(batch, side), getattr(problem.rows, side)
    embedded = {}
    for name, lookup in lookups.items():
        weight = problem.rows.weights[lookup.table]
        if lookup.lengths is None:
            embedded[name] = weight[lookup.index]
            continue
        pooled, at = [], 0
        for length in lookup.lengths.flatten().tolist():
            values = weight[lookup.index[at : at + length]]
            pooled.append(values.sum(0) / (max(length, 1) if lookup.pooling == "mean" else 1))
            at += length
        embedded[name] = torch.stack([*pooled, weight[0]])[:-1].view(*lookup.lengths.shape, weight.shape[1])
    x = torch.cat([embedded[name] for name in FEATURES] + [examples.dense], -1)
    basis = torch.tanh(model.first(x))
    return torch.cat([basis, torch.ones_like(basis[..., :1])], -1), embedded["city"].sum(-1)


def posterior_mode(layer: BayesianLinear, phi: Tensor, offset: Tensor, label: Tensor, loss: str) -> Tensor:
    """Minimise the loss over the rows plus the prior's, by Newton's method on weights, with every step in the graph."""
    scale, mean = layer.prior_scale(), layer.prior_mean()
    inverse = torch.linalg.inv(scale @ scale.T)
    noise = layer.noise()

    def energy(w: Tensor) -> Tensor:
        logits = phi @ w + offset
        fit = F.binary_cross_entropy_with_logits(logits, label, reduction="sum")
        fit = fit if loss == "bce" else ((logits - label) ** 2).sum() / (2 * noise)
        return fit + (w - mean) @ inverse @ (w - mean) / 2

    w = mean
    for _ in range(12 if loss == "bce" else 1):
        w = w - torch.linalg.solve(jacrev(grad(energy))(w), grad(energy)(w))
    return w


def by_reference(learner: MetaLearner, problem: Problem, loss: str, outer: str, order: str) -> dict[str, Tensor]:
    layer, batch = learner.model.end, problem.batch
    (phi, offset), (asked, base) = (bases_of(learner, problem, side) for side in ("support", "query"))
    total = phi.sum() * 0
    for t in range(batch.num_tasks):
        rows, query = batch.support.mask[t], batch.query.mask[t]
        w = posterior_mode(layer, phi[t, rows], offset[t, rows], batch.support.label[t, rows], loss)
        if order == "first":
            w = layer.prior_mean() + (w - layer.prior_mean()).detach()
        losses = LOSSES[outer](asked[t, query] @ w + base[t, query], batch.query.label[t, query])
        total = total + (losses.mean() if len(losses) else 0)
    total = total / batch.num_tasks_global
    return {"loss": total.detach()} | gradients(problem, learner, total)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("loss", "inner_loss"), [("bce", "bce"), ("mse", "mse"), ("bce", "mse")])
def test_solutions_and_gradients_are_those_of_the_reference(loss: str, inner_loss: str, order: str) -> None:
    problem = make_problem(binary=loss == "bce", support=(40, 2, 0, 3))
    learner = solved(loss=loss, inner_loss=inner_loss, order=order)
    found, out = learner(problem.rows, problem.batch)
    ours = {"loss": found.detach()} | gradients(problem, learner, found)
    assert_same(ours, by_reference(learner, problem, inner_loss, loss, order), 1e-8)
    assert learner.engine_reason == "closed form"
    assert out.query_logits.shape == problem.batch.query.mask.shape
    moved = ours["model.end.prior_factor"].abs().max()
    assert (moved > 1e-6) == (order == "second"), "the prior's covariance learns through the solution alone"


def test_padding_and_other_tasks_do_not_matter() -> None:
    problem = make_problem()
    learner = solved().eval()
    expected = learner(problem.rows, problem.batch)[1].query_logits
    mask = problem.batch.query.mask
    spoiled = learner(problem.rows, poison_padding(problem).batch)[1].query_logits
    torch.testing.assert_close(spoiled[mask], expected[mask])


@pytest.mark.parametrize("adapt", [("embeddings", "last_layer"), ("head", "last_layer"), ("dense", "last_layer")])
@pytest.mark.parametrize("order", ["first", "second"])
def test_steps_of_all_else_come_first(adapt: tuple[str, ...], order: str) -> None:
    """Both engines agree; and the last layer is solved for on the bases that the steps lead to."""
    problem = make_problem()
    results = []
    for engine in ("factored", "reference"):
        learner = solved(adapt, engine=engine, steps=2, order=order)
        assert not any("end" in name for name in learner.adapted.parameters)
        loss, out = learner(problem.rows, problem.batch)
        seen = {"logits": torch.where(problem.batch.query.mask, out.query_logits, 0), "support": out.support_loss}
        results.append(seen | {"loss": loss.detach()} | gradients(problem, learner, loss))
    assert_same(*results)
    alone = solved(engine="reference")(problem.rows, problem.batch)[0]
    assert abs(float(alone.detach() - results[0]["loss"])) > 1e-4, "the steps do something"


@pytest.mark.parametrize("adapt", [("last_layer",), ("embeddings.item", "last_layer")])
def test_apart_is_as_together_and_can_be_stored(adapt: tuple[str, ...]) -> None:
    problem, order = make_problem(), [3, 0, 2, 1, 0]
    learner, mask = solved(adapt, dropout=0.4, steps=2).eval(), problem.batch.query.mask
    together = learner(problem.rows, problem.batch)[1].query_logits
    fast, logits = apart(learner, problem)
    torch.testing.assert_close(logits[mask], together[mask])
    assert not any(tensor.requires_grad for tensor in fast.tensors())
    for steps, expected in zip((0, 2), learner.predict(problem.rows, problem.batch), strict=True):
        torch.testing.assert_close(apart(learner, problem, steps=steps)[1][mask], expected[mask])
    parts = [stored(fast.of_tasks([3, 0])), stored(fast.of_tasks([])), stored(fast.of_tasks([2, 1, 0]))]
    rows, query = query_of(problem, order)
    again = learner.score(FastWeights.join(parts), rows, query)
    torch.testing.assert_close(again[query.mask], logits[order][query.mask], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="different inner loops"):
        FastWeights.join([fast, apart(learner, problem, steps=0)[0]])


def test_dropout_follows_the_task() -> None:
    """A task drops the same units alone as among others, and its query others than its support."""
    problem = make_problem(support=(4, 4), query=(4, 4))
    learner = solved(dropout=0.5).train()
    whole = learner(problem.rows, problem.batch)[1].query_logits
    assert not torch.allclose(whole, learner.eval()(problem.rows, problem.batch)[1].query_logits)
    learner.train()
    rows, _ = query_of(problem, [1])
    batch = tasks_of(problem.batch, 1, 2)
    from problems import lookup_of

    support = {name: lookup_of(lookup, 1, 2) for name, lookup in problem.rows.support.items()}
    one = learner(replace(rows, support=support), batch)[1].query_logits
    torch.testing.assert_close(one[0], whole[1])


def test_the_posterior_is_exact_and_shrinks_with_support() -> None:
    learner = solved(loss="mse").eval()
    layer = learner.model.end
    spreads = []
    for size in (0, 3, 200):
        problem = make_problem(support=(size,), query=(3,), binary=False)
        fast = learner.adapt(problem.rows, problem.batch.support)
        phi = bases_of(learner, problem, "support")[0][0]
        scale = layer.prior_scale()
        precision = torch.linalg.inv(scale @ scale.T) + phi.T @ phi / layer.noise()
        covariance = fast.posterior.spread[0] @ fast.posterior.spread[0].T
        precision = precision.detach()
        torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-9, atol=1e-10)
        deviation = learner.deviation(fast, problem.rows, problem.batch.query)
        asked = bases_of(learner, problem, "query")[0][0]
        torch.testing.assert_close(deviation[0], (asked @ covariance @ asked.T).diagonal().sqrt())
        spreads.append(float(deviation.mean().detach()))
    assert spreads[0] > 2 * spreads[2]


def test_draws_have_the_posterior_s_moments() -> None:
    problem = make_problem(support=(3,), query=(3,))
    fast = solved().eval().adapt(problem.rows, problem.batch.support)
    draws = torch.randn(4000, *fast.posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    means = torch.stack([closed_form.sampled_weights(fast, noise).posterior.mean[0] for noise in draws])
    covariance = fast.posterior.spread[0] @ fast.posterior.spread[0].T
    torch.testing.assert_close(means.mean(0), fast.posterior.mean[0], rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(means.T), covariance, rtol=0.15, atol=0.06)


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_drift_is_one_more_base_that_the_query_does_not_have(loss: str) -> None:
    """A layer whose bases have the drift among them, as a column, solves for the same weights and covariances; padding
    does not count as rows. The learned drift has the same gradient as that column gives it.
    """
    layer, wide = BayesianLinear(2, drift_std=0.7).double(), BayesianLinear(3).double()
    draws = torch.Generator().manual_seed(0)
    basis, logits = (torch.randn(3, 5, *shape, dtype=torch.float64, generator=draws) for shape in ((2,), ()))
    sizes = torch.tensor([5, 3, 0])
    mask = torch.arange(5) < sizes[:, None]
    label = (torch.randn(3, 5, generator=draws) > 0).double()
    with torch.no_grad():
        layer.prior_factor.add_(0.2 * torch.randn(6, dtype=torch.float64, generator=draws))
        wide.prior_factor.copy_(torch.cat([layer.prior_factor.new_tensor([1.0]), wide.prior_factor[1:]]))
        row, column = torch.tril_indices(4, 4)
        inner = (row > 0) & (column > 0)
        wide.prior_factor[inner] = layer.prior_factor
        wide.prior_factor[(row > 0) & (column == 0)] = 0
    std, rows = layer.log_drift.exp()
    column = std * (1 - torch.exp(-(sizes[:, None] - torch.arange(5)) / rows))
    settings = {"loss": loss, "second_order": True}
    found = closed_form.solve(layer, basis, logits, label, mask, **settings)
    whole = torch.cat([column.unsqueeze(-1), basis], -1)
    expected = closed_form.solve(wide, whole, logits, label, mask, **settings)
    torch.testing.assert_close(found.mean, expected.mean[:, 1:])
    covariance = expected.spread @ expected.spread.mT
    torch.testing.assert_close(found.spread @ found.spread.mT, covariance[:, 1:, 1:])
    (ours,) = torch.autograd.grad(found.mean.square().sum(), layer.log_drift, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.mean[:, 1:].square().sum(), layer.log_drift)
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().min() > 1e-6


def test_clicks_are_scored_by_their_expected_probability() -> None:
    """Within MacKay's approximation: draws from the posterior have that mean probability. Training reads the mode."""
    problem = make_problem(support=(3, 0), query=(3, 2))
    learner = solved().eval()
    fast = learner.adapt(problem.rows, problem.batch.support)
    mask = problem.batch.query.mask
    expected = torch.sigmoid(learner.score(fast, problem.rows, problem.batch.query))
    draws = torch.randn(600, *fast.posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = [closed_form.sampled_weights(fast, noise) for noise in draws]
    probability = [torch.sigmoid(learner.score(one, problem.rows, problem.batch.query)) for one in drawn]
    torch.testing.assert_close(expected[mask], torch.stack(probability).mean(0)[mask], rtol=0, atol=0.03)
    at_mode = learner.train()(problem.rows, problem.batch)[1].query_logits
    known = replace(fast, posterior=replace(fast.posterior, spread=torch.zeros_like(fast.posterior.spread)))
    torch.testing.assert_close(at_mode[mask], learner.score(known, problem.rows, problem.batch.query)[mask])


def residual(learner: MetaLearner, fast: FastWeights, problem: Problem) -> float:
    """How far the mode is from a root, relative to the sum of its parts."""
    layer = learner.model.end
    phi, offset = bases_of(learner, problem, "support")
    label, mask = problem.batch.support.label, problem.batch.support.mask
    worst = 0.0
    for t, w in enumerate(fast.posterior.mean):
        p = phi[t, mask[t]]
        pull = torch.linalg.solve(layer.prior_scale() @ layer.prior_scale().T, w - layer.prior_mean())
        push = p.T @ (label[t, mask[t]] - torch.sigmoid(p @ w + offset[t, mask[t]]))
        worst = max(worst, float(((push - pull).abs().max() / (1 + push.abs().max())).detach()))
    return worst


CASES: dict[str, Callable[[Problem], Problem]] = {
    "one class": lambda p: Problem(
        p.rows, replace(p.batch, support=replace(p.batch.support, label=p.batch.support.mask.double()))
    ),
    "rows that are alike": lambda p: Problem(
        p.rows, replace(p.batch, support=replace(p.batch.support, dense=p.batch.support.dense * 0))
    ),
    "as drawn": lambda p: p,
}


@pytest.mark.parametrize("case", CASES)
def test_hard_supports_have_a_mode(case: str) -> None:
    """One class, singular bases, fewer rows than weights: the prior holds them, and Newton's method converges."""
    problem = CASES[case](make_problem(support=(300, 1, 2, 40), query=(1, 1, 1, 1)))
    learner = solved().eval()
    fast = learner.adapt(problem.rows, problem.batch.support)
    assert residual(learner, fast, problem) < 1e-6


@pytest.mark.parametrize("logit", [-4.0, 4.0, -10.0, 100.0])
def test_labels_that_contradict_a_confident_prior(logit: float) -> None:
    """Newton's method without a bound on its steps swings here, and had learned nothing when it stopped."""
    problem = CASES["one class"](make_problem(support=(50, 300, 1), query=(1, 1, 1)))
    support = problem.batch.support
    if logit > 0:
        support = replace(support, label=support.label * 0)
    learner = solved().eval()
    with torch.no_grad():
        learner.model.end.bias.fill_(logit)
    fast = learner.adapt(problem.rows, support)
    assert residual(learner, fast, Problem(problem.rows, replace(problem.batch, support=support))) < 1e-6


def test_easy_supports_take_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(support=(40, 2, 0, 3))
    learner = solved().eval()
    expected = learner.adapt(problem.rows, problem.batch.support).posterior
    monkeypatch.setattr(closed_form, "NEWTON_STEPS", 7)
    found = learner.adapt(problem.rows, problem.batch.support).posterior
    assert torch.equal(found.mean, expected.mean)


def test_a_task_s_result_does_not_depend_on_how_long_others_take() -> None:
    """An easy task beside one of which the labels contradict the prior."""
    layer, draws = BayesianLinear(3).double(), torch.Generator().manual_seed(0)
    basis = torch.randn(2, 50, 3, dtype=torch.float64, generator=draws)
    logits = torch.tensor([0.0, -9.0], dtype=torch.float64).view(2, 1).expand(2, 50)
    label, mask = torch.ones(2, 50, dtype=torch.float64), torch.ones(2, 50, dtype=torch.bool)
    settings = {"loss": "bce", "second_order": False}
    both = closed_form.solve(layer, basis, logits, label, mask, **settings)
    alone = closed_form.solve(layer, basis[:1], logits[:1], label[:1], mask[:1], **settings)
    torch.testing.assert_close(both.mean[:1], alone.mean, rtol=1e-13, atol=1e-13)


def test_a_support_of_a_million_rows() -> None:
    layer = BayesianLinear(3)
    basis = torch.randn(1, 1_000_000, 3, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(1, 1_000_000)
    label = (basis[..., 0] > 0).float()
    posterior = closed_form.solve(
        layer, basis, logits, label, torch.ones_like(label, dtype=torch.bool), loss="bce", second_order=False
    )
    w = posterior.mean[0].detach().double()
    mean = torch.sigmoid(basis[0].double() @ w[:3] + w[3])
    slope = ((label[0] - mean).unsqueeze(-1) * basis[0]).sum(0) - w[:3]
    assert (slope.abs() < 0.01 * w[0]).all()


@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize(("scale", "noise"), [(1.0, 1e-9), (1e4, 1.0), (1e6, 1.0)])
def test_singular_bases_and_hardly_any_noise_in_single_precision(loss: str, scale: float, noise: float) -> None:
    """Columns that are copies, fewer rows than weights, a constant label."""
    layer, draws = BayesianLinear(15, noise=noise), torch.Generator().manual_seed(0)
    basis = scale * torch.randn(1, 6, 5, generator=draws).repeat(1, 1, 3)
    mask = torch.ones(1, 6, dtype=torch.bool)
    posterior = closed_form.solve(layer, basis, torch.zeros(1, 6), mask.float(), mask, loss=loss, second_order=True)
    assert posterior.mean.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in posterior.tensors())
    logits = closed_form.with_one(basis[0]) @ posterior.mean[0].detach()
    assert (logits > 0).all()
    if loss == "mse" and noise < 1:
        torch.testing.assert_close(logits, torch.ones(6))


def test_a_task_that_is_not_finite_spoils_no_other() -> None:
    layer = BayesianLinear(2).double()
    basis = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis[1, 2, 0] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    posterior = closed_form.solve(
        layer, basis, torch.zeros(3, 4).double(), torch.ones(3, 4).double(), mask, loss="bce", second_order=True
    )
    assert posterior.mean.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_no_tasks_or_no_support(sizes: tuple[int, ...]) -> None:
    problem = make_problem(support=sizes, query=(2,) * len(sizes))
    learner = solved()
    loss, out = learner(problem.rows, problem.batch)
    assert loss.isfinite()
    gradients(problem, learner, loss)
    before, after = learner.predict(problem.rows, problem.batch)
    torch.testing.assert_close(before, after)
    assert (out.support_loss == 0).all()


class Changed(Solved):
    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return super().forward(dense, embedded) * 1.5


class Elsewhere(Solved):
    last_layer = "first"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="calls its last layer 1 times or changes what it returns"):
        learner_of(Changed(), adapt=["last_layer"])
    with pytest.raises(ValueError, match="which is a Linear: it must be a BayesianLinear"):
        learner_of(Elsewhere(), adapt=["last_layer"])
    with pytest.raises(ValueError, match=r"the support's loss is 'l1'.*set meta.inner_loss to mse"):
        solved(loss="l1")
    assert solved(loss="l1", inner_loss="mse").inner_loss_name == "mse"
    problem = make_problem()
    learner = learner_of(Solved(), adapt=["head"])
    with pytest.raises(ValueError, match="only a last layer that was solved for has a posterior"):
        learner.deviation(learner.adapt(problem.rows, problem.batch.support), problem.rows, problem.batch.query)
