"""Images of the clone: each kind of look is a pattern of its own, and each item's image has noise besides."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from gmeta.data.clone.world import LOOKS, CloneItems

SIDE = 32
"""Width and height of an image, in pixels."""
_GRID = 4
"""A pattern has so many colours along a side."""


def write_images(path: Path, items: CloneItems, seed: int) -> int:
    """Write a tar.gz archive of the images of all items that have one, as images/<item_id>.png; return how many."""
    rng = np.random.default_rng([seed, 3])
    patterns = rng.integers(30, 226, (LOOKS, _GRID, _GRID, 3))
    big = patterns.repeat(SIDE // _GRID, 1).repeat(SIDE // _GRID, 2)
    found = np.flatnonzero(items.has_image)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed,  # no time, no name
        tarfile.open(mode="w", fileobj=packed) as archive,
    ):
        for item in found.tolist():
            noise = rng.integers(-20, 21, (_GRID, _GRID, 3)).repeat(SIDE // _GRID, 0).repeat(SIDE // _GRID, 1)
            pixels = (big[items.look[item]] + noise).astype(np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            entry = tarfile.TarInfo(f"images/{item}.png")
            entry.size = data.tell()
            data.seek(0)
            archive.addfile(entry, data)
    return len(found)
