"""Models: plain single-device modules `(dense, embedded) -> logits`. One file each; `build_model` names them."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from gmeta.config import ModelConfig
from gmeta.data.schema import PackSchema
from gmeta.models.dlrm import DLRM
from gmeta.models.melu import MeLU

MODELS = ("melu", "dlrm")


def build_model(config: ModelConfig, schema: PackSchema, seed: int = 0) -> nn.Module:
    """The configured model for a pack, initialised from `seed`; the global random state is left as it was.

    ValueError for an unknown model, a feature that the pack does not have (with the nearest), or no input at all.
    """
    features = _features(config, schema)
    num_numeric = len(schema.numeric) if config.numeric else 0
    if not features:
        raise ValueError("the model has no categorical feature: set model.features, or prepare a pack that has some")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name == "melu":
            return MeLU(
                features,
                embedding_dim=config.embedding_dim,
                num_numeric=num_numeric,
                hidden=config.hidden,
                layer_norm=config.layer_norm,
                dropout=config.dropout,
            )
        if config.name == "dlrm":
            return DLRM(
                features,
                embedding_dim=config.embedding_dim,
                num_numeric=num_numeric,
                bottom=config.bottom,
                hidden=config.hidden,
                layer_norm=config.layer_norm,
                dropout=config.dropout,
            )
    raise ValueError(f"model.name is {config.name!r}: must be one of {', '.join(MODELS)}")


def _features(config: ModelConfig, schema: PackSchema) -> tuple[str, ...]:
    known = [feature.name for feature in schema.features]
    for name in config.features:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; the nearest is {nearest[0]!r} of {', '.join(known)}" if nearest else ", which has none"
            raise ValueError(f"model.features names {name!r}, which is not in the pack{hint}")
        if config.features.count(name) > 1:
            raise ValueError(f"model.features names {name!r} twice")
    return tuple(config.features or known)
