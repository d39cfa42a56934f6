import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from gmeta.core.batch import RowGradients
from gmeta.embedding.table import STATE, ShardedTables, TableSpec
from gmeta.optim import sparse as sparse_module
from gmeta.optim.dense import clip_scale, dense_optimizer, dense_step, global_norm, lr_scale, square_sum
from gmeta.optim.sharded import open_dense
from gmeta.optim.sparse import SparseOptimizer
from gmeta.parallel.collectives import GradientBuckets
from gmeta.parallel.mesh import Mesh

N, D, LR = 7, 3, 0.1


def tables(optimizer, dim=D, dtype=torch.float64):
    return ShardedTables(
        [TableSpec("a", N, dim, {"a": None})],
        mesh=Mesh(),
        seed=0,
        init_std=1.0,
        dtype=dtype,
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
        sparse.step(ours.fused, {f"d{dim}": RowGradients(rows, grad)}, lr_scale=scale)
    return ours.fused[f"d{dim}"].weight


def reference(make, steps=12, dim=D):
    """Every row is a parameter with a dense torch optimizer of its own that steps only when the row is touched."""
    rows = [nn.Parameter(row.clone()) for row in tables("sgd", dim).fused[f"d{dim}"].weight]
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


def test_adagrad_is_torch_adagrad_on_each_rows_own_steps():
    close(train("adagrad"), reference(lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-8)))


def test_rowwise_adagrad_of_width_one_is_torch_adagrad():
    close(train("rowwise_adagrad", dim=1), reference(lambda p: torch.optim.Adagrad(p, lr=LR, eps=1e-8), dim=1))


def test_rowwise_adagrad_shares_the_mean_square_of_a_row():
    weight = tables("sgd").fused[f"d{D}"].weight.clone()
    total = [0.0] * N
    for rows, grad in gradients(12):
        for index, g in zip(rows.tolist(), grad.tolist(), strict=True):
            total[index] += sum(x * x for x in g) / D
            for column, x in enumerate(g):
                weight[index, column] -= LR * x / (math.sqrt(total[index]) + 1e-8)
    close(train("rowwise_adagrad"), weight)


def test_adam_matches_torch_sparse_adam_when_all_rows_are_touched():
    ours = tables("adam")
    weight = nn.Parameter(ours.fused["d3"].weight.clone())
    theirs = torch.optim.SparseAdam([weight], lr=LR)
    sparse = SparseOptimizer("adam", lr=LR)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        grad = torch.randn(N, D, dtype=torch.float64, generator=generator)
        sparse.step(ours.fused, {"d3": RowGradients(torch.arange(N), grad)})
        weight.grad = torch.sparse_coo_tensor(torch.arange(N)[None], grad, (N, D), check_invariants=True).coalesce()
        theirs.step()
    # SparseAdam adds eps before the bias correction
    torch.testing.assert_close(ours.fused["d3"].weight, weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(STATE))
