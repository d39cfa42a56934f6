"""`gmeta embed-images`: images out of an archive or a folder to a vector each, by a vision encoder in a local folder.

The vectors are Parquet files (item, vector) in a folder, with what made them in `images.json`. An image belongs to the
item that its file is called by. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from gmeta.config.text import EmbedImagesConfig
from gmeta.core.files import read_mapping, replacing, write_text
from gmeta.data.image_vectors import MANIFEST, PARTS
from gmeta.text.encoder import load_model
from gmeta.text.folder import digest_of, require_weights

KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Endings of files that are taken for images; others are passed over."""
PART_IMAGES = 1024
"""Images of a Parquet file: what a stopped run may lose."""
_NAMED = 5
_PREPARATION = "preprocessor_config.json"


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the input of an encoder, as `preprocessor_config.json` says."""

    height: int
    width: int
    shortest: int | None  # the shorter side becomes this, and the middle is cut out; None: resized to height and width
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Return an image as [3, height, width]."""
        image = image.convert("RGB")
        resample = Image.Resampling(self.resample)
        if self.shortest is None:
            image = image.resize((self.width, self.height), resample)
        else:
            by = self.shortest / min(image.size)
            size = (max(self.width, round(image.width * by)), max(self.height, round(image.height * by)))
            left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
            image = image.resize(size, resample).crop((left, top, left + self.width, top + self.height))
        pixels = np.asarray(image, np.float32) * self.scale
        normed = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normed.transpose(2, 0, 1), np.float32)


class ImageEncoder:
    """A vision model of `transformers` (ViT, CLIP, SigLIP, DINOv2 and others that read `pixel_values`)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Open a folder. ValueError where it holds no such model, or would run code."""
        require_weights(folder)
        self.model, missing = load_model(folder, torch.float32)
        self.model.to(device)
        self.device = device
        self.prepare = _preparation(folder)
        self.digest = digest_of(folder, ("config.json", _PREPARATION))
        self._pools = not any("pooler." in key for key in missing)
        try:
            self.dim = int(self(np.zeros((1, 3, self.prepare.height, self.prepare.width), np.float32)).shape[1])
        except Exception as error:  # a model of texts, or of another size: transformers raises of all classes
            raise ValueError(f"encoder {folder} does not read images ({error}): name a vision encoder") from error

    @torch.no_grad()
    def __call__(self, pixels: npt.NDArray[np.float32]) -> Tensor:
        """Return the vectors [n, dim] of prepared images [n, 3, height, width]: those that a model of images and texts
        compares, else the pooled ones, else the states of the first token.
        """
        given = torch.from_numpy(pixels).to(self.device)
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=given)
            vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
            return vectors
        found = self.model(pixel_values=given)
        pooled = getattr(found, "pooler_output", None)
        vectors = pooled if pooled is not None and self._pools else found.last_hidden_state[:, 0]
        return vectors


def _preparation(folder: Path) -> Preparation:
    """Read how images are prepared. ValueError where the folder does not say."""
    path = folder / _PREPARATION
    if not path.is_file():
        raise ValueError(f"encoder {folder} has no {_PREPARATION}: save the image processor of the encoder there")
    told = read_mapping(path, "restore the file")
    size, crop = told.get("size", 224), told.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size if told.get("do_center_crop") else None
    target = crop if told.get("do_center_crop", False) and crop is not None else size
    if isinstance(target, dict) and "height" in target:
        height, width = int(target["height"]), int(target["width"])
    else:
        height = width = int(target["shortest_edge"] if isinstance(target, dict) else target)
    normed = told.get("do_normalize", True)
    return Preparation(
        height,
        width,
        None if shortest is None else int(shortest),
        int(told.get("resample", Image.Resampling.BICUBIC)),
        float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0,
        tuple(told.get("image_mean", (0.5, 0.5, 0.5))) if normed else (0.0, 0.0, 0.0),
        tuple(told.get("image_std", (0.5, 0.5, 0.5))) if normed else (1.0, 1.0, 1.0),
    )


