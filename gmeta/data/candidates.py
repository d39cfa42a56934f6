"""What a batch of next items is compared with: items drawn from the catalogue and, where wanted, items of the batch's
own events; the same ones on every rank.

The draw is a function of (seed, epoch, batch), so that neither the number of ranks nor the order of their threads
changes what is learned. Events of the batch that other ranks compute are read from the pack, and not sent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gmeta.core.batch import Examples, TaskBatch, text_ids_of
from gmeta.data.catalogue import Catalogue
from gmeta.data.cells import ranges
from gmeta.data.order import permutation
from gmeta.data.schema import OOV, Feature, PackSchema
from gmeta.data.shards import PackSplit

LOG_CHANCE = "log_chance"
"""What examples carry where items are not drawn alike: the logarithm of how often an item is expected among the
candidates, for each draw of its domain, [..., 1].
"""
Draw = Literal["uniform", "popularity"]
AFTER_TRAINING = (1 << 31) - 1
"""An epoch that no training reaches."""
_IN_BATCH = 5  # keeps the choice of events apart from the other hashes of (seed, epoch, batch)


class CandidateDraw:
    """Draws `count` items of each domain for every batch; with 0 all items are candidates of every batch.

    Items that no training row has are none: never a target, they would be pushed down alone. Of a domain that training
    does not have all are. By popularity an item is drawn as often as training has it, and once more. Candidates are
    also the items of `in_batch` events of the whole batch, all of them where it has no more; `split` has their rows. An
    item is then expected

        count * share of its domain's draws + in_batch * share of all training events

    times among the candidates (the correction of in-batch negatives: Yi et al., "Sampling-bias-corrected neural
    modeling for large corpus item recommendations", RecSys 2019).
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
        in_batch: int = 0,
        split: PackSplit | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.schema = schema
        self.count, self.seed, self.in_batch = count, seed, in_batch
        self._split = split
        items = np.arange(1, catalogue.num_ids)
        of_domain = catalogue.owned[domain][1:] if domain is not None else np.zeros(len(items), np.int64)
        every = [items[of_domain == value] for value in np.unique(of_domain)]
        self._domains = [some[catalogue.count[some] > 0] if catalogue.count[some].any() else some for some in every]
        self._every = np.sort(np.concatenate(self._domains))
        self._ends: list[NDArray[np.float64]] | None = [] if draw == "popularity" and count else None
        self._alike = self._ends is None and not in_batch
        self._share = np.ones(catalogue.num_ids)  # of the draws of its domain; unknown items have none
        for some, all_of_domain in zip(self._domains, every, strict=True):
            share = np.ones(len(some)) if self._ends is None else catalogue.count[some] + 1.0
            share /= share.sum()
            self._share[all_of_domain] = share.min()  # of an item that only a user who adapts has
            self._share[some] = share
            if self._ends is not None:
                self._ends.append(np.cumsum(share))

    def __call__(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with its candidates, and with what the draw's chances are where they differ."""
        return self._beside(batch, self.drawn(batch.epoch, batch.index), self._of_batch(batch))

    def after_training(self, batch: TaskBatch) -> TaskBatch:
        """Return the batch with the candidates that users adapt to after training, whatever batch they are in. Events
        of training, drawn alike, then stand for those of a batch.
        """
        ends = np.cumsum(self.catalogue.count)
        events = self._generator(AFTER_TRAINING, 1).integers(0, max(1, ends[-1]), self.in_batch)
        return self._beside(batch, self.drawn(AFTER_TRAINING, 0), np.searchsorted(ends, events, side="right"))

    def drawn(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return the items that batch `index` of `epoch` is compared with; one may come twice."""
        if not self.count:
            return self._every
        generator = self._generator(epoch, index)
        found = []
        for number, some in enumerate(self._domains):
            if self._ends is None:
                place = generator.integers(0, len(some), self.count)
            else:
                place = np.searchsorted(self._ends[number], generator.random(self.count) * self._ends[number][-1])
            found.append(some[np.minimum(place, len(some) - 1)])
        return np.concatenate(found)

    def _generator(self, epoch: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, (epoch << 32) + index], np.uint64)))

    def _of_batch(self, batch: TaskBatch) -> NDArray[np.int64]:
        """Return the items of `in_batch` events of the whole batch, each event at most once."""
        if not self.in_batch:
            return np.zeros(0, np.int64)
        assert self._split is not None, "in-batch candidates are read from a split"
        assert batch.stretches is not None, "a batch with in-batch candidates says where its rows are"
        rows = ranges(*batch.stretches)
        chosen = permutation(len(rows), self.seed, batch.epoch, batch.index, _IN_BATCH)[: self.in_batch]
        _, query, _ = self._split.gather(self._split.rows_apart(rows[chosen]))
        return query.ids[self.catalogue.item][:, 0].numpy()

    def _beside(self, batch: TaskBatch, drawn: NDArray[np.int64], others: NDArray[np.int64]) -> TaskBatch:
        items = np.concatenate([drawn, others])
        batch = replace(batch, shared=catalogue_examples(self.catalogue, items, self.schema))
        return batch if self._alike else self._with_chances(batch, len(others))

    def _with_chances(self, batch: TaskBatch, in_batch: int) -> TaskBatch:
        """Return the batch with the chances of its items, where so many of the candidates are those of its events."""
        per_event = in_batch / max(1, int(self.catalogue.count.sum())) / self.count

        def told(side: Examples) -> Examples:
            ids = side.ids[self.catalogue.item].numpy()
            chance = np.log(self._share[ids] + per_event * self.catalogue.count[ids]).astype(np.float32)
            return replace(side, given={**side.given, LOG_CHANCE: torch.from_numpy(chance).unsqueeze(-1)})

        assert batch.shared is not None
        parts = tuple(self._with_chances(replace(part, shared=batch.shared), in_batch) for part in batch.parts)
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
