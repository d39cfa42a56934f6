"""Vectors of images as `gmeta embed-images` leaves them: Parquet files (item, vector) in a folder, and a manifest."""

from __future__ import annotations

from pathlib import Path

from gmeta.core.files import read_mapping

MANIFEST, PARTS = "images.json", "part-*.parquet"


def image_dim(folder: Path) -> int:
    """Return the width of the vectors in a folder. ValueError where it is none of vectors."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"images is {folder}, which has no {MANIFEST}: make it with gmeta embed-images")
    dim = read_mapping(manifest, "make the folder again").get("dim")
    if type(dim) is not int or dim < 1 or not any(folder.glob(PARTS)):
        raise ValueError(f"images is {folder}, which has no vectors: make it again with gmeta embed-images")
    return dim
