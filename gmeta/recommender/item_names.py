"""The raw values of a catalogue's items: which item an event means, and what an item is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from gmeta.data.catalogue import Catalogue, catalogue_file, read_item_values
from gmeta.data.identity import vocabulary_file, vocabulary_values
from gmeta.data.prepare.direct import hash_texts
from gmeta.data.schema import OOV, PackSchema

Ints = NDArray[np.int64]


class ItemNames:
    """Names and ids of items; more may be added behind those of the catalogue. `domain` is the feature of domains."""

    def __init__(self, vocab_folder: Path, schema: PackSchema, catalogue: Catalogue, domain: str | None) -> None:
        self._values: list[pa.Array] = [pa.array([""], pa.large_string()), *read_item_values(vocab_folder).chunks]
        ids = np.arange(1, catalogue.num_ids, dtype=np.int32)
        names = [(pa.chunked_array(self._values[1:], pa.large_string()).to_pylist(), ids)]
        self._hashes = hash_texts(lambda: names, str(catalogue_file(vocab_folder)))
        self._added: dict[str, int] = {}
        self.domains: list[str] = [""]  # by id
        self._domain = np.zeros(catalogue.num_ids, np.int64)
        if domain is not None:
            file = vocabulary_file(vocab_folder, schema.feature(domain).table)
            cure = "copy it again from the pack, or prepare the pack again"
            self.domains += [str(name) for name in vocabulary_values(file, cure).to_pylist()]
            self._domain = catalogue.owned[domain]
        self.has_domains = domain is not None

    def __len__(self) -> int:
        """Return the number of ids, 0 included."""
        return len(self._domain)

    @property
    def domain(self) -> Ints:
        """Return the domain id of each item, [len(self)]."""
        return self._domain

    def names(self, ids: Ints) -> pa.Array:
        """Return the raw values of items."""
        return pa.chunked_array(self._values, pa.large_string()).take(pa.array(ids)).cast(pa.string()).combine_chunks()

    def domain_names(self, domains: Ints) -> pa.Array:
        """Return the names of domains."""
        return pa.array(self.domains, pa.string()).take(pa.array(domains))

    def order_of_domains(self) -> Ints:
        """Return the place of each domain id in the order of names."""
        place = np.zeros(len(self.domains), np.int64)
        place[sorted(range(len(self.domains)), key=self.domains.__getitem__)] = np.arange(len(self.domains))
        return place

    def find(self, items: Sequence[str], domains: Sequence[str | None]) -> Ints:
        """Return the id of the item that each event means, `OOV` of an unknown one.

        As in a pack, an item is another one in another domain, and the ids of items of several have the domain before.
        """
        found = self._find(items)
        if not self.has_domains:
            return found
        known = {name: number for number, name in enumerate(self.domains)} | {None: OOV}
        given = np.array([known.get(name, -1) for name in domains], np.int64).reshape(len(items))
        found[(given != OOV) & (self._domain[found] != given)] = OOV
        left = np.flatnonzero((found == OOV) & (given > OOV))
        found[left] = self._find([f"{domains[place]}|{items[place]}" for place in left.tolist()])
        return found

    def add(self, items: Sequence[str], domains: Ints) -> None:
        """Give items that are unknown the next ids. One whose name is taken, in another domain, gets its domain before
        it.
        """
        taken = self._find(items) != OOV
        names = [
            f"{self.domains[domain]}|{item}" if is_taken else item
            for item, domain, is_taken in zip(items, domains.tolist(), taken.tolist(), strict=True)
        ]
        self._added |= zip(names, range(len(self), len(self) + len(names)), strict=True)
        self._values.append(pa.array(names, pa.large_string()))
        self._domain = np.concatenate([self._domain, domains])

    def _find(self, names: Sequence[str]) -> Ints:
        salt, known = self._hashes.salt, self._hashes.hashes
        wanted = np.array([xxhash.xxh3_64_intdigest(name.encode(), salt) for name in names], np.uint64)
        found = np.zeros(len(names), np.int64)
        if len(known):
            place = np.minimum(known.searchsorted(wanted), len(known) - 1)
            found = np.where(known[place] == wanted, self._hashes.ids[place], OOV).astype(np.int64)
        if self._added:
            for place in np.flatnonzero(found == OOV).tolist():
                found[place] = self._added.get(names[place], OOV)
        return found
