"""Texts that a model meets after it was made: it encodes each once, and a bounded number of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmeta.data.prepare.encoder import EncodedTables
from gmeta.data.prepare.new_texts import renumbered
from gmeta.data.schema import PackSchema
from gmeta.meta.learner import MetaLearner

MOST_TEXTS = 1 << 16
"""So many texts of a table are added to a model; when more come, it forgets these and begins anew."""


class ModelTexts:
    """The texts that a learner's model was given beside its own.

    A model that reads texts has `add_texts(table, texts)`, which gives texts the next ids, and `forget_texts(table)`,
    which forgets all of a table that were added. To a model without these a new text is none.
    """

    def __init__(self, learner: MetaLearner, schema: PackSchema) -> None:
        self._model: Any = learner.model
        self._schema = schema
        self._sizes = {schema.feature(name).table: text.num_texts for name, text in learner.texts.items()}
        self._added: dict[str, dict[str, int]] = {table: {} for table in self._sizes}
        self._lock = Lock()

    @contextmanager
    def known(self, encoded: EncodedTables) -> Iterator[Mapping[str, NDArray[Any]]]:
        """Give the arrays of encoded rows, with the model's ids of new texts. They are good within the block alone:
        until it ends no other rows bring new texts.
        """
        new = {table: texts for table, texts in encoded.texts.items() if texts and table in self._sizes}
        if not new:
            yield encoded.arrays
            return
        with self._lock:
            ids = {table: self._ids_of(table, texts) for table, texts in new.items()}
            yield renumbered(encoded.arrays, self._schema, ids)

    def num_new(self, encoded: EncodedTables) -> int:
        """Return how many texts of encoded rows the model would have to encode."""
        if not hasattr(self._model, "add_texts"):
            return 0
        added = self._added
        return sum(text not in added[table] for table in added for text in encoded.texts.get(table, ()))

    def _ids_of(self, table: str, texts: Sequence[str]) -> NDArray[np.int64]:
        if not hasattr(self._model, "add_texts"):
            return np.zeros(len(texts), np.int64)
        known = self._added[table]
        missing = [text for text in texts if text not in known]
        if known and len(known) + len(missing) > MOST_TEXTS:
            self._model.forget_texts(table)
            known.clear()
            missing = list(texts)
        if missing:
            self._model.add_texts(table, missing)
            known |= zip(missing, range(self._sizes[table] + len(known), 2**63), strict=False)
        return np.array([known[text] for text in texts], np.int64)
