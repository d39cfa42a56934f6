"""A model of your own: train it, adapt it to users it has never seen, score what they might click.

python examples/own_model.py PACK RUN_DIR                               # by default on the pack of `make demo`
torchrun --nproc_per_node 2 examples/own_model.py PACK RUN_DIR          # two processes learn the same model

`gmeta train --model.name own_model:TwoTowers` does the same where this file can be imported.
"""

import sys

import torch
from torch import Tensor, nn

import gmeta


class TwoTowers(nn.Module):
    """Any module that maps inputs to logits; it knows no tasks, tables or ranks."""

    def __init__(self, inputs: gmeta.InputSpec, *, hidden: int = 32) -> None:
        super().__init__()
        self.user = nn.Linear(2 * inputs.embedding_dim, hidden)
        self.item = nn.Linear(3 * inputs.embedding_dim, hidden)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...] from dense [..., F] and one [..., d] for each feature."""
        user = self.user(torch.cat([embedded["gender"], embedded["city"]], -1))
        item = self.item(torch.cat([embedded["item_id"], embedded["category"], embedded["brand"]], -1))
        return (user * item).sum(-1)


if __name__ == "__main__":
    pack, run_dir = sys.argv[1:] or ("runs/demo/pack", "runs/own_model")
    settings = {"embedding": {"lr": 0.1}, "dense": {"lr": 0.01}, "meta": {"inner_lr": 0.3}, "schedule": {"epochs": 2}}
    run = gmeta.train({"pack": pack, "run_dir": run_dir, **settings}, model=TwoTowers)
    print(f"best loss {run.best:.4f} on valid at step {run.best_step} of {run.step}: {run.path}")
