"""What models that read texts have in common: the texts of one vocabulary, and the encoder that they were made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmeta.models.inputs import InputSpec
from gmeta.text.folder import copy_encoder
from gmeta.text.sources import TextSource
from gmeta.text.store import open_behaviours, writing_store

_TEXTS_PER_SHARD = 4096


class TextModel(nn.Module):
    """A model with a `TextSource`, and what others ask of it: new texts, its files in a bundle, and whether they fit.

    It calls `keep_texts` when it is made.
    """

    paths = ("encoder", "store")
    """Arguments that are folders, or URLs of folders in an object store."""
    unadapted = ("low",)
    """Lower layers that are trained are the same for all tasks: kept vectors are not a task's."""

    @staticmethod
    def check_folder(folder: Path) -> None:
        """Raise ValueError for a copied behaviour store that is damaged; an encoder is checked where it is opened."""
        if not (folder / "config.json").exists():
            open_behaviours(folder).verify()

    def keep_texts(self, inputs: InputSpec, name: str, source: TextSource, encoder: str) -> None:
        """Take the texts of the vocabulary of a feature; `encoder` is the folder that they were encoded with."""
        self.table = inputs.tables[name]
        self._folder = Path(encoder)
        self._texts = inputs.texts_by_id(name)
        self._source = [source]  # a list hides it from the model's state
        self.low = source.layers
        digest = torch.frombuffer(bytearray.fromhex(source.spec.encoder), dtype=torch.uint8)
        self.register_buffer("encoder_digest", digest)

    @property
    def source(self) -> TextSource:
        """Return the texts that the model knows."""
        return self._source[0]

    def told(self) -> list[str]:
        """Return lines for people, before training."""
        source = self.source
        most = source.spec.max_tokens
        return [f"texts cut at {most} tokens: {source.num_cut:,} of {source.num_given - 1:,}"] if source.num_cut else []

    def check_loaded(self) -> None:
        """Raise ValueError where the loaded weights were trained with another encoder."""
        trained, found = bytes(self.get_buffer("encoder_digest").tolist()).hex(), self.source.spec.encoder
        if trained != found:
            raise ValueError(
                f"{self._folder} holds another encoder ({found}) than these weights were trained with ({trained}): "
                "restore its files, or train anew"
            )
        self.source.loaded()

    def before_step(self, step: int) -> None:
        """Learn that a training step begins after `step` others."""
        self.source.before_step(step)

    def add_texts(self, table: str, texts: Sequence[str]) -> None:
        """Encode texts that the model was made without; their ids go on from the last one."""
        if table == self.table:
            self.source.add(texts)

    def forget_texts(self, table: str) -> None:
        """Forget the texts that `add_texts` added."""
        if table == self.table:
            self.source.forget()

    def save_assets(self, folder: Path) -> dict[str, str]:
        """Write what the model needs besides its weights, and return the arguments that name it, relative to `folder`:
        the encoder and, where vectors are kept, a behaviour store of its texts.

        Texts lie in shards by id, so that more texts leave the earlier files as they are. An evicted id has none.
        """
        copy_encoder(self._folder, folder / "encoder")
        if self.source.encode != "behaviours":
            return {"encoder": "encoder", "store": ""}
        source = self.source
        with writing_store(folder / "texts", source.spec) as writer:
            for start in range(1, source.num_given, _TEXTS_PER_SHARD):
                ids = range(start, min(start + _TEXTS_PER_SHARD, source.num_given))
                texts = {text: i for i, text in zip(ids, self._texts[ids.start : ids.stop], strict=True) if text}
                writer.append(list(texts), source.kept[list(texts.values())])
        (folder / "texts" / "lock").unlink()  # nobody writes to what is published
        return {"encoder": "encoder", "store": "texts"}

    def _apply(self, fn: Any, recurse: bool = True) -> TextModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.source.follow(next(p for p in self.parameters() if p.is_floating_point()))
        return self
