"""What a batch of next items is compared with: items drawn from the catalogue, the same ones on every rank.

The draw is a function of (seed, epoch, batch), so that neither the number of ranks nor the order of their threads
changes what is learned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gmeta.core.batch import Examples, TaskBatch, text_ids_of
from gmeta.data.catalogue import Catalogue
from gmeta.data.schema import OOV, Feature, PackSchema

LOG_CHANCE = "log_chance"
"""What examples carry where items are not drawn alike: the logarithm of an item's share of the draws, [..., 1]."""
Draw = Literal["uniform", "popularity"]
_AFTER_TRAINING = (1 << 31) - 1  # an epoch that no training reaches


class CandidateDraw:
    """Draws `count` items of each domain for every batch; with 0 all items are candidates of every batch.

    By popularity an item is drawn as often as training has it, and once more.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        schema: PackSchema,
        *,
        domain: str | None,
        count: int,
        draw: Draw = "uniform",
        seed: int = 0,
    ) -> None:
        self.catalogue = catalogue
        self.schema = schema
        self.count, self.seed = count, seed
        items = np.arange(1, catalogue.num_ids)
        of_domain = catalogue.owned[domain][1:] if domain is not None else np.zeros(len(items), np.int64)
        self._domains = [items[of_domain == value] for value in np.unique(of_domain)]
        self._shares: list[NDArray[np.float64]] | None = None
        self._log_chance: NDArray[np.float32] | None = None
        if draw == "popularity" and count:
            self._shares = []
            self._log_chance = np.zeros(catalogue.num_ids, np.float32)
            for some in self._domains:
                share = catalogue.count[some] + 1.0
                share /= share.sum()
                self._shares.append(np.cumsum(share))
                self._log_chance[some] = np.log(share)

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with its candidates, and with what the draw's chances are where they differ."""
        return self._beside(batch, self.drawn(batch.epoch, batch.index))

    def after_training(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with the candidates that users adapt to after training, whatever batch they are in."""
        return self._beside(batch, self.drawn(_AFTER_TRAINING, 0))

    def _beside(self, batch: TaskBatch, items: NDArray[np.int64]) -> TaskBatch:
        batch = replace(batch, shared=catalogue_examples(self.catalogue, items, self.schema))
        return batch if self._log_chance is None else self._with_chances(batch)

    def drawn(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return the items that batch `index` of `epoch` is compared with; one may come twice."""
        if not self.count:
            return np.arange(1, self.catalogue.num_ids)
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, (epoch << 32) + index], np.uint64)))
        found = []
        for number, some in enumerate(self._domains):
            if self._shares is None:
                place = generator.integers(0, len(some), self.count)
            else:
                place = np.searchsorted(self._shares[number], generator.random(self.count) * self._shares[number][-1])
            found.append(some[np.minimum(place, len(some) - 1)])
        return np.concatenate(found)

    def _with_chances(self, batch: TaskBatch) -> TaskBatch:
        assert self._log_chance is not None
        chances, item = torch.from_numpy(self._log_chance), self.catalogue.item

        def told(side: Examples) -> Examples:
            return replace(side, given={**side.given, LOG_CHANCE: chances[side.ids[item]].unsqueeze(-1)})

        assert batch.shared is not None
        parts = tuple(self._with_chances(replace(part, shared=batch.shared)) for part in batch.parts)
        return replace(
            batch, support=told(batch.support), query=told(batch.query), shared=told(batch.shared), parts=parts
        )


def catalogue_examples(catalogue: Catalogue, items: NDArray[np.int64], schema: PackSchema) -> Examples:
    """Return items [C] as examples [1, C] with what the catalogue knows of them; what items do not own is unknown."""
    owned = {**catalogue.owned, catalogue.item: np.arange(catalogue.num_ids)}
    size = (1, len(items))

    def column(name: str) -> torch.Tensor:
        values = owned[name][items] if name in owned else np.zeros(len(items), np.int64)
        return torch.from_numpy(values.astype(np.int64)).view(size)

    def row_of(feature: Feature) -> torch.Tensor:
        ids = column(feature.name)
        return torch.where(ids < feature.num_ids, ids, OOV)  # texts that no row of a table stands for lie behind

    return Examples(
        ids={feature.name: row_of(feature) for feature in schema.features if feature.kind == "categorical"},
        bags={},
        dense=torch.zeros(*size, 0),
        label=torch.zeros(size),
        mask=torch.ones(size, dtype=torch.bool),
        row=torch.full(size, -1),
        item_cold=torch.zeros(size, dtype=torch.bool),
        given={text_ids_of(f.name): column(f.name).unsqueeze(-1) for f in schema.features if f.num_texts is not None},
    )
