"""The Bayesian linear last layer: what a model declares so that a task's last layer is solved for, not stepped to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmeta.core.errors import require

_DRIFT_ROWS = 30.0
"""On valid users of MovieLens-100K 10 and 30 rows with a standard deviation of .5 gain AUC .004 to .005."""


class BayesianLinear(nn.Module):
    """A last layer with one output whose weights have a Gaussian prior, of which a task learns the posterior.

        logit = offset + basis . weight + bias,        (weight, bias) ~ N((weight, bias), C C^T)

    A model calls it last, returns what it returns, and names it in its attribute `last_layer`. A model that has a
    `finish`, a function of single logits, returns that of it. Then `meta.adapt: [last_layer]` solves for each task's
    own weights on the support: by Bayesian linear regression where the support's loss is squared, and by Newton's
    method on the logistic loss. The prior's mean, its covariance and the noise are parameters, which the outer loop
    learns. Relatives: neural linear models, ALPaCA (Harrison et al. 2018), R2-D2 (Bertinetto et al. 2019), deep kernel
    learning. With `weight` and `bias` 0 and fixed bases, it is factor analysis.

    `width` is the number of bases d; `bias_std` is the prior's standard deviation of a task's bias, that of weights
    is 1 at first. `noise` is the variance of labels about their mean, for squared losses.

    `scale` is the unit of the logits, such as the deviation of labels that are amounts: weights, standard deviations
    and noise are in units of it, so that rates and starts that suit stars suit them too.

    With `drift_std` a task's level was another in the past than it is in the query, by a normal number of that standard
    deviation at first: support row n from the end has the offset number * (1 - exp(-n / r)), with r = 30 rows at first.
    Both are learned, from supports in the order of time.
    """

    place: Tensor

    def __init__(
        self, width: int, *, bias_std: float = 0.5, noise: float = 1.0, drift_std: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        require(width >= 1, "width", width, "must be at least 1")
        require(bias_std > 0, "bias_std", bias_std, "must be more than 0")
        require(noise > 0, "noise", noise, "must be more than 0")
        require(drift_std >= 0, "drift_std", drift_std, "must be 0 (off) or more")
        require(0 < scale < math.inf, "scale", scale, "must be a finite number above 0")
        self.width = width
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))
        # One vector of the lower triangle, because weight decay goes to matrices and would shrink the prior.
        row, column = torch.tril_indices(width + 1, width + 1)
        self.register_buffer("place", row * (width + 1) + column, persistent=False)
        start = torch.where(row == column, torch.where(row == width, bias_std, 1.0), 0.0)
        self.prior_factor = nn.Parameter(start)
        self.log_noise = nn.Parameter(torch.tensor([noise]).log())
        self.log_drift = nn.Parameter(torch.tensor([drift_std, _DRIFT_ROWS]).log()) if drift_std else None

    def forward(self, basis: Tensor, offset: Tensor) -> Tensor:
        """Return the logit [...] at the prior's mean, from bases [..., d] and an offset [...]."""
        return self._scaled(F.linear(basis, self.weight, self.bias).squeeze(-1)) + offset

    def prior_mean(self) -> Tensor:
        """Return the mean of (weight, bias), [d + 1]."""
        return self._scaled(torch.cat([self.weight[0], self.bias]))

    def prior_scale(self) -> Tensor:
        """Return C, lower triangular [d + 1, d + 1]."""
        size = self.width + 1
        factor = self.prior_factor.new_zeros(size * size).index_copy(0, self.place, self.prior_factor)
        return self._scaled(factor.view(size, size))

    def drift(self, mask: Tensor) -> Tensor | None:
        """Return the base of the drift of each row of a support, [T, S], from its mask; its weight is N(0, 1). None
        without drift.
        """
        if self.log_drift is None:
            return None
        std, rows = self.log_drift.exp()
        from_end = mask.flip(-1).cumsum(-1).flip(-1)
        return self._scaled(-std * torch.expm1(-from_end / rows))

    def noise(self) -> Tensor:
        """Return the variance of labels about their mean, []."""
        return self._scaled(self._scaled(self.log_noise[0].exp()))

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.scale == 1 else value * self.scale


class OutputMap(nn.Module):
    """A piecewise linear function of single numbers, the identity at first.

    The best prediction of a rating in absolute error is the median, which is a whole star: a sum over bases cannot be
    that, a learned staircase can. Between `low` and `high` there are `intervals` pieces; outside, it goes on with slope
    1.
    """

    def __init__(self, low: float, high: float, intervals: int) -> None:
        super().__init__()
        require(low < high, "low", low, f"must be less than high, {high!r}")
        require(intervals >= 1, "intervals", intervals, "must be at least 1")
        self.low, self.high, self.intervals = low, high, intervals
        self.change = nn.Parameter(torch.zeros(intervals + 1))  # of the value at each end of a piece

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped numbers, in the shape of `x`."""
        place = ((x - self.low) / (self.high - self.low) * self.intervals).clamp(0, self.intervals)
        left = place.detach().floor().clamp(max=self.intervals - 1)
        share, index = place - left, left.to(torch.int64)
        return x + torch.lerp(self.change[index], self.change[index + 1], share)
