"""The inner loop in closed form: the posterior of every task's last layer, given its support.

With bases B = (basis, 1) C whitened by the prior's factor, a task's weights are mean + C u with u ~ N(0, I). The
posterior's mode of u solves g(u) = B^T V (label - mu(offset + B u)) / noise - u = 0, where mu is the identity for a
squared loss, and the sigmoid, with noise 1, for a logistic one. V holds the rows' own weights, 1 where they have none:
a row of weight v counts as v rows. Newton's method finds the mode, at once for a squared loss.
H = I + B^T W B is at least I, so there is a solution also with fewer rows than weights, with rows that are alike, and
with labels that are all one.

For the logistic loss a whole step may go too far: where 50 clicks contradict a prior of 2 %, it swings between the two
ends for ever. A step that moves no logit by more than d lowers the loss as far as log(1 + d) / d of it, because the
third derivative along it is at most d times the second (Bach, "Self-concordant analysis for logistic regression",
2010); so that much is taken where all of it, with d > 1, ends where the loss rises.

Second order: one more step u* + H^-1 g(u*), of which g alone is differentiated, has the exact gradient of the solution
by the implicit function theorem, because g is 0 there. First order: what was solved for is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gmeta.meta.fast_weights import FastWeights, Posterior
from gmeta.meta.losses import widen
from gmeta.models.last_layer import BayesianLinear

NEWTON_STEPS = 40
"""At most. Supports of clicks take 3 to 5, 300 labels against a prior's logit of 100 take 31."""
LOSSES = ("bce", "mse")
"""Losses of the support that have a solver."""


def require_solver(loss: str) -> None:
    """Raise ValueError for a support's loss that has no closed form."""
    if loss not in LOSSES:
        raise ValueError(
            f"the support's loss is {loss!r}, and a last layer is solved for {' and '.join(LOSSES)} alone: set "
            "meta.inner_loss to mse"
        )


def solve(
    layer: BayesianLinear,
    basis: Tensor,
    logits: Tensor,
    label: Tensor,
    mask: Tensor,
    *,
    weight: Tensor | None = None,
    loss: str,
    second_order: bool,
) -> Posterior:
    """Return the posterior of T tasks' weights, from the bases [T, S, d] of their support and its logits at the
    prior's mean [T, S]. Rows count `weight` [T, S] times.

    A task without support, or whose weights are all 0, keeps the prior.
    """
    kind = widen(logits).dtype
    # Rows of padding are 0, and so change nothing below. In double precision, because H has the square of the bases'
    # condition: with float32 its factor is lost where noise is 1e-9 of a base's square, as it is for constant labels.
    basis = torch.where(mask.unsqueeze(-1), with_one(basis), 0).double()
    logits, label = torch.where(mask, logits, 0).double(), torch.where(mask, label, 0).double()
    weight = None if weight is None else torch.where(mask, weight, 0).double()
    with torch.autocast(logits.device.type, enabled=False):
        scale, mean = layer.prior_scale().double(), layer.prior_mean().double()
        white, drift = basis @ scale, layer.drift(mask)
        first = 0
        if drift is not None:  # of the support alone: the query's rows have none, so its weight is not kept
            white, first = torch.cat([torch.where(mask, drift.double(), 0).unsqueeze(-1), white], -1), 1
        noise = layer.noise().double() if loss == "mse" else None
        with torch.no_grad():
            u, factor = _mode(white, logits, (label, weight), noise, torch.finfo(kind).eps ** 0.5)
        if second_order:
            gradient, _ = _gradient(u, logits + _product(white, u), white, (label, weight), noise)
            change = (u + _solved(factor, gradient))[:, first:] @ scale.T
        else:
            change = (u[:, first:] @ scale.T).detach()
        factor = factor[:, first:, first:]  # the inverse's rows of the other weights are 0 in the first column
        spread = torch.linalg.solve_triangular(factor, scale.detach().T.expand_as(factor), upper=False).mT
        return Posterior((mean + change).to(kind), spread.to(kind))


_Labels = tuple[Tensor, Tensor | None]
"""The labels of rows [T, S], and how often each counts [T, S]; None: once."""


def _mode(white: Tensor, logits: Tensor, label: _Labels, noise: Tensor | None, near: float) -> tuple[Tensor, Tensor]:
    """Return u [T, D] where g is 0, and the Cholesky factor of H there [T, D, D].

    A task has converged when a step moves no logit of its support by more than `near`: the error is then that squared.
    It waits for the others, so that its result is its own.
    """
    prior = torch.eye(white.shape[-1], dtype=white.dtype, device=white.device)
    u, eta = white.new_zeros(white.shape[0], white.shape[2]), logits
    going = torch.ones_like(u[:, :1], dtype=torch.bool)
    for _ in range(NEWTON_STEPS if logits.numel() else 0):
        gradient, weights = _gradient(u, eta, white, label, noise)
        factor, info = _factor(prior, white, weights)
        step = _solved(factor, gradient)
        if noise is not None:  # H is the same everywhere
            return step, _found(factor, info)
        moved = _product(white, step)
        farthest = moved.abs().amax(-1, keepdim=True)
        share = going.to(u.dtype)
        if (farthest > 1).any():
            ahead, _ = _gradient(u + step, eta + moved, white, label, noise)
            beyond = (ahead * step).sum(-1, keepdim=True) < 0
            share = torch.where(beyond & (farthest > 1), farthest.log1p() / farthest, share)
        u, eta = u + share * step, eta + share * moved
        going = going & (farthest > near)
        if not going.any():
            break
    _, weights = _residual(eta, label, noise)
    return u, _found(*_factor(prior, white, weights))


