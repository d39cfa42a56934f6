"""Settings of `gmeta embed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gmeta.core.errors import nearest, require, require_numbers
from gmeta.core.files import is_url

EMBED_VERBS = ("verify", "stats", "compact")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Encode short texts with the lower layers of a text encoder, each once, into a behaviour store. What the store
    has is left alone, so that a next day costs its new texts alone; a stopped run goes on where it was.
    """

    do: list[str] = field(default_factory=list)
    """What to do with a store instead: verify (read every byte), stats, or compact (write small shards together)."""
    store: str
    """Folder of the behaviour store; made where it is missing."""
    texts: list[str] | str = field(default_factory=list)
    """Parquet, CSV or .txt file (a text a line), glob or directory, or a list: [titles.parquet, queries.txt]."""
    column: str | None = None
    """Column of Parquet and CSV files that holds the texts. Unset: their only one."""
    encoder: str | None = None
    """Folder of a transformers encoder: config.json, *.safetensors, tokenizer.json. No code of it is run."""
    layers: int | None = None
    """Layers of the encoder below the split, 0 for its token embeddings alone; those above are trained later."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    """How the states of a text's tokens become a vector: their mean, the last one, or the first one."""
    vectors: int = 1
    """Vectors of a text, 1 to 4, each pooled from an equal segment of its tokens."""
    template: str = "{text}"
    """What is encoded, with {text} where the text goes: 'Title: {text}'."""
    max_tokens: int = 128
    """Tokens of a text, those that the tokenizer adds included; longer texts are cut, and counted."""
    dtype: Literal["fp16", "int8"] = "fp16"
    """How vectors are kept: fp16, or int8 with a scale, half the size and an error of about two percent."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the encoder computes in."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
    nproc: int = 1
    """Processes that encode, each with an encoder of its own. On CUDA they take the devices in turn."""

    @property
    def inputs(self) -> list[str]:
        """Return `texts` as a list."""
        return [self.texts] if isinstance(self.texts, str) else self.texts

    def __post_init__(self) -> None:
        require_numbers(self)
        require(
            not is_url(self.store),
            "store",
            self.store,
            "a store is written in a local folder: embed there, and copy the folder; runs read the copy by "
            "model.args.store",
        )
        require(len(self.do) <= 1, "do", " ".join(self.do), "say one thing")
        if self.do:
            require(self.do[0] in EMBED_VERBS, "do", self.do[0], nearest(self.do[0], EMBED_VERBS))
            for key in ("texts", "column", "encoder", "layers"):
                value = getattr(self, key)
                require(
                    value is None or value == [],
                    key,
                    value,
                    f"it belongs to encoding, not to {self.do[0]}: leave it out",
                )
            return
        require(bool(self.inputs), "texts", self.texts, "name the files whose texts are to be encoded")
        require(self.encoder is not None, "encoder", None, "name the folder of a text encoder")
        layers = self.layers
        require(layers is not None and layers >= 0, "layers", layers, "say how many layers are below the split, from 0")
        require(1 <= self.vectors <= 4, "vectors", self.vectors, "must be in [1, 4]")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        ok = self.template.count("{text}") == 1
        require(ok, "template", self.template, "must hold {text} once, such as 'Title: {text}'")
        require(1 <= self.nproc <= 256, "nproc", self.nproc, "must be in [1, 256]")


@dataclass(frozen=True, kw_only=True)
class EmbedImagesConfig:
    """Turn the images of items into vectors, by a vision encoder in a local folder. A stopped run goes on where it was.

    An image belongs to the item that its file is called by: images/42.png to item 42.
    """

    images: str
    """Folder of images, or a tar archive of them (.tar, .tar.gz): png, jpg, webp, bmp or gif."""
    encoder: str
    """Folder of a transformers encoder of images: config.json, preprocessor_config.json, *.safetensors. No code of it
    is run."""
    out: str
    """Folder to create, or to go on with: Parquet files with the columns item and vector, and images.json. `gmeta
    prepare` takes it as --images."""
    batch: int = 32
    """Images that are encoded at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.batch >= 1, "batch", self.batch, "must be at least 1")
