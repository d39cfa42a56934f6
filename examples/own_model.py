"""Your own model and your own loop, from gmeta's pieces: see the pack it makes, the model, and the step.

python examples/own_model.py                                    # one process
torchrun --nproc_per_node 2 examples/own_model.py               # two, the same losses
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import gmeta
from gmeta.cli import run


class TwoTowers(nn.Module):
    """Any module with this forward and a list of the features it reads; it knows no tasks, tables or ranks."""

    features = ("item_id", "gender", "city", "category", "brand")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.user = nn.Linear(2 * dim, 32)
        self.item = nn.Linear(3 * dim, 32)

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Dense [..., F] and one [..., dim] for each feature -> logits [...]."""
        user = self.user(torch.cat([embedded["gender"], embedded["city"]], -1))
        item = self.item(torch.cat([embedded["item_id"], embedded["category"], embedded["brand"]], -1))
        return (user * item).sum(-1)


def train(pack_path: Path, steps: int, dim: int = 16) -> list[float]:
    """Losses of a few steps of second-order meta-learning of both towers."""
    mesh = gmeta.open_mesh()
    pack = gmeta.open_pack(pack_path)
    torch.manual_seed(0)  # the same initial weights on every rank
    model = TwoTowers(dim)
    learner = gmeta.MetaLearner(model, embedding_features=model.features, adapt=["user.*"], inner_steps=2, inner_lr=0.5)
    specs = [gmeta.TableSpec(name, pack.schema.feature(name).num_ids, dim, {name: None}) for name in model.features]
    tables = gmeta.ShardedTables(
        specs, mesh=mesh, seed=0, init_std=0.3, dtype=torch.float32, optimizer="rowwise_adagrad"
    )
    dense, sparse = torch.optim.AdamW(learner.parameters(), lr=0.01), gmeta.SparseOptimizer("rowwise_adagrad", lr=0.1)
    exchange, losses = gmeta.RowExchange(tables.fused, mesh), []
    with gmeta.TaskLoader(
        pack.split("train"), tasks_per_batch=64, seed=0, rank=mesh.rank, world_size=mesh.world_size
    ) as loader:
        for _ in range(steps):
            batch = next(loader)
            routed = exchange.exchange_ids(exchange.request(batch.support, batch.query))
            rows = exchange.fetch(routed)  # one AlltoAll for support and query
            loss, _ = learner(rows, batch)  # this rank's share: sums over tasks, divided by the global number of tasks
            loss.backward()
            sparse.step(tables.fused, exchange.return_gradients(routed, rows))
            for parameter in learner.parameters():
                parameter.grad = gmeta.all_reduce_sum(parameter.grad, mesh)
            dense.step()
            dense.zero_grad()
            losses.append(float(gmeta.all_reduce_sum(loss.detach(), mesh)))
    gmeta.close_mesh(mesh)
    return losses


def main() -> None:
    """Make a small pack, train on it, print the losses."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory() as folder:
        log, pack = Path(folder) / "log", Path(folder) / "pack"
        assert run(["synth", "--out", str(log), "--users", "4000"]) == 0
        words = ["--input", f"{log}/*.parquet", "--schema", f"{log}/schema.yaml", "--out", str(pack)]
        assert run(["prepare", *words]) == 0
        losses = train(pack, steps)
    print(f"loss of the first steps {sum(losses[:5]) / 5:.3f}, of the last {sum(losses[-5:]) / 5:.3f}")


if __name__ == "__main__":
    main()
