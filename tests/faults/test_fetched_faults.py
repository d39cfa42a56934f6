"""A run whose behaviour store lies in an object store: trained, loaded, and told of damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from commands import gmeta
from encoders import WHY, tiny
from test_registry_faults import environment, moto  # noqa: F401
from text_models import in_words, text_pack, text_rows

import gmeta as package
from gmeta.runs.store import open_store

pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("obstore")
pytestmark = [pytest.mark.faults, pytest.mark.slow]

URL = "s3://models/texts"


def test_a_store_in_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto: int) -> None:  # noqa: F811
    for key, value in {**environment(moto), "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(key, value)
    rows = in_words(text_rows())
    pack, encoder = text_pack(tmp_path, **rows), tiny(tmp_path / "bert", "bert")
    (tmp_path / "titles.txt").write_text("\n".join(sorted({*rows["item"]})))
    words = ["--texts", tmp_path / "titles.txt", "--encoder", encoder, "--layers", 2, "--max_tokens", 8]
    gmeta("embed", *words, "--store", tmp_path / "store")
    store = open_store(URL)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    for file in files:
        store.upload(file, file.relative_to(tmp_path / "store").as_posix())

    def train(name: str, where: str) -> Path:
        args = {"encoder": str(encoder), "layers": 2, "hidden": [6], "max_tokens": 8, "store": where}
        config: dict[str, Any] = {"pack": str(pack), "run_dir": str(tmp_path / name), "schedule": {"max_steps": 2}}
        return package.train({**config, "model": {"name": "bahe", "args": args}, "meta": {"adapt": ["head"]}}).path

    here, there = train("here", str(tmp_path / "store")), train("there", URL)
    (home,) = (path for path in (tmp_path / "home" / ".cache" / "gmeta").iterdir() if path.is_dir())
    before = home.stat().st_mtime_ns
    table = pa.table(rows).slice(0, 30)
    found, expected = (package.load(run).adapt(table).predict(table) for run in (there, here))
    np.testing.assert_array_equal(found, expected)
    assert package.load(there).config.model.args["store"] == URL  # it opens on any machine
    assert home.stat().st_mtime_ns == before

    shard = next(file for file in files if file.suffix == ".safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    (tmp_path / "shard").write_bytes(data)
    store.upload(tmp_path / "shard", shard.relative_to(tmp_path / "store").as_posix())
    with pytest.raises(ValueError, match=rf"{URL} is not as it was written.*is damaged"):
        train("damaged", URL)
