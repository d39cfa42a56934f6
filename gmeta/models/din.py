"""Deep Interest Network: what a user did before counts by how much it has to do with the item that is asked about.

Guorui Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmeta.core.batch import mask_of
from gmeta.models.inputs import InputSpec, as_vectors, check_dropout, check_widths, history_of, logits_of, output_layer


class DIN(nn.Module):
    """[interest in the target, vectors of all other inputs, numeric columns] -> hidden ReLU layers -> one logit.

        weight_l = unit([item, key_l, item - key_l, item * key_l])    for each value of the history
        interest = sum of weight_l * key_l

    `target` names the item's feature (without it, the id of the item), and `history` the sequence of the same
    vocabulary, which is not pooled (without it, the only such one). `attention` are the widths of the unit's hidden
    layers. As in the paper, weights are not normalised: their sum tells how strong the interest is. Two things differ
    from it: the layers' functions are ReLU, since Dice computes with the other examples of a batch, and the product is
    by element, as in the authors' code. A history without values is the zero vector. Other sequences count by their
    mean.
    """

    head = "output"
    decision_layers = ("layers", "output")

    def __init__(
        self,
        inputs: InputSpec,
        *,
        target: str = "",
        history: str = "",
        attention: Sequence[int] = (36,),
        hidden: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_widths("attention", attention)
        check_widths("hidden", hidden)
        check_dropout(dropout)
        self.target, self.history = history_of(inputs, target, history)
        self.features = tuple(inputs.widths)
        self.others = tuple(name for name in self.features if name != self.history)
        self.num_numeric = inputs.num_numeric
        widths = [4 * inputs.widths[self.target], *attention]
        pairs = itertools.pairwise(widths)
        unit = [part for num_in, num_out in pairs for part in (nn.Linear(num_in, num_out), nn.ReLU())]
        self.unit = nn.Sequential(*unit, nn.Linear(widths[-1], 1))
        widths = [inputs.width, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)
        self.output = output_layer(widths[-1], inputs)
        self.num_labels = inputs.num_labels

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        """Return logits [...], of several labels [..., K], from dense [..., F], one [..., d] for each feature, and the
        history [..., L, d].
        """
        parts = [self._interest(embedded), *as_vectors(embedded, self.others)]
        if self.num_numeric:
            parts.append(dense)
        x = torch.cat(parts, -1)
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x)))
        return logits_of(self.output(x), self.num_labels)

    def _interest(self, embedded: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the history [..., d]."""
        keys, mask = embedded[self.history], embedded[mask_of(self.history)]
        item = embedded[self.target].unsqueeze(-2).expand_as(keys)
        weights = self.unit(torch.cat([item, keys, item - keys, item * keys], -1))  # [..., L, 1]
        return (torch.where(mask.unsqueeze(-1), weights, 0) * keys).sum(-2)
