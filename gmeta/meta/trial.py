"""A model is tried out once, before it is trained: which engine can adapt it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gmeta.meta.dropout import SeededDropout
from gmeta.meta.factored import AdaptedPass, Unsupported
from gmeta.meta.fast_weights import FastWeights
from gmeta.meta.inner_loop import Adapted, refuse_batch_norm
from gmeta.meta.interception import Intercept
from gmeta.meta.modulation import Modulated


def choose_engine(
    model: nn.Module,
    adapted: Adapted,
    features: Mapping[str, int],
    num_numeric: int,
    modulated: Mapping[str, int],
    engine: str,
) -> tuple[str, str]:
    """(engine, reason)."""
    refuse_batch_norm(model)
    if not adapted:
        return engine, "none: plain training"
    if engine != "auto":
        return engine, f"{engine}, as configured"
    leading = (2, 3)
    like = next(model.parameters(), torch.zeros(()))
    modulation = {layer: Modulated(like.new_ones(leading[0], units), None) for layer, units in modulated.items()}
    taped = AdaptedPass(model, adapted.parameters, FastWeights(leading[0], modulation=modulation), leading)
    embedded = {name: like.new_zeros(*leading, dim) for name, dim in features.items()}
    dense: Tensor = like.new_zeros(*leading, num_numeric)
    try:
        with torch.no_grad(), Intercept(taped, SeededDropout(None)):
            model(dense, embedded)
        taped.finish()
    except Unsupported as reason:
        return "reference", f"reference, because {reason}"
    return "factored", "factored"
