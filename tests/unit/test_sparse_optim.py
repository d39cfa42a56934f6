import math

import pytest
import torch
from torch import nn

from gmeta.batch import RowGradients
from gmeta.embedding.table import STATE, ShardedTables, TableSpec
from gmeta.optim.dense import clip_scale, dense_optimizer, global_norm, lr_scale
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.mesh import Mesh

N, D, LR = 7, 3, 0.1


def tables(optimizer, dim=D):
    return ShardedTables(
        [TableSpec("a", N, dim, {"a": None})],
        mesh=Mesh(),
        seed=0,
        init_std=1.0,
        dtype=torch.float64,
        optimizer=optimizer,
    )


def gradients(steps, dim=D, seed=0):
    """Each step touches a random subset of the rows; the fourth touches none."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        touched = (torch.rand(N, generator=generator) < (0.0 if step == 3 else 0.6)).nonzero()[:, 0]
        yield touched, torch.randn(len(touched), dim, dtype=torch.float64, generator=generator)


def train(optimizer, steps=12, dim=D, weight_decay=0.0, scale=1.0):
    ours = tables(optimizer, dim)
    sparse = SparseOptimizer(optimizer, lr=LR, weight_decay=weight_decay)
    for rows, grad in gradients(steps, dim):
        sparse.step(ours, {f"d{dim}": RowGradients(rows, grad)}, lr_scale=scale)
    return ours.groups[f"d{dim}"].weight


def reference(make, steps=12, dim=D):
    """Every row is a parameter with a dense torch optimizer of its own that steps only when the row is touched."""
    rows = [nn.Parameter(row.clone()) for row in tables("sgd", dim).groups[f"d{dim}"].weight]
    optimizers = [make([row]) for row in rows]
    for touched, grad in gradients(steps, dim):
        for index, g in zip(touched.tolist(), grad, strict=True):
            rows[index].grad = g.clone()
            optimizers[index].step()
    return torch.stack([row.detach() for row in rows])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sgd_is_torch_sgd():
    close(train("sgd"), reference(lambda p: torch.optim.SGD(p, lr=LR)))


def test_lazy_adam_is_torch_adam_on_each_rows_own_steps():
    close(train("adam"), reference(lambda p: torch.optim.Adam(p, lr=LR)))


def test_decoupled_weight_decay_is_adamw():
    got = train("adam", weight_decay=0.3)
    close(got, reference(lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.3)))
    assert (got - train("adam")).abs().max() > 0.01


def test_lr_scale_scales_steps_and_decay():
    close(
        train("adam", weight_decay=0.3, scale=0.5),
        reference(lambda p: torch.optim.AdamW(p, lr=LR / 2, weight_decay=0.3)),
    )


def test_rowwise_adagrad_of_width_one_is_torch_adagrad():
    close(train("rowwise_adagrad", dim=1), reference(lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-8), dim=1))


def test_rowwise_adagrad_shares_the_mean_square_of_a_row():
    weight = tables("sgd").groups[f"d{D}"].weight.clone()
    total = [0.0] * N
    for rows, grad in gradients(12):
        for index, g in zip(rows.tolist(), grad.tolist(), strict=True):
            total[index] += sum(x * x for x in g) / D
            for column, x in enumerate(g):
                weight[index, column] -= LR * x / (math.sqrt(total[index]) + 1e-8)
    close(train("rowwise_adagrad"), weight)


def test_adam_matches_torch_sparse_adam_when_all_rows_are_touched():
    ours = tables("adam")
    weight = nn.Parameter(ours.groups["d3"].weight.clone())
    theirs = torch.optim.SparseAdam([weight], lr=LR)
    sparse = SparseOptimizer("adam", lr=LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(N, D, dtype=torch.float64, generator=generator)
        sparse.step(ours, {"d3": RowGradients(torch.arange(N), grad)})
        weight.grad = torch.sparse_coo_tensor(torch.arange(N)[None], grad, (N, D), check_invariants=True).coalesce()
        theirs.step()
    # SparseAdam adds eps before the bias correction
    torch.testing.assert_close(ours.groups["d3"].weight, weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(STATE))
def test_untouched_rows_and_their_state_do_not_change(name):
    ours = tables(name)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    touched = torch.tensor([1, 4])
    SparseOptimizer(name, lr=LR, weight_decay=0.1).step(
        ours, {"d3": RowGradients(touched, torch.ones(2, D, dtype=torch.float64))}
    )
    rest = [i for i in range(N) if i not in (1, 4)]
    for key, value in ours.state_dict().items():
        assert torch.equal(value[rest], before[key][rest]), key
        assert (value[touched] != before[key][touched]).all(), key


@pytest.mark.parametrize("name", list(STATE))
def test_grad_scale_is_the_scaled_gradient(name):
    a, b = tables(name), tables(name)
    rows, grad = (
        torch.tensor([0, 3]),
        torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    SparseOptimizer(name, lr=LR).step(a, {"d3": RowGradients(rows, grad)}, grad_scale=0.25)
    SparseOptimizer(name, lr=LR).step(b, {"d3": RowGradients(rows, grad * 0.25)})
    assert torch.equal(a.groups["d3"].weight, b.groups["d3"].weight)


def test_unknown_row_optimizer_is_refused():
    with pytest.raises(ValueError, match="'lamb': must be one of sgd"):
        SparseOptimizer("lamb", lr=0.1)


# dense


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.inner_lr = nn.Parameter(torch.full((2, 4), 0.1))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_decay_and_inner_rates_have_their_own_rate():
    toy = Toy()
    optimizer = dense_optimizer(toy, lr=0.01, inner_lr_lr=0.5, weight_decay=0.2)
    by_id = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    found = {
        n: (by_id[id(p)]["weight_decay"], by_id[id(p)]["peak_lr"]) for n, p in toy.named_parameters() if id(p) in by_id
    }
    assert found == {
        "linear.weight": (0.2, 0.01),
        "linear.bias": (0.0, 0.01),
        "norm.weight": (0.0, 0.01),
        "norm.bias": (0.0, 0.01),
        "inner_lr": (0.0, 0.5),
    }
    assert all(g["lr"] == g["peak_lr"] for g in optimizer.param_groups)


def test_lr_schedule():
    assert [lr_scale(s, 4, 100, "none") for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = [lr_scale(s, 2, 6, "linear") for s in range(7)]
    assert linear == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert lr_scale(3, 0, 6, "cosine") == pytest.approx(0.5)
    assert lr_scale(0, 0, 6, "cosine") == 1.0
    assert all(lr_scale(s, 0, 50, "cosine") > lr_scale(s + 1, 0, 50, "cosine") > 0 for s in range(48))
    assert lr_scale(9, 9, 9, "linear") == 1.0  # no step left to decay over
    with pytest.raises(ValueError, match="'step'"):
        lr_scale(0, 0, 1, "step")


def test_global_norm_is_the_norm_of_everything():
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(4, 3, generator=generator), torch.randn(2, generator=generator)]
    rows = {"d3": RowGradients(torch.arange(2), torch.randn(2, 3, generator=generator))}
    expected = torch.cat([t.double().flatten() for t in (*dense, rows["d3"].grad)]).norm().item()
    assert global_norm(dense, rows, Mesh()).item() == pytest.approx(expected, rel=1e-12)
    assert global_norm([], {}, Mesh()).item() == 0.0


def test_clip_scale():
    lengths = [4.0, 0.5, 0.0, math.inf]
    assert [clip_scale(torch.tensor(n, dtype=torch.float64), 1.0).item() for n in lengths] == [0.25, 1.0, 1.0, 0.0]