def test_untouched_rows_and_their_state_do_not_change(name):
    ours = tables(name)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    touched = torch.tensor([1, 4])
    SparseOptimizer(name, lr=LR, weight_decay=0.1).step(
        ours.fused, {"d3": RowGradients(touched, torch.ones(2, D, dtype=torch.float64))}
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
    SparseOptimizer(name, lr=LR).step(a.fused, {"d3": RowGradients(rows, grad)}, grad_scale=0.25)
    SparseOptimizer(name, lr=LR).step(b.fused, {"d3": RowGradients(rows, grad * 0.25)})
    assert torch.equal(a.fused["d3"].weight, b.fused["d3"].weight)


def textbook_sgd(rows, grad, state, lr):
    return rows - lr * grad, state


def textbook_adagrad(rows, grad, state, lr):
    total = state["sum_squares"] + grad.square()
    return rows - lr * grad / (total.sqrt() + 1e-8), {"sum_squares": total}


def textbook_rowwise_adagrad(rows, grad, state, lr):
    total = state["sum_squares"] + grad.square().mean(1)
    return rows - lr * grad / (total.sqrt() + 1e-8)[:, None], {"sum_squares": total}


def textbook_adam(rows, grad, state, lr):
    steps = state["steps"] + 1
    first = 0.9 * state["exp_avg"] + (1 - 0.9) * grad
    second = 0.999 * state["exp_avg_sq"] + (1 - 0.999) * grad.square()
    count = steps.to(torch.float64)[:, None]
    unbiased_first = first / (1 - 0.9**count).to(first.dtype)
    unbiased_second = second / (1 - 0.999**count).to(second.dtype)
    rows = rows - lr * unbiased_first / (unbiased_second.sqrt() + 1e-8)
    return rows, {"exp_avg": first, "exp_avg_sq": second, "steps": steps}


TEXTBOOK = {
    "sgd": textbook_sgd,
    "rowwise_adagrad": textbook_rowwise_adagrad,
    "adagrad": textbook_adagrad,
    "adam": textbook_adam,
}


@given(
    name=st.sampled_from(list(TEXTBOOK)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    dim=st.integers(1, 40),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    decay=st.sampled_from([0.0, 0.3]),
    scale=st.sampled_from([None, 0.25, torch.tensor(1e-3, dtype=torch.float64)]),
    block=st.integers(1, N + 1),
    seed=st.integers(0, 1000),
)
def test_updates_are_the_textbook_formulas(name, dtype, dim, size, decay, scale, block, seed):
    """To 1e-12 of the largest number in float64 and 1e-6 in float32, in blocks of any size."""
    ours, theirs = tables(name, dim, dtype).fused[f"d{dim}"], tables(name, dim, dtype).fused[f"d{dim}"]
    optimizer = SparseOptimizer(name, lr=LR, weight_decay=decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_module, "_BLOCK_ROWS", block)
        for touched, grad in gradients(6, dim, seed):
            grad = (grad * size).to(dtype)
            optimizer.step({"g": ours}, {"g": RowGradients(touched, grad)}, lr_scale=0.5, grad_scale=scale)
            rows = theirs.weight[touched] * (1 - LR * 0.5 * decay)
            state = {key: value[touched] for key, value in theirs.state.items()}
            rows, state = TEXTBOOK[name](rows, grad if scale is None else grad * scale, state, LR * 0.5)
            theirs.weight[touched] = rows
            for key, value in state.items():
                theirs.state[key][touched] = value
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for mine, other in ((ours.weight, theirs.weight), *((ours.state[k], theirs.state[k]) for k in theirs.state)):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("name", list(STATE))
def test_a_step_that_is_not_ok_changes_nothing(name):
    ours, plain = tables(name), tables(name)
    sparse = SparseOptimizer(name, lr=LR, weight_decay=0.1)
    good = RowGradients(torch.tensor([1, 4]), torch.ones(2, D, dtype=torch.float64))
    bad = RowGradients(torch.tensor([0, 4]), torch.full((2, D), math.nan, dtype=torch.float64))
    yes, no = torch.tensor(True), torch.tensor(False)
    for found, ok in ((good, yes), (bad, no), (good, no), (good, yes)):
        sparse.step(ours.fused, {"d3": found}, ok=ok)
    for _ in range(2):
        sparse.step(plain.fused, {"d3": good})
    for key, value in ours.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


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


def test_a_sum_for_replicated_layers_is_refused_by_sharded_ones():
    with pytest.raises(ValueError, match=r"dense layers are sharded as IIG: it sums replicated gradients; use NNN"):
        open_dense(
            Toy(), Mesh(), lr=0.1, inner_lr_lr=0.1, weight_decay=0.0, sharding="IIG", outer_reduce=GradientBuckets
        )


def norm_of(dense, rows):
    return global_norm(square_sum(dense, Mesh()), rows, Mesh())


def test_global_norm_is_the_norm_of_everything():
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(4, 3, generator=generator), torch.randn(2, generator=generator)]
    rows = {"d3": RowGradients(torch.arange(2), torch.randn(2, 3, generator=generator))}
    expected = torch.cat([t.double().flatten() for t in (*dense, rows["d3"].grad)]).norm().item()
    assert norm_of(dense, rows).item() == pytest.approx(expected, rel=1e-12)
    assert norm_of([], {}).item() == 0.0


def test_global_norm_keeps_float64_accuracy():
    """A float32 sum would lose the squares of most of these gradients."""
    grad = torch.cat([torch.full((1,), 1e4), torch.full((200_000,), 1e-2)])
    exact = math.sqrt(math.fsum(x * x for x in grad.tolist()))
    assert norm_of([grad], {}).item() == pytest.approx(exact, rel=1e-11)
    rows = {"d1": RowGradients(torch.arange(len(grad)), grad[:, None])}
    assert norm_of([], rows).item() == pytest.approx(exact, rel=1e-11)
    assert math.isnan(norm_of([torch.tensor([1.0, math.nan])], {}).item())


def stepped(calls, dtype):
    """Parameters and AdamW state of a Toy after steps with (gradient, arguments of dense_step)."""
    torch.manual_seed(0)
    toy = Toy().to(dtype)
    optimizer = dense_optimizer(toy, lr=0.01, inner_lr_lr=0.5, weight_decay=0.2)
    for value, arguments in calls:
        for p in toy.parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, value)
        dense_step(optimizer, **arguments)
        assert all(not p.grad.any() for p in toy.parameters() if p.requires_grad)
    return copy.deepcopy([[p, *optimizer.state.get(p, {}).values()] for p in toy.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_step_that_is_not_ok_changes_nothing(dtype):
    yes, no = torch.tensor(True), torch.tensor(False)
    plain = stepped([(0.3, {}), (0.2, {})], dtype)
    late = stepped([(0.3, {"ok": yes}), (math.nan, {"ok": no}), (0.7, {"ok": no}), (0.2, {"ok": yes})], dtype)
    torch.testing.assert_close(late, plain, rtol=0, atol=0)


def test_dense_step_scales_gradients_and_rates():
    scale = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(
        stepped([(0.8, {"grad_scale": scale})], torch.float32), stepped([(0.2, {})], torch.float32)
    )
    slow, fast = (stepped([(0.8, {"lr_scale": factor})], torch.float64) for factor in (0.5, 1.0))
    start = stepped([], torch.float64)
    for a, b, c in zip(start, slow, fast, strict=True):
        torch.testing.assert_close(c[0] - a[0], 2 * (b[0] - a[0]), rtol=1e-9, atol=1e-12)


def test_fused_adamw_is_adamw():
    """The state of the two is the same, so that a checkpoint of one loads into the other."""
    toy = Toy().double()
    theirs_toy = copy.deepcopy(toy)
    ours = dense_optimizer(toy, lr=0.01, inner_lr_lr=0.01, weight_decay=0.0)
    theirs = torch.optim.AdamW([p for p in theirs_toy.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(toy.parameters(), theirs_toy.parameters(), strict=True):
            if p.requires_grad:
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
                q.grad = p.grad.clone()
        dense_step(ours)
        theirs.step()
    for p, q in zip(toy.parameters(), theirs_toy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        assert {k: (v.dtype, v.shape) for k, v in mine.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}


def test_clip_scale():
    lengths = [4.0, 0.5, 0.0, math.inf]
    assert [clip_scale(torch.tensor(n, dtype=torch.float64), 1.0).item() for n in lengths] == [0.25, 1.0, 1.0, 0.0]