def embed_images(config: EmbedImagesConfig) -> int:
    """Run `gmeta embed-images`."""
    where = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    encoder = ImageEncoder(Path(config.encoder), torch.device(where))
    out = Path(config.out)
    known = _go_on(out, encoder)
    number, damaged, read = len(list(out.glob(PARTS))), [], 0
    images = (found for found in images_of(Path(config.images)) if found[0] not in known)
    with _progress() as progress:
        task = progress.add_task("images", total=None)
        while block := list(islice(images, PART_IMAGES)):
            items, vectors, bad = _vectors(encoder, block, config.batch)
            damaged += bad
            read += len(block)
            if items:
                _write_part(out / f"part-{number:05d}.parquet", items, vectors)
                number += 1
                known.update(items)
            progress.update(task, description=f"{len(known):,} images")
    write_text(out / MANIFEST, json.dumps(_told(encoder) | {"images": len(known), "damaged": damaged}, indent=1) + "\n")
    if not known:
        raise ValueError(f"{config.images} has no image that can be read ({', '.join(KINDS)}): name another")
    print(f"{out}: {len(known):,} images, {read:,} of them read now, vectors of {encoder.dim} numbers")
    if damaged:
        named = ", ".join(damaged[:_NAMED]) + (", …" if len(damaged) > _NAMED else "")
        print(f"left out: {len(damaged):,} images that cannot be read: {named}")
    return 0


def images_of(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the item and the content of each image of a folder or a tar archive, each item once, in order of the files.

    ValueError for what is neither, and for an archive that is damaged.
    """
    seen: set[str] = set()
    files = _files_of(source) if source.is_dir() else _entries_of(source)
    for name, data in files:
        path = Path(name)
        if path.suffix.lower() in KINDS and not path.name.startswith(".") and path.stem not in seen:
            seen.add(path.stem)
            yield path.stem, data


def _files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix.lower() in KINDS:
            yield path.name, path.read_bytes()


def _entries_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    if not archive.is_file():
        raise ValueError(f"images is {archive}, which does not exist: name a folder of images, or a tar archive")
    number = 0
    try:
        with tarfile.open(archive, mode="r|*") as entries:
            for entry in entries:
                content = entries.extractfile(entry) if entry.isfile() else None
                if content is not None:
                    number += 1
                    yield entry.name, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{archive} is damaged behind its file {number:,} ({error}): fetch it again; the images before it are kept"
        ) from None


def _vectors(
    encoder: ImageEncoder, block: list[tuple[str, bytes]], batch: int
) -> tuple[list[str], npt.NDArray[np.float32], list[str]]:
    """Return items, their vectors [n, dim], and the items whose image cannot be read."""
    items, pixels, damaged = [], [], []
    for item, data in block:
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels.append(encoder.prepare(image))
            items.append(item)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            damaged.append(item)
    parts = [encoder(np.stack(pixels[i : i + batch])).float().cpu().numpy() for i in range(0, len(pixels), batch)]
    return items, np.concatenate(parts) if parts else np.zeros((0, encoder.dim), np.float32), damaged


def _write_part(path: Path, items: list[str], vectors: npt.NDArray[np.float32]) -> None:
    columns = {"item": pa.array(items), "vector": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])}
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file)


def _told(encoder: ImageEncoder) -> dict[str, Any]:
    return {"encoder": encoder.digest, "dim": encoder.dim}


def _go_on(out: Path, encoder: ImageEncoder) -> set[str]:
    """Return the items whose vectors the folder has. ValueError where another encoder made them."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"out is {out}, which has other files: name an empty folder, or one to be made")
        out.mkdir(parents=True, exist_ok=True)
        write_text(manifest, json.dumps(_told(encoder), indent=1) + "\n")
        return set()
    told = read_mapping(manifest, "remove the folder")
    if told.get("encoder") != encoder.digest:
        raise ValueError(f"out is {out}, whose vectors another encoder made: name another folder, or remove it")
    parts = sorted(out.glob(PARTS))
    return {item for part in parts for item in pq.read_table(part, columns=["item"])["item"].to_pylist()}


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
