"""A causal block over sequences of several lengths, against plain loops over events and heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gmeta.core.sequences import sequences_of
from gmeta.models.sasrec import CausalBlock

DIM, HEADS, POSITIONS = 6, 2, 3


def plain(block: CausalBlock, x: Tensor) -> Tensor:
    """Return the block's output for the events of one task, [L, d]."""
    out = []
    size = DIM // HEADS
    normed = [block.first_norm(event) for event in x]
    for t in range(len(x)):
        read = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            other = slice(DIM + head * size, DIM + (head + 1) * size)
            scores = []
            for s in range(t + 1):
                product = block.q(normed[t])[part] @ block.kv(x[s])[part] / math.sqrt(size)
                scores.append(product + block.by_distance[head, min(t - s, POSITIONS - 1)])
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([block.kv(event)[other] for event in x[: t + 1]])
            read.append(weights @ values)
        y = block.second_norm(normed[t] + block.out(torch.cat(read)))
        out.append(y + block.second(F.relu(block.first(y))))
    return torch.stack(out)


def test_a_block_and_its_gradients_are_those_of_plain_loops() -> None:
    torch.manual_seed(0)
    block = CausalBlock(DIM, HEADS, POSITIONS, 0.0).double()
    torch.nn.init.normal_(block.by_distance)
    mask = torch.arange(5) < torch.tensor([5, 0, 1, 3]).unsqueeze(-1)
    sequences, _ = sequences_of(mask)
    x = torch.randn(int(mask.sum()), DIM, dtype=torch.float64, requires_grad=True)
    wanted = torch.cat([plain(block, part) for part in x.split([5, 1, 3])])
    found = block(x, sequences)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    leaves = [x, *block.parameters()]
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, wanted))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert all(bool(gradient.any()) for gradient in ours)
