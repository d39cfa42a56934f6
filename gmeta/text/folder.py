"""The folder of an encoder: what it must hold, what it is refused for, and the digest that stands for its content.

Nothing in such a folder is run: weights are read as safetensors alone, the tokenizer from tokenizer.json alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError, safe_open

from gmeta.core.files import read_mapping

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK_BYTES = 1 << 20
_INSTALL = "pip install 'gmeta[text]'"


def require_encoder(folder: Path) -> dict[str, Any]:
    """Return the content of config.json of a folder that holds an encoder.

    Raises ValueError where the folder, its config, weights or tokenizer are missing, where the weights are pickled, and
    where the folder brings code of its own.
    """
    if not folder.is_dir():
        raise ValueError(
            f"encoder {folder} is no folder: name one with config.json, *.safetensors and tokenizer.json. "
            "A run reads the folder that it was trained with, wherever that was; a bundle brings it along"
        )
    require_weights(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"encoder {folder} has no tokenizer.json: write one where you have the tokenizer, with "
            f"AutoTokenizer.from_pretrained(…).save_pretrained({str(folder)!r})"
        )
    return read_mapping(folder / "config.json", "restore the file")


def require_weights(folder: Path) -> None:
    """Raise ValueError for a folder without a config or weights, with pickled weights, or with code of its own."""
    if not folder.is_dir():
        raise ValueError(f"encoder {folder} is no folder: name one that save_pretrained wrote")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in (values := read_mapping(path, "restore the file")):
            code = values["auto_map"]
            raise ValueError(f"encoder {folder} wants to run code of its own ({name} has auto_map {code!r}): refused")
    if not (folder / "config.json").is_file():
        raise ValueError(f"encoder {folder} has no config.json: name a folder that save_pretrained wrote")
    if not _weight_files(folder):
        pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        found = f"its weights are pickled ({pickled[0]}), which can run code" if pickled else "it has no weights"
        raise ValueError(f"encoder {folder} has no *.safetensors: {found}; save it with save_pretrained")


def require_sound_weights(folder: Path) -> None:
    """Raise ValueError that names a file of weights which cannot be read, such as a download that was cut off."""
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): restore the file") from None


def copy_encoder(folder: Path, to: Path) -> None:
    """Copy what an encoder is made of: its config, weights and tokenizer, no other file."""
    to.mkdir(parents=True, exist_ok=True)
    for path in (folder / "config.json", folder / "tokenizer.json", *_weight_files(folder)):
        shutil.copyfile(path, to / path.name)


def digest_of(folder: Path, names: Sequence[str] = ("config.json", "tokenizer.json")) -> str:
    """Return 32 hex digits for the content of an encoder's folder: its config, weights and tokenizer, or other files of
    these names beside its weights.
    """
    digest = xxhash.xxh3_128()
    for path in (*(folder / name for name in names), *_weight_files(folder)):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


class TextTokenizer:
    """Turns texts into token ids, as an encoder's tokenizer.json says, special tokens included.

    `pad` is the id that fills up shorter texts, `stop` the one that ends a text where there is one, and `vocabulary`
    the number of ids.
    """

    def __init__(self, folder: Path, pad: int | None, stop: int | list[int] | None = None) -> None:
        """Read tokenizer.json; `pad` and `stop` are what the encoder's config says. Raises ValueError where it cannot
        be read.
        """
        self._tokenizer = _open(folder / "tokenizer.json")
        own = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.pad = pad if pad is not None else int(own["pad_id"]) if own else 0
        self.stop = stop[0] if isinstance(stop, list) else stop
        self.vocabulary: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._cut: int | None = None

    def __call__(self, texts: Sequence[str], most: int) -> tuple[list[list[int]], list[bool]]:
        """Return the ids of each text, at most `most`, and which texts were cut for that.

        Raises ValueError for a text that is no Unicode: half of a surrogate pair.
        """
        if most != self._cut:
            special = self._tokenizer.num_special_tokens_to_add(False)
            if most <= special:
                raise ValueError(f"max_tokens is {most}: the tokenizer adds {special} of its own to a text; allow more")
            self._tokenizer.enable_truncation(most)
            self._cut = most
        try:
            encoded = self._tokenizer.encode_batch_fast(list(texts))
        except (TypeError, UnicodeEncodeError):
            require_unicode(texts)
            raise
        return [found.ids for found in encoded], [bool(found.overflowing) for found in encoded]

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts in front of a text and behind it."""
        found = self._tokenizer.encode("a")
        own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
        first, last = (own[0], own[-1] + 1) if own else (len(found.ids), len(found.ids))
        return found.ids[:first], found.ids[last:]


def require_unicode(texts: Sequence[str]) -> None:
    """Raise ValueError that names the first of the texts which UTF-8 cannot write, or which is no text."""
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {position} is {text!r}: it must be text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {position} is no Unicode ({error.reason} at character {error.start}): decode it as what it is, "
                "or with errors='replace'"
            ) from None


def _open(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ValueError(f"texts need the packages tokenizers and transformers: {_INSTALL}") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for a file that it cannot read
        raise ValueError(f"{path} is no tokenizer ({error}): write it again with save_pretrained") from None
