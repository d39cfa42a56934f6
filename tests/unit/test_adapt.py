"""Names of the adapted set, inner rates, and what each engine refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.meta.dropout import SeededDropout, example_keys
from gmeta.meta.inner_loop import InnerLoop, resolve_adapted
from gmeta.meta.interception import Intercept
from gmeta.meta.learner import MetaLearner
from gmeta.meta.losses import example_loss, prediction, task_mean
from gmeta.models.inputs import InputSpec
from gmeta.models.melu import MeLU

FEATURES = ("user", "item", "item_genre")
DIMS = dict.fromkeys(FEATURES, 4)


def melu(**extras: object) -> MeLU:
    return MeLU(InputSpec(dict.fromkeys(FEATURES, 4), ("x0", "x1"), 0.0), hidden=[6, 5], **extras)


def test_words() -> None:
    model = melu(layer_norm=True)
    names = [name for name, _ in model.named_parameters()]
    everything = resolve_adapted(["embeddings", "dense"], model, FEATURES)
    assert everything.features == FEATURES
    assert everything.parameters == tuple(names)
    assert everything.rates == ("embeddings", "layers.0", "layers.1", "norms.0", "norms.1", "output")
    assert everything.rate_of("layers.1.bias") == 2
    head = resolve_adapted(["head"], model, FEATURES)
    assert (head.features, head.parameters, head.rates) == ((), ("output.weight", "output.bias"), ("output",))
    assert resolve_adapted(["decision"], model, FEATURES).parameters == tuple(names)
    some = resolve_adapted(["embeddings.item*", "*.bias", "layers.0.*"], model, FEATURES)
    assert some.features == ("item", "item_genre")
    assert some.parameters == tuple(n for n in names if n.endswith("bias") or n.startswith("layers.0."))
    assert not resolve_adapted([], model, FEATURES)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("embedings", "embeddings"),
        ("embeddings.itm", "embeddings.item"),
        ("layers.0.wieght", "layers.0.weight"),
        ("heads", "head"),
    ],
)
def test_a_name_that_matches_nothing_suggests_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"'{pattern}', which matches nothing; the nearest name is '{nearest}'"):
        resolve_adapted(["dense", pattern], melu(), FEATURES)


def test_a_model_that_declares_no_head() -> None:
    with pytest.raises(ValueError, match="names 'head', but Linear declares no `head`"):
        resolve_adapted(["head"], nn.Linear(2, 1), FEATURES)
    with pytest.raises(
        ValueError, match=r"declares no `last_layer`: take neural_linear, or bahe with model\.args\.taste"
    ):
        resolve_adapted(["last_layer"], nn.Linear(2, 1), FEATURES)


def test_learned_rates_are_a_parameter_by_step_and_layer() -> None:
    learner = MetaLearner(melu(), DIMS, 2, InnerLoop(adapt=["embeddings", "head"], steps=3, learn_lr=True))
    assert learner.rate_names == ("embeddings", "output")
    assert learner.inner_lr.shape == (3, 2)
    assert "inner_lr" in dict(learner.named_parameters())
    fixed = MetaLearner(melu(), DIMS, 2, InnerLoop(adapt=["head"]))
    assert fixed.inner_lr is None


class Around(nn.Module):
    """A model whose forward is given, with one linear layer, one free vector and whatever else."""

    head = "out"

    def __init__(self, forward: Callable[[Around, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.vector = nn.Parameter(torch.ones(4))
        self.apply_to = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        return self.apply_to(self, embedded["user"]).sum(-1)


UNSUPPORTED = {
    "matmul": (lambda m, x: m.out(x) @ torch.diag(m.vector), {}, "cannot adapt 'vector': diag receives it"),
    "transpose": (lambda m, x: (x @ m.out.weight.mT) * m.vector, {}, "cannot adapt 'out.weight': __get__ receives it"),
    "in a list": (lambda m, x: m.out(x) + torch.stack([m.vector]), {}, "'vector': stack receives it"),
    "never": (lambda m, x: m.out(x), {}, "cannot adapt 'vector': the model's forward never uses it"),
    "twice": (
        lambda m, x: m.out(m.out(x)) * m.vector,
        {},
        "cannot adapt 'out.weight': the model's forward uses it twice",
    ),
    "both operands": (lambda m, x: m.out(x) + m.vector * m.vector, {}, r"'vector': its input is \[4\]"),
    "a number": (lambda m, x: m.out(x) + m.vector * 2, {}, "'vector': its input is 2"),
    "flattened": (lambda m, x: m.out(x.reshape(-1, 4)).view(x.shape) * m.vector, {}, r"its input is \[6, 4\]"),
    "transposed": (lambda m, x: m.out(x.transpose(0, -2)).transpose(0, -2) * m.vector, {}, r"its input is \[3, 2, 4\]"),
    "other module's bias": (
        lambda m, x: F.linear(x, m.out.weight, m.other.bias) + m.out.bias * m.vector + m.other(x),
        {"other": nn.Linear(4, 4)},
        "'other.bias': it belongs to another module than its layer's weight 'out.weight'",
    ),
    "gru": (
        lambda m, x: m.out(m.gru(x.reshape(-1, 1, 4))[0].view(x.shape)) * m.vector,
        {"gru": nn.GRU(4, 4, batch_first=True)},
        r"'gru.weight_ih_l0': (gru receives it)",
    ),
    "attention": (
        lambda m, x: m.out(m.attention(*3 * [x.reshape(-1, 1, 4)])[0].view(x.shape)) * m.vector,
        {"attention": nn.MultiheadAttention(4, 2, batch_first=True)},
        r"'attention.in_proj_weight': multi_head_attention_forward receives it",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_the_factored_engine_says_what_it_cannot_adapt(case: str) -> None:
    forward, modules, message = UNSUPPORTED[case]
    model = Around(forward, **modules)
    learner = MetaLearner(model, {"user": 4}, 0, InnerLoop(adapt=["dense"]))
    assert learner.engine == "reference"
    assert "set meta.engine to 'reference'" in learner.engine_reason
    assert re.search(message, learner.engine_reason)


def test_metadata_of_an_adapted_parameter_is_free_to_read() -> None:
    def forward(model: Around, x: Tensor) -> Tensor:
        assert model.vector.shape == (4,)
        assert model.vector.size(0) == model.vector.dim() * model.vector.numel()
        x = x + model.vector.new_ones(4)
        return model.out(x.to(model.vector.dtype)).sub(model.vector, alpha=2) + (1.0 - x) / model.vector_2

    model = Around(forward)
    model.vector_2 = nn.Parameter(torch.ones(4))
    learner = MetaLearner(model, {"user": 4}, 0, InnerLoop(adapt=["dense"]))
    assert learner.engine_reason == "factored"


def test_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="batch norm at 'norm'"):
        MetaLearner(Around(lambda m, x: x, norm=nn.BatchNorm1d(4)), {"user": 4}, 0, InnerLoop(adapt=[]))


def test_plain_training_needs_no_engine() -> None:
    assert MetaLearner(melu(), DIMS, 2, InnerLoop(adapt=[])).engine_reason == "none (plain training)"


@pytest.mark.parametrize("name", ["bce", "mse", "l1", "huber"])
def test_losses_match_torch(name: str) -> None:
    logits, label = torch.tensor([-3.0, 0.2, 2.5]), torch.tensor([0.0, 1.0, 0.0])
    torch_loss = {
        "bce": nn.BCEWithLogitsLoss,
        "mse": nn.MSELoss,
        "l1": nn.L1Loss,
        "huber": nn.HuberLoss,
    }[name]
    assert torch.equal(example_loss(name)(logits, label), torch_loss(reduction="none")(logits, label))
    assert example_loss(name)(logits.bfloat16(), label).dtype == torch.float32
    expected = torch.sigmoid(logits) if name == "bce" else logits
    assert torch.equal(prediction(name)(logits), expected)


def test_unknown_loss() -> None:
    with pytest.raises(ValueError, match="loss is 'auc': must be one of bce, mse, l1, huber"):
        example_loss("auc")


def test_task_mean_ignores_padding() -> None:
    loss = torch.tensor([[1.0, 3.0, float("nan")], [float("nan")] * 3])
    mask = torch.tensor([[True, True, False], [False] * 3])
    assert task_mean(loss, mask).tolist() == [2.0, 0.0]


def test_dropout_depends_on_every_part_of_its_key() -> None:
    def mask(seed: int = 1, epoch: int = 2, index: int = 3, task: int = 4, pass_number: int = 0) -> Tensor:
        make_keys = partial(example_keys, (seed, epoch, index), torch.tensor([task]), pass_number, torch.arange(50))
        with Intercept(SeededDropout(make_keys)):
            return F.dropout(torch.ones(1, 50, 40), 0.3)

    base = mask()
    assert torch.equal(base, mask())
    for other in (mask(seed=2), mask(epoch=3), mask(index=4), mask(task=5), mask(pass_number=1)):
        agreement = ((base == 0) == (other == 0)).double().mean()
        assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=0.05)
    assert (base == 0).double().mean() == pytest.approx(0.3, abs=0.04)
    assert base.max() == pytest.approx(1 / 0.7)


def test_dropout_that_cannot_be_seeded_is_refused() -> None:
    with Intercept(SeededDropout(lambda: torch.zeros(2, 3, dtype=torch.int64))):
        with pytest.raises(ValueError, match="alpha_dropout cannot be seeded"):
            F.alpha_dropout(torch.ones(2, 3, 4), 0.5, training=True)
        with pytest.raises(ValueError, match="keep the dimensions of tasks and examples first"):
            F.dropout(torch.ones(3, 2, 4), 0.5)
