"""Models: plain single-device modules `(dense, embedded) -> logits`. One file each; `build_model` names them."""

from __future__ import annotations

import difflib
import math

import torch
from torch import nn

from gmeta.config.train import ModelConfig
from gmeta.data.schema import PackSchema
from gmeta.models.dlrm import DLRM
from gmeta.models.melu import MeLU
from gmeta.models.taste import Taste

MODELS = ("melu", "dlrm", "taste")


def build_model(config: ModelConfig, schema: PackSchema, seed: int = 0) -> nn.Module:
    """The configured model for a pack, initialised from `seed`; the global random state is left as it was.

    ValueError for an unknown model, a feature that the pack does not have (with the nearest), or no input at all.
    """
    features = _features(config, schema)
    rate = base_rate(schema)
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
                base_rate=rate,
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
                base_rate=rate,
            )
        if config.name == "taste":
            return Taste(
                features,
                task_features=config.task_features,
                embedding_dim=config.embedding_dim,
                num_numeric=num_numeric,
                bottom=config.bottom,
                hidden=config.hidden,
                dropout=config.dropout,
                base_rate=rate,
            )
    raise ValueError(f"model.name is {config.name!r}: must be one of {', '.join(MODELS)}")


def base_rate(schema: PackSchema) -> float:
    """The logit that predicts the mean training label: the mean itself, or the log-odds of 0/1 labels."""
    mean = schema.label_mean
    if not schema.binary_label:
        return mean
    return math.log(mean / (1 - mean)) if 0 < mean < 1 else 0.0


def _features(config: ModelConfig, schema: PackSchema) -> tuple[str, ...]:
    known = [feature.name for feature in schema.features]
    for key in ("features", "task_features"):
        names = getattr(config, key)
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                hint = f"; the nearest is {nearest[0]!r} of {', '.join(known)}" if nearest else ", which has none"
                raise ValueError(f"model.{key} names {name!r}, which is not in the pack{hint}")
            if names.count(name) > 1:
                raise ValueError(f"model.{key} names {name!r} twice")
    return tuple(config.features or known)
