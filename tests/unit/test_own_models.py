"""Models of one's own: what is refused by name before training, what is followed, and that nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmeta.core.batch import EmbeddedRows, Examples, Lookup, TaskBatch
from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator

WIDTH = 6
FEATURES = {"user": WIDTH, "item": WIDTH}
Forward = Callable[[Any, Tensor, dict[str, Tensor]], Any]


class Own(nn.Module):
    """Two linear layers, whatever else is given, and a forward that is given."""

    head = "out"

    def __init__(self, forward: Forward, **extras: nn.Module | nn.Parameter) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        for name, extra in extras.items():
            setattr(self, name, extra)
        self.apply_to = forward

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Any:
        return self.apply_to(self, dense, embedded)

    def hidden(self, embedded: dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.mix(torch.cat([embedded["user"], embedded["item"]], -1)))

    def logit(self, hidden: Tensor) -> Tensor:
        return self.out(hidden).squeeze(-1)


def learner_of(model: nn.Module, num_numeric: int = 2, engine: str = "auto", **settings: Any) -> MetaLearner:
    loop = InnerLoop(**{"adapt": ["dense"], "lr": 0.3} | settings)
    return MetaLearner(model.double(), FEATURES, num_numeric, loop, engine=engine).double()


def problem(support: tuple[int, ...] = (4, 2, 0), query: tuple[int, ...] = (2, 3, 2)) -> tuple[EmbeddedRows, TaskBatch]:
    generator = torch.Generator().manual_seed(1)

    def side(sizes: tuple[int, ...]) -> tuple[dict[str, Lookup], Examples]:
        mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        lookups = {n: Lookup("rows", torch.randint(0, 7, mask.shape, generator=generator) * mask) for n in FEATURES}
        dense = torch.randn(*mask.shape, 2, generator=generator, dtype=torch.float64)
        label = (torch.rand(mask.shape, generator=generator) < 0.5).double()
        return lookups, Examples({}, {}, dense * mask[..., None], label * mask, mask, mask.long(), ~mask)

    (support_rows, examples), (query_rows, queries) = side(support), side(query)
    weights = {"rows": torch.randn(7, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()}
    batch = TaskBatch(examples, queries, torch.arange(len(support)), num_tasks_global=3, epoch=0, index=0)
    return EmbeddedRows(weights, support_rows, query_rows), batch


def stacked(embedded: dict[str, Tensor]) -> Tensor:
    """Both features as a sequence [n, 2, WIDTH]."""
    return torch.stack([embedded["user"], embedded["item"]], -2).reshape(-1, 2, WIDTH)


GOOD: dict[str, Forward] = {
    "plain": lambda m, d, e: m.logit(m.hidden(e)),
    "softmax over the last dimension": lambda m, d, e: m.logit(torch.softmax(m.hidden(e), -1)),
    "example-wise norm": lambda m, d, e: m.logit(F.normalize(m.hidden(e), dim=-1)),
    "size of the last dimension": lambda m, d, e: m.logit(m.hidden(e).reshape(*d.shape[:-1], WIDTH)),
    "index in the last dimension": lambda m, d, e: m.out(m.hidden(e))[..., 0] + d[..., 0],
    "interaction of features": lambda m, d, e: m.logit((stacked(e) @ stacked(e).mT @ stacked(e)).sum(-2)).view(
        d.shape[:-1]
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_keeps_examples_apart_passes(case: str) -> None:
    for engine, adapt in (("auto", ["dense"]), ("reference", ["head"]), ("auto", [])):
        adapt = ["head"] if case == "interaction of features" and adapt else adapt
        learner_of(Own(GOOD[case]), engine=engine, adapt=adapt)


MIXING: dict[str, tuple[Forward, str]] = {
    "centred": (lambda m, d, e: m.logit(m.hidden(e) - m.hidden(e).mean(0, keepdim=True)), "sub"),
    "softmax over examples": (lambda m, d, e: m.logit(m.hidden(e)) * torch.softmax(d[..., 0], 0), "softmax"),
    "batch norm": (
        lambda m, d, e: m.logit(F.batch_norm(m.hidden(e).reshape(-1, WIDTH), None, None, training=True)).view(
            d.shape[:-1]
        ),
        "batch_norm",
    ),
    "batch norm while training": (
        lambda m, d, e: m.logit(
            F.batch_norm(m.hidden(e).reshape(-1, WIDTH), d.new_zeros(WIDTH), d.new_ones(WIDTH), training=m.training)
        ).view(d.shape[:-1]),
        "batch_norm",
    ),
    "attention over examples": (
        lambda m, d, e: m.logit(torch.softmax(m.hidden(e) @ m.hidden(e).mT, -1) @ m.hidden(e)),
        "softmax|matmul",
    ),
    "sorted": (lambda m, d, e: m.logit(m.hidden(e)).sort(-1).values, "sort"),
    "cumulative": (lambda m, d, e: m.logit(m.hidden(e).cumsum(-2)), "cumsum"),
    "largest": (lambda m, d, e: m.logit(m.hidden(e)) - m.logit(m.hidden(e)).max(), ""),
}


@pytest.mark.parametrize("engine", ["auto", "reference", "plain"])
@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_examples_is_refused_by_name(case: str, engine: str) -> None:
    forward, call = MIXING[case]
    settings = {"adapt": []} if engine == "plain" else {"engine": engine}
    where = rf" in ({call}) \(test_own_models\.py, line \d+\)" if call else ""
    with pytest.raises(ValueError, match=rf"Own\.forward mixes examples{where}: "):
        learner_of(Own(forward), **settings)


ONE_FORM: dict[str, tuple[Forward, str]] = {
    "softmax over dim 1": (lambda m, d, e: m.logit(torch.softmax(m.hidden(e), 1)), r"mixes examples in softmax \("),
    "normalize": (lambda m, d, e: m.logit(F.normalize(m.hidden(e))), r"mixes examples in normalize \("),
    "cat along dim 1": (
        lambda m, d, e: m.logit(torch.tanh(m.mix(torch.cat([e["user"], e["item"]], 1)))),
        r"fails at test_own_models\.py, line \d+, for dense \[2, 3, 2\] and embedded \[2, 3, 6\]: RuntimeError: mat1",
    ),
    "view by the batch's size": (
        lambda m, d, e: m.logit(torch.tanh(m.mix(torch.stack([e["user"], e["item"]], -2).view(d.size(0), -1)))),
        r"fails at .*for dense \[2, 3, 2\]",
    ),
    "first column": (lambda m, d, e: m.out(m.hidden(e))[:, 0], r"returns \[2, 1\] for dense \[2, 3, 2\]"),
    "squeeze dim 1": (lambda m, d, e: m.out(m.hidden(e)).squeeze(1), r"returns \[2, 3, 1\] for dense \[2, 3, 2\]"),
    "sum over dim 1": (lambda m, d, e: m.out(m.hidden(e)).sum(1), r"returns \[2, 1\] for dense \[2, 3, 2\]"),
}


@pytest.mark.parametrize("case", ONE_FORM)
def test_what_is_right_for_a_list_of_examples_alone_gets_the_reference(case: str) -> None:
    """The reference engine and plain training call the model with [examples, ...]; auto falls back and says why."""
    forward, message = ONE_FORM[case]
    why = rf"{message}(?s:.*)dim=-1(?s:.*)meta.engine to 'reference'"
    with pytest.raises(ValueError, match=why):
        learner_of(Own(forward), engine="factored")
    if case == "view by the batch's size":  # which fails for no example at all
        with pytest.raises(ValueError, match=r"fails at .*for dense \[0, 2\]"):
            learner_of(Own(forward))
        return
    learner_of(Own(forward), adapt=[])
    learner = learner_of(Own(forward), steps=2)
    assert learner.engine == "reference"
    assert re.search(why, learner.engine_reason)
    rows, batch = problem()
    assert torch.equal(learner(rows, batch)[0], learner_of(Own(forward), engine="reference", steps=2)(rows, batch)[0])


@pytest.mark.parametrize("layer", ["PReLU", "GRU"])
def test_a_layer_that_takes_rows_alone_gets_the_reference(layer: str) -> None:
    """These modules want channels or features in dimension 1, or refuse four dimensions."""
    if layer == "PReLU":
        model = Own(lambda m, d, e: m.logit(m.act(m.hidden(e))), act=nn.PReLU(WIDTH))
    else:
        gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        model = Own(lambda m, d, e: m.logit(m.hidden(e) + m.gru(torch.stack([*e.values()], -2))[1][0]), gru=gru)
    learner = learner_of(model)
    assert learner.engine == "reference"
    assert learner.engine_reason.startswith("reference, because Own.forward fails at test_own_models.py")


def test_zeros_hide_nothing() -> None:
    """A last layer that starts at 0 makes every logit 0, whatever comes before."""
    model = Own(lambda m, d, e: m.logit(m.hidden(e) - m.hidden(e).mean(0)))
    nn.init.zeros_(model.out.weight)
    with pytest.raises(ValueError, match=r"mixes examples in (mean|sub)"):
        learner_of(model)
    assert not model.out.weight.any()


FAILING: dict[str, tuple[Forward, str]] = {
    "one dimension too many": (lambda m, d, e: m.out(m.hidden(e)), r"returns \[6, 1\].*squeeze\(-1\)"),
    "all dimensions squeezed": (lambda m, d, e: m.out(m.hidden(e)).squeeze(), r"returns \[\] for dense \[1, 2\]"),
    "no tensor": (lambda m, d, e: {"logits": m.logit(m.hidden(e))}, "returns a dict for"),
    "another feature": (
        lambda m, d, e: m.logit(e["city"]),
        r"fails at .*KeyError: 'city' \(embedded has: user, item\)",
    ),
    "an error of its own": (lambda m, d, e: 1 // 0, r"fails at test_own_models.py, line \d+,.*ZeroDivisionError"),
    "a wrong width": (lambda m, d, e: m.logit(d), r"fails at test_own_models.py, .*mat1 and mat2"),
    "no gradient": (lambda m, d, e: m.logit(m.hidden(e)).detach(), "returns logits without a gradient"),
    "inputs in place": (lambda m, d, e: m.logit(m.hidden(e)) + d.mul_(2)[..., 0], "changes its inputs in place"),
    "joined inputs in place": (
        lambda m, d, e: m.logit(torch.tanh(m.mix(torch.cat([e["user"], e["item"]], -1).relu_()))),
        "changes its inputs in place",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_what_fails_is_named(case: str) -> None:
    forward, message = FAILING[case]
    for settings in ({"engine": "auto"}, {"engine": "reference"}, {"adapt": []}):
        with pytest.raises(ValueError, match=rf"Own\.forward {message}") as caught:
            learner_of(Own(forward), **settings)
        if "fails" in message:
            assert caught.value.__cause__ is not None


def test_a_forward_of_other_arguments_is_named() -> None:
    class Other(Own):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"Other\.forward\(.*\).* cannot be called with \(dense, embedded\)"):
        learner_of(Other(lambda m, d, e: d))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (nn.Embedding(5, WIDTH), "an embedding table of its own at 'extra'.*feature of the pack"),
        (nn.EmbeddingBag(5, WIDTH), "an embedding table of its own at 'extra'"),
        (nn.BatchNorm1d(WIDTH), "batch norm at 'extra'"),
        (nn.LazyLinear(3), "lazy parameter 'extra.weight'"),
    ],
)
def test_modules_that_cannot_be_right_are_named(extra: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learner_of(Own(GOOD["plain"], extra=extra))


def test_a_fixed_table_is_a_constant() -> None:
    table = nn.Embedding.from_pretrained(torch.randn(3, WIDTH))
    learner_of(Own(lambda m, d, e: m.logit(m.hidden(e) + m.extra.weight[1]), extra=table))


RANDOM: dict[str, tuple[Forward, dict[str, nn.Module], str]] = {
    "attention": (
        lambda m, d, e: m.logit(m.extra(*3 * [stacked(e)], need_weights=False)[0].sum(1)).view(d.shape[:-1]),
        {"extra": nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True)},
        "multi_head_attention_forward",
    ),
    "transformer": (
        lambda m, d, e: m.logit(m.extra(stacked(e)).sum(1)).view(d.shape[:-1]),
        {"extra": nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.5, batch_first=True)},
        "multi_head_attention_forward",
    ),
    "gru": (
        lambda m, d, e: m.logit(m.extra(stacked(e))[0].sum(1)).view(d.shape[:-1]),
        {"extra": nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)},
        "gru",
    ),
    "scaled dot products": (
        lambda m, d, e: m.logit(
            F.scaled_dot_product_attention(*3 * [stacked(e)], dropout_p=0.5 if m.training else 0.0).sum(1)
        ).view(d.shape[:-1]),
        {},
        "scaled_dot_product_attention",
    ),
    "rrelu": (lambda m, d, e: m.logit(F.rrelu(m.hidden(e), training=m.training)), {}, "rrelu"),
    "noise": (
        lambda m, d, e: m.logit(m.hidden(e) + (torch.randn_like(d[..., :1]) if m.training else 0)),
        {},
        "randn_like",
    ),
}
ALWAYS_RANDOM: dict[str, tuple[Forward, str]] = {
    "gumbel": (lambda m, d, e: m.logit(F.gumbel_softmax(m.hidden(e), dim=-1)), "in gumbel_softmax"),
    "bernoulli": (lambda m, d, e: m.logit(torch.bernoulli(torch.full_like(m.hidden(e), 0.5))), "in bernoulli"),
    "rand": (lambda m, d, e: m.logit(m.hidden(e) * torch.rand(WIDTH)), "in rand"),
    "numpy": (lambda m, d, e: m.logit(m.hidden(e) * np.random.default_rng().random()), "from a generator of its own"),
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_numbers_that_no_seed_reaches_are_refused(case: str) -> None:
    forward, modules, call = RANDOM[case]
    for settings in ({"adapt": ["head"]}, {"adapt": []}, {"adapt": ["head"], "engine": "reference"}):
        with pytest.raises(ValueError, match=rf"draws random numbers in {call} \(.*while training, which no seed"):
            learner_of(Own(forward, **modules), **settings)


@pytest.mark.parametrize("case", ALWAYS_RANDOM)
def test_random_numbers_in_evaluation_are_refused(case: str) -> None:
    forward, call = ALWAYS_RANDOM[case]
    with pytest.raises(ValueError, match=rf"draws random numbers {call}.* in evaluation"):
        learner_of(Own(forward), adapt=["head"])


@pytest.mark.parametrize("engine", ["factored", "reference"])
def test_dropout_as_a_function_is_seeded(engine: str) -> None:
    rows, batch = problem()
    losses = []
    for drop in (lambda m, x: torch.dropout(x, 0.5, m.training), lambda m, x: F.dropout(x, 0.5, m.training)):
        learner = learner_of(Own(lambda m, d, e, drop=drop: m.logit(drop(m, m.hidden(e)))), engine=engine)
        losses += [learner(rows, batch)[0].item() for _ in range(2)]
        learner.eval()
        assert torch.equal(learner.predict(rows, batch)[1], learner.predict(rows, batch)[1])
        assert learner(rows, batch)[0].item() != losses[0]
    assert len(set(losses)) == 1


class Counting(Own):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(self._forward)
        self.register_buffer("calls", torch.zeros(()))

    def _forward(self, model: Own, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.logit(self.hidden(embedded))


def test_the_trial_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    model = Own(lambda m, d, e: m.logit(m.drop(m.hidden(e))), drop=nn.Dropout(0.5)).double()
    model.mix.eval()
    model.out.bias.grad = torch.ones(1, dtype=torch.float64)
    nn.init.zeros_(model.out.bias)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    for engine in ("auto", "reference"):
        learner_of(model, engine=engine)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["out.bias"]
    counting = Counting()
    with pytest.raises(ValueError, match="changes its buffer 'calls'"):
        learner_of(counting)
    assert counting.calls == 0
    with pytest.raises(ValueError, match="draws random numbers"):
        learner_of(Own(RANDOM["noise"][0]))
    assert torch.equal(torch.get_rng_state(), state)


UNFOLLOWED: dict[str, tuple[Forward, str]] = {
    "activation in place": (
        lambda m, d, e: m.logit(F.relu(m.mix(torch.cat([*e.values()], -1)), inplace=True)),
        "in place",
    ),
    "logits in place": (lambda m, d, e: m.logit(m.hidden(e)).mul_(3), "in place"),
    "no gradients": (
        lambda m, d, e: m.logit(m.hidden(e)) if not torch.is_grad_enabled() else _without_gradients(m, e),
        "gradients are switched off",
    ),
    "a vector as weight": (lambda m, d, e: F.linear(m.hidden(e), m.out.weight[0]) + m.out.bias, "receives it"),
    "not finite on padding": (
        lambda m, d, e: m.logit(m.hidden(e) + (d[..., :1] / d[..., 1:]).clamp(-3, 3)),
        "not finite for an example whose numeric columns are all 0",
    ),
    "gradient of its own": (lambda m, d, e: _with_penalty(m, e), "differentiates itself"),
}


def _without_gradients(model: Any, embedded: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(model.hidden(embedded))
    return model.logit(gate)


def _with_penalty(model: Any, embedded: dict[str, Tensor]) -> Tensor:
    with torch.enable_grad():
        user = embedded["user"] if embedded["user"].requires_grad else embedded["user"].detach().requires_grad_()
        logit = model.logit(model.hidden({**embedded, "user": user}))
        (slope,) = torch.autograd.grad(logit.sum(), user, create_graph=True)
    return logit + slope.square().sum(-1)


@pytest.mark.parametrize("case", UNFOLLOWED)
def test_auto_takes_the_reference_for_what_it_cannot_follow(case: str) -> None:
    forward, reason = UNFOLLOWED[case]
    learner = learner_of(Own(forward), steps=2)
    assert learner.engine == "reference"
    assert reason in learner.engine_reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        learner_of(Own(forward), engine="factored")
    rows, batch = problem()
    loss, _ = learner(rows, batch)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in learner.parameters())


class Twice(nn.Module):
    """One tower for user and item: one module of two names, two modules with tied weights, or one name used twice."""

    head = "item_tower"

    def __init__(self, how: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.user_tower = nn.Linear(WIDTH, 4)
        if how == "one module":
            self.item_tower = self.user_tower
        if how == "tied weights":
            self.item_tower = nn.Linear(WIDTH, 4)
            self.item_tower.weight, self.item_tower.bias = self.user_tower.weight, self.user_tower.bias
        self.how = how

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        item = self.user_tower if self.how == "one name" else self.item_tower
        return (self.user_tower(embedded["user"]) * item(embedded["item"])).sum(-1)


def test_a_weight_of_two_names_adapts_as_one() -> None:
    rows, batch = problem()
    found = []
    for how, adapts in (
        ("one name", (["dense"], ["user_tower.*"])),
        ("one module", (["dense"], ["head"], ["item_tower.*"], ["user_tower.*"], ["item_tower.weight", "*.bias"])),
        ("tied weights", (["dense"], ["head"], ["item_tower.*"], ["user_tower.*"])),
    ):
        for adapt in adapts:
            model = Twice(how)
            learner = learner_of(model, adapt=adapt, steps=2)
            assert learner.adapted.parameters == ("user_tower.weight", "user_tower.bias"), (how, adapt)
            for _ in range(2):
                loss, _ = learner(rows, batch)
                leaves = [*model.parameters(), *rows.weights.values()]
                found.append([loss, *torch.autograd.grad(loss, leaves)])
                assert isinstance(model.user_tower.weight, nn.Parameter)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_a_tied_head_adapts_whole(engine: str) -> None:
    """As language models tie input and output: the layer's weight has another module's name."""
    model = Own(lambda m, d, e: m.logit(m.hidden(e)), first=nn.Linear(WIDTH, 1))
    untied = Own(lambda m, d, e: m.logit(m.hidden(e)))
    model.first.weight = model.out.weight
    del model._modules["out"]  # so that `first` is the first name
    model.out = nn.Linear(WIDTH, 1)
    model.out.weight = model.first.weight
    with torch.no_grad():
        model.out.bias.copy_(untied.out.bias)
    rows, batch = problem()
    tied = learner_of(model, engine=engine, adapt=["head"])
    assert tied.adapted.parameters == ("first.weight", "out.bias")
    assert tied(rows, batch)[0].item() == pytest.approx(learner_of(untied, adapt=["head"])(rows, batch)[0].item())


def test_the_reference_engine_restores_a_model_after_an_error() -> None:
    model = Twice("one module").double()
    learner = learner_of(model, engine="reference")
    rows, batch = problem()
    before = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in before.items()}
    model.register_forward_hook(lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        learner(rows, batch)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_the_reference_engine_adapts_recurrent_layers() -> None:
    """torch keeps a list of their parameters beside them, which must follow, and be as it was afterwards."""
    gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
    model = Own(lambda m, d, e: m.logit(m.extra(stacked(e))[0].sum(1)).view(d.shape[:-1]), extra=gru).double()
    learner = learner_of(model, adapt=["extra.*"])
    assert learner.engine == "reference"
    rows, batch = problem()
    losses = [learner(rows, batch)[0] for _ in range(2)]
    assert losses[0].item() == losses[1].item()
    losses[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in gru.parameters())
    assert all(one is two for one, two in zip(gru._flat_weights, gru.parameters(), strict=True))
    before, after = learner.predict(rows, batch)
    assert (before - after)[0].abs().max() > 1e-4


def test_frozen_parameters_stay() -> None:
    model = Own(GOOD["plain"])
    model.mix.requires_grad_(False)
    model.out.bias.requires_grad_(False)
    rows, batch = problem()
    for engine in ("factored", "reference"):
        learner = learner_of(model, engine=engine, adapt=["dense", "head"])
        assert learner.adapted.parameters == ("out.weight",)
        learner(rows, batch)[0].backward()
        assert [name for name, p in model.named_parameters() if p.grad is not None] == ["out.weight"]
        fast = learner.adapt(rows, batch.support)
        assert all("mix" not in key and "bias" not in key for key in fast.state_dict())
    for pattern in ("mix.weight", "mix.*", "out.bias"):
        with pytest.raises(ValueError, match=rf"names '{re.escape(pattern)}', but '(mix.weight|out.bias)' is frozen"):
            learner_of(model, adapt=["dense", pattern])


def test_a_checkpoint_around_adapted_layers_is_refused() -> None:
    """Its second forward pass runs when the task's weights are gone. Around other layers it changes nothing."""

    def forward(model: Any, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return model.logit(checkpoint(model.hidden, embedded, use_reentrant=False))

    for engine in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"computes with 'mix.weight' again in the backward pass"):
            learner_of(Own(forward), engine=engine)
    rows, batch = problem()
    losses = []
    for model in (Own(forward), Own(GOOD["plain"])):
        loss, _ = learner_of(model, adapt=["head"])(rows, batch)
        losses.append([loss, *torch.autograd.grad(loss, [*model.parameters(), *rows.weights.values()])])
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_inner_loop_checks_its_settings() -> None:
    for settings, message in (
        ({"adapt": "dense"}, "adapt is 'dense': must be a list of names"),
        ({"order": "third"}, "order is 'third'"),
        ({"steps": 0}, "steps is 0: must be at least 1"),
        ({"lr": -1.0}, "lr is -1.0: must not be negative"),
        ({"prior": -1.0}, "prior is -1.0: must not be negative"),
        ({"loss": "auc"}, "loss is 'auc'"),
        ({"recompute": True, "order": "first"}, "recompute is True: only second order"),
    ):
        with pytest.raises(ValueError, match=message):
            InnerLoop(**{"adapt": ["dense"]} | settings)


def test_a_module_called_embeddings_has_a_rate_of_its_own() -> None:
    model = Own(lambda m, d, e: m.logit(m.embeddings(m.hidden(e))), embeddings=nn.Linear(WIDTH, WIDTH))
    learner = MetaLearner(
        model.double(), FEATURES, 2, InnerLoop(adapt=["embeddings", "dense"], learn_lr=True, lr=0.3)
    ).double()
    assert learner.rate_names == ("embeddings", "mix", "out", "embeddings")
    rows, batch = problem()
    learner(rows, batch)[0].backward()
    assert learner.inner_lr.grad.abs().min() > 0


def test_a_computed_weight_is_not_modulated() -> None:
    model = Own(GOOD["plain"])
    nn.utils.parametrizations.weight_norm(model.mix)
    with pytest.raises(ValueError, match=r"the weight of 'mix' is computed \(a parametrization"):
        build_modulator("film", model, dims=FEATURES, num_numeric=2, width=4)