def _gradient(u: Tensor, eta: Tensor, white: Tensor, label: _Labels, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return g(u) [T, D], and each row's weight in H [T, S]. `eta` are the logits at u, `noise` is None for the
    logistic loss.
    """
    residual, weights = _residual(eta, label, noise)
    return torch.bmm(residual.unsqueeze(-2), white).squeeze(-2) - u, weights


def _residual(eta: Tensor, label: _Labels, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what each row's loss falls by, by its logit, and its weight in H, both [T, S]."""
    value, counts = label
    if noise is None:
        mean = torch.sigmoid(eta)
        residual, curvature = value - mean, mean * (1 - mean)
    else:
        residual, curvature = (value - eta) / noise, (1 / noise).expand_as(eta)
    return (residual, curvature) if counts is None else (counts * residual, counts * curvature)


def _product(white: Tensor, u: Tensor) -> Tensor:
    """Return B u, [T, S]."""
    return torch.bmm(white, u.unsqueeze(-1)).squeeze(-1)


def _factor(prior: Tensor, white: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of I + B^T W B, and int [T], not 0 where there is none, which is not raised. `prior`
    is I.
    """
    factor, info = torch.linalg.cholesky_ex(torch.baddbmm(prior, white.mT, white * weights.unsqueeze(-1)))
    return factor, info


def _found(factor: Tensor, info: Tensor) -> Tensor:
    """Return factors that are not finite where there is none: all ranks must come to the end of a step."""
    found: Tensor = factor.masked_fill_((info != 0).view(-1, 1, 1), torch.nan)
    return found


def _solved(factor: Tensor, gradient: Tensor) -> Tensor:
    return torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)


def with_one(basis: Tensor) -> Tensor:
    """Append the base of the bias: [..., d] -> [..., d + 1]."""
    return torch.cat([basis, torch.ones_like(basis[..., :1])], -1)


def shifted(layer: BayesianLinear, posterior: Posterior, basis: Tensor, logits: Tensor) -> Tensor:
    """Return the logits [T, Q] at the posterior's mean, from bases [T, Q, d] and logits at the prior's mean [T, Q]."""
    change = posterior.mean - layer.prior_mean().to(posterior.mean.dtype)
    with torch.autocast(logits.device.type, enabled=False):
        moved: Tensor = widen(logits) + (with_one(widen(basis)) @ change.unsqueeze(-1)).squeeze(-1)
        return moved


def deviation(posterior: Posterior, basis: Tensor) -> Tensor:
    """Return the posterior standard deviation of the logits of bases [T, Q, d], [T, Q]."""
    found: Tensor = torch.linalg.vector_norm(with_one(widen(basis)) @ posterior.spread, dim=-1)
    return found


def prior_of(layer: BayesianLinear, num_tasks: int) -> Posterior:
    """Return what is known of tasks without support."""
    mean, scale = layer.prior_mean(), layer.prior_scale()
    return Posterior(mean.expand(num_tasks, -1), scale.expand(num_tasks, -1, -1))


def averaged(logits: Tensor, deviation: Tensor) -> Tensor:
    """Return the logits of the mean probability of normal logits: MacKay's approximation (1992), logit / sqrt(1 + pi
    deviation^2 / 8). Where a task's support says little, its rows move towards one half.
    """
    return logits / (1 + math.pi / 8 * deviation**2).sqrt()


def sampled_weights(fast: FastWeights, noise: Tensor) -> FastWeights:
    """Return fast weights whose posterior is one draw from it, without spread: for Thompson sampling.

    `noise` [T, D] are standard normal numbers. ValueError where there is no posterior.
    """
    posterior = require_posterior(fast)
    drawn = posterior.mean + (posterior.spread @ noise.to(posterior.mean).unsqueeze(-1)).squeeze(-1)
    return replace(fast, posterior=Posterior(drawn, torch.zeros_like(posterior.spread)))


def require_posterior(fast: FastWeights) -> Posterior:
    """Return the posterior. ValueError where no last layer was solved for."""
    if fast.posterior is None:
        raise ValueError("only a last layer that was solved for has a posterior: train with meta.adapt [last_layer]")
    return fast.posterior


def finished(model: nn.Module, logits: Tensor) -> Tensor:
    """Return what a model makes of its last layer's output: `finish` of it, where the model has one."""
    finish = getattr(model, "finish", None)
    return logits if finish is None else finish(logits)


class Calls:
    """The bases and the outputs of the last layer, call by call, inside `recording`."""

    def __init__(self) -> None:
        self.bases: list[Tensor] = []
        self.outputs: list[Tensor] = []


@contextmanager
def recording(layer: BayesianLinear) -> Iterator[Calls]:
    """Record what `layer` gets and returns inside the block."""
    calls = Calls()

    def note(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        calls.bases.append(args[0] if args else kwargs["basis"])
        calls.outputs.append(output)

    hook = layer.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
