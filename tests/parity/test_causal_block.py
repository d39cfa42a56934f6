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
    normed = [block.first_norm(event) for event in x]
    size = DIM // HEADS
    for t, event in enumerate(x):
        read = []
        for head in range(HEADS):
            q, k, v = (slice(part * DIM + head * size, part * DIM + (head + 1) * size) for part in range(3))
            asked = block.qkv(normed[t])[q]
            scores = []
            for s in range(t + 1):
                apart = min(t - s, POSITIONS - 1)
                product = asked @ block.qkv(normed[s])[k] / math.sqrt(size)
                scores.append(product + block.by_distance[head, apart])
            weights = torch.stack(scores).softmax(0)
            read.append(sum(weights[s] * block.qkv(normed[s])[v] for s in range(t + 1)))
        event = event + block.out(torch.cat(read))
        out.append(event + block.narrow(F.gelu(block.wide(block.second_norm(event)))))
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
