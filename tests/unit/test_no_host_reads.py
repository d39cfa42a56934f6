"""Nothing between the fetched rows and the updates reads a number from the device or waits for one.

On CUDA `torch.cuda.set_sync_debug_mode("error")` says so (test_cuda.py); here the operators that would wait are
refused, so that it is known also where there is no CUDA.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import make_pack, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from gmeta.config.train import DenseConfig, EmbeddingConfig, MetaConfig, TrainConfig
from gmeta.parallel.mesh import Mesh
from gmeta.training import loop as train
from gmeta.training.statistics import Stopwatch

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.equal.default,
    aten.lift_fresh.default,  # torch.tensor(number): a blocking copy from the host
}


class NoHostReads(TorchDispatchMode):
    """Refuses operators whose result, or its size, the host would have to wait for on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        masked = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in READS or sized or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: bool(t > 0),
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: t[t > 0],
        lambda t: torch.tensor(1.0),
        lambda t: torch.repeat_interleave(torch.arange(2), torch.arange(2)),
    ],
)
def test_reads_are_found(read: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NoHostReads():
        read(torch.ones(()))


@pytest.mark.parametrize(
    ("model", "adapt", "optimizer"),
    [
        ("melu", ["embeddings", "dense"], "rowwise_adagrad"),
        ("melu", ["decision"], "adam"),
        ("melu", [], "sgd"),
        ("dlrm", ["embeddings", "dense"], "adam"),
        ("taste", ["embeddings", "dense"], "sgd"),
    ],
)
def test_the_step_reads_nothing(tmp_path: Path, model: str, adapt: list[str], optimizer: str) -> None:
    settings = TrainConfig(
        pack=str(make_pack(tmp_path / "pack")),
        run_dir=str(tmp_path / "run"),
        model=small_model(model, layer_norm=True),
        meta=MetaConfig(adapt=adapt, inner_steps=2, learn_inner_lr=True),
        dense=DenseConfig(clip_norm=0.1, weight_decay=0.1),
        embedding=EmbeddingConfig(optimizer=optimizer, weight_decay=0.1),
    )
    run = train.build_run(settings, Mesh(), threading.Event())
    run.read_late = True
    assert run.system.tables.state_dict()  # allocated here, not in the first step
    mode = NoHostReads()

    with run.loader:
        for _ in range(2):
            prepared = next(run.loader)
            watch = Stopwatch(torch.device("cpu"))
            with mode:
                started = train.train_step(run, prepared, watch)
            assert train.finish_step(run, started)["grad_norm"] > 0
