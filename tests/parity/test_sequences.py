"""Sequences that are not pooled: both engines, a textbook version, and models against slow plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import DIMS, FEATURES, NUM_NUMERIC, SEQUENCES, Problem, gradients, make_problem, textbook
from torch import Tensor, nn

from gmeta.meta.inner_loop import InnerLoop
from gmeta.meta.learner import MetaLearner
from gmeta.meta.modulation import build_modulator
from gmeta.models.din import DIN
from gmeta.models.inputs import InputSpec, as_vectors, masked_mean
from gmeta.models.melu import MeLU
from gmeta.models.registry import build_model
from gmeta.models.transformer import Transformer

READ = ("user", "item", "history", "last")
INPUTS = InputSpec(
    dict.fromkeys(READ[:3], DIMS["wide"]),
    ("x0", "x1"),
    0.3,
    "item",
    sequences={"last": DIMS["wide"]},
    tables=dict.fromkeys(READ, "wide"),
)
MODELS = {
    "din": lambda: build_model(DIN, INPUTS, {"hidden": [5], "attention": [4]}, name="din", seed=0),
    "transformer": lambda: build_model(
        Transformer, INPUTS, {"hidden": [5], "positions": 2, "blocks": 1}, name="transformer", seed=0
    ),
    "melu": lambda: build_model(MeLU, INPUTS, {"hidden": [5]}, name="melu", seed=0),
}


def learner_of(model: nn.Module, engine: str, **loop: object) -> MetaLearner:
    modulator = None
    if loop.pop("modulated", False):
        modulator = build_modulator("film", model, dims=INPUTS.widths, num_numeric=NUM_NUMERIC, width=3).double()
        with torch.no_grad():  # which starts as no modulation at all
            for parameter in modulator.parameters():
                parameter.add_(0.1)
    return MetaLearner(
        model.double(),
        INPUTS.widths,
        NUM_NUMERIC,
        InnerLoop(**{"lr": 0.3} | loop),
        sequences=INPUTS.sequences,
        engine=engine,
        modulator=modulator,
    ).double()


def results(learner: MetaLearner, problem: Problem) -> dict[str, Tensor]:
    loss, out = learner(problem.rows, problem.batch)
    logits = torch.where(problem.batch.query.mask, out.query_logits, 0)
    return {"loss": loss.detach(), "logits": logits, **gradients(problem, learner, loss)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in theirs.items():
        value = value.detach()
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-10 * scale), name


@pytest.mark.parametrize("name", ["din", "transformer"])
@pytest.mark.parametrize(
    ("adapt", "order", "steps"),
    [
        (["embeddings", "dense"], "second", 2),
        (["embeddings.last"], "second", 1),
        (["decision"], "first", 2),
        (["embeddings.item", "head"], "second", 2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_engines_agree_with_torch_func(name: str, adapt: list[str], order: str, steps: int) -> None:
    problem, model = make_problem(features=READ), MODELS[name]()
    fast, slow = (
        learner_of(model, engine, adapt=adapt, order=order, steps=steps) for engine in ("factored", "reference")
    )
    found = results(fast, problem)
    assert_same(found, results(slow, problem))
    adapted = fast.adapted
    rates = torch.full((steps, len(adapted.rates)), 0.3, dtype=torch.float64)
    rate_of = {name: adapted.rate_of(name) for name in adapted.parameters} | {"table wide": 0}
    losses = [nn.BCEWithLogitsLoss(reduction="none")] * 2
    loss = textbook(problem, model, adapted.parameters, adapted.features, rates, rate_of, order == "second", *losses)
    expected = {n: g for n, g in gradients(problem, fast, loss).items() if n in found}
    assert_same(found, {"loss": loss.detach(), **expected})


@pytest.mark.parametrize("name", ["din", "melu"])
def test_modulated_engines_agree(name: str) -> None:
    problem, model = make_problem(features=READ), MODELS[name]()
    fast, slow = (
        learner_of(model, engine, adapt=["dense"], order="second", modulated=True)
        for engine in ("factored", "reference")
    )
    assert_same(results(fast, problem), results(slow, problem))


class Everything(nn.Module):
    """Reads sequences of two tables, between features, and what examples carry: a vector, and gaps beside `last`."""

    features = ("pages", "user", "last", "tags", "text", "gap")

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(DIMS["wide"] + 1, 3)
        self.page = nn.Linear(DIMS["narrow"], 3)
        self.out = nn.Linear(6 + DIMS["wide"] + DIMS["narrow"] + 4 + NUM_NUMERIC, 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        last = torch.tanh(self.key(torch.cat([embedded["last"], embedded["gap"]], -1)))
        pages = torch.tanh(self.page(embedded["pages"]))
        parts = [masked_mean(last, embedded["gap.mask"]), masked_mean(pages, embedded["pages.mask"])]
        parts += as_vectors(embedded, ("user", "tags", "text"))
        return self.out(torch.cat([*parts, dense], -1)).squeeze(-1)


def carrying(problem: Problem) -> Problem:
    """The problem with a vector `text`, and with `gap`, a number for each value of `last`."""
    generator = torch.Generator().manual_seed(3)

    def given(side):
        lengths = side.bags["last"].lengths
        mask = torch.arange(max(1, int(lengths.max()))) < lengths.unsqueeze(-1)
        gap = torch.randn(*mask.shape, 1, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
        text = torch.randn(*side.mask.shape, 4, generator=generator, dtype=torch.float64) * side.mask.unsqueeze(-1)
        return replace(side, given={"text": text, "gap": gap, "gap.mask": mask})

    batch = replace(problem.batch, support=given(problem.batch.support), query=given(problem.batch.query))
    return Problem(problem.rows, batch)


@pytest.mark.parametrize("adapt", [["embeddings", "dense"], ["embeddings.pages", "key.*"], []])
def test_engines_agree_on_sequences_of_several_tables(adapt: list[str]) -> None:
    names = ("pages", "user", "last", "tags")
    problem = carrying(make_problem(features=names))
    found = []
    for engine in ("factored", "reference"):
        torch.manual_seed(0)
        learner = MetaLearner(
            Everything().double(),
            {name: DIMS[{**FEATURES, **SEQUENCES}[name][0]] for name in names},
            NUM_NUMERIC,
            InnerLoop(adapt=adapt, steps=2, order="second", lr=0.2),
            sequences={"last": 6, "pages": 3, "gap": 1},
            vectors={"text": 4},
            engine=engine,
        ).double()
        found.append(results(learner, problem))
    assert_same(*found)
    if not adapt:  # plain training runs on support and query at once, whose sequences have other lengths
        query = learner.predict(problem.rows, problem.batch)[1]
        assert torch.allclose(query, found[0]["logits"].where(problem.batch.query.mask, query))


@pytest.mark.parametrize("name", list(MODELS))
def test_adapting_and_scoring_apart_is_one_pass(name: str) -> None:
    """Serving adapts to a support and scores a query that it looked up apart, whose longest sequence is another."""
    problem, learner = (
        make_problem(features=READ),
        learner_of(MODELS[name](), "factored", adapt=["dense", "embeddings"]),
    )
    learner.eval()
    rows, batch = problem.rows, problem.batch
    _, whole = learner.predict(rows, batch)
    fast = learner.adapt(rows, batch.support)
    assert torch.allclose(learner.score(fast, rows, batch.query), whole, atol=1e-12)


def test_recomputed_steps_give_the_same() -> None:
    problem, model = make_problem(features=READ), MODELS["din"]()
    kept, again = (
        learner_of(model, "factored", adapt=["dense", "embeddings"], steps=2, order="second", recompute=recompute)
        for recompute in (False, True)
    )
    assert_same(results(again, problem), results(kept, problem))


# ------------------------------------------------------------------------------------------ models, slowly


def example(seed: int, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    number, longest, dim = len(lengths), max([1, *lengths]), DIMS["wide"]
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
    embedded = {name: torch.randn(number, dim, generator=generator, dtype=torch.float64) for name in READ[:3]}
    keys = torch.randn(number, longest, dim, generator=generator, dtype=torch.float64)
    embedded |= {"last": torch.where(mask.unsqueeze(-1), keys, 0), "last.mask": mask}
    return torch.randn(number, 2, generator=generator, dtype=torch.float64), embedded


def finished(model: nn.Module, pooled: Tensor, dense: Tensor, embedded: dict[str, Tensor], i: int) -> Tensor:
    x = torch.cat([pooled, *(embedded[name][i] for name in READ[:3]), dense[i]])
    for layer in model.layers:
        x = torch.relu(layer(x))
    return model.output(x)[0]


LENGTHS = [3, 0, 1, 4]


def test_din_is_the_papers() -> None:
    model = MODELS["din"]().double()
    dense, embedded = example(1, LENGTHS)
    found = model(dense, embedded)
    for i, length in enumerate(LENGTHS):
        item, interest = embedded["item"][i], torch.zeros(DIMS["wide"], dtype=torch.float64)
        for key in embedded["last"][i, :length]:
            unit = model.unit
            weight = unit[2](torch.relu(unit[0](torch.cat([item, key, item - key, item * key]))))
            interest = interest + weight * key
        assert torch.allclose(found[i], finished(model, interest, dense, embedded, i), atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_is_attention_value_by_value(causal: bool) -> None:
    args = {"hidden": [5], "positions": 3, "blocks": 2, "causal": causal}
    model = build_model(Transformer, INPUTS, args, name="transformer", seed=1).double()
    dense, embedded = example(2, LENGTHS)
    found = model(dense, embedded)
    for i, length in enumerate(LENGTHS):
        recency = [min(length - 1 - place, 2) for place in range(length)]
        states = [embedded["last"][i, p] + model.position.weight[:, r] for p, r in enumerate(recency)]
        for block in model.blocks:
            states = slow_block(block, states, causal)
        states = [model.norm(state) for state in states]
        query, pooled = model.ask(embedded["item"][i]), torch.zeros(DIMS["wide"], dtype=torch.float64)
        if states:
            pooled = slow_attention(query, states, states)
        assert torch.allclose(found[i], finished(model, pooled, dense, embedded, i), atol=1e-12)


def slow_attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    powers = [((query @ key) / len(query) ** 0.5).exp() for key in keys]
    return sum(power / sum(powers) * value for power, value in zip(powers, values, strict=True))


def slow_block(block: nn.Module, states: list[Tensor], causal: bool) -> list[Tensor]:
    normed = [block.attention_norm(state) for state in states]
    query, key, value = (
        [layer(z).view(block.heads, -1) for z in normed] for layer in (block.query, block.key, block.value)
    )
    out = []
    for i, state in enumerate(states):
        seen = range(i + 1) if causal else range(len(states))
        heads = [
            slow_attention(query[i][h], [key[j][h] for j in seen], [value[j][h] for j in seen])
            for h in range(block.heads)
        ]
        x = state + block.join(torch.cat(heads))
        out.append(x + block.narrow(torch.relu(block.widen(block.network_norm(x)))))
    return out


@pytest.mark.parametrize("name", list(MODELS))
def test_sequences_without_values(name: str) -> None:
    """All histories empty: the history's part of the input is zeros, and gradients are finite."""
    model = MODELS[name]().double()
    dense, embedded = example(3, [0, 0])
    rows = {n: value.requires_grad_() if value.is_floating_point() else value for n, value in embedded.items()}
    found = model(dense, rows)
    for i in range(2):
        zeros = torch.zeros(DIMS["wide"], dtype=torch.float64)
        if name == "melu":
            x = torch.cat([*(embedded[n][i] for n in READ[:3]), zeros, dense[i]])
            expected = model.output(torch.relu(model.layers[0](x)))[0]
        else:
            expected = finished(model, zeros, dense, embedded, i)
        assert torch.allclose(found[i], expected, atol=1e-12)
    grads = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True)
    assert all(bool(grad.isfinite().all()) for grad in grads if grad is not None)


class Unmasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIMS["wide"], 1)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return self.out(embedded["last"].mean(-2)).squeeze(-1)


def test_a_model_that_reads_padding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"padded further.*embedded\['last.mask'\]"):
        MetaLearner(Unmasked(), {"last": 6}, 0, InnerLoop(adapt=["dense"]), sequences={"last": 6})


@pytest.mark.parametrize(
    ("inputs", "args", "message"),
    [
        (replace(INPUTS, item=None), {}, "model.args.target is not set"),
        (INPUTS, {"target": "itm"}, "model.args.target names 'itm'.*'item'"),
        (INPUTS, {"history": "history"}, "model.args.history names 'history'.*pooling: none.*'last'"),
        (replace(INPUTS, sequences={}), {}, "model.args.history is not set.*table: wide"),
    ],
)
def test_what_models_of_a_history_need(inputs: InputSpec, args: dict[str, str], message: str) -> None:
    for model in (DIN, Transformer):
        with pytest.raises(ValueError, match=message):
            model(inputs, **args)
    with pytest.raises(ValueError, match=r"model.args.heads is 5.*must divide"):
        Transformer(INPUTS, heads=5)


def test_a_batch_without_tasks() -> None:
    problem, learner = (
        make_problem(support=(), query=(), features=READ),
        learner_of(MODELS["din"](), "factored", adapt=["dense"]),
    )
    assert learner(problem.rows, problem.batch)[0].item() == 0


@pytest.mark.parametrize("name", ["din", "transformer"])
def test_several_labels(name: str) -> None:
    """A logit of each label, that start at the base rates of these where the last layer says nothing else."""
    inputs = replace(INPUTS, base_rates=(0.5, -1.5))
    factory = {"din": DIN, "transformer": Transformer}[name]
    model = build_model(factory, inputs, {"hidden": [5]}, name=name, seed=0).double()
    assert model(*example(1, LENGTHS)).shape == (len(LENGTHS), 2)
    assert model.output.bias.tolist() == [0.5, -1.5]
