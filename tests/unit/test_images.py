"""Images become vectors, once each, and a pack keeps them by item."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta
from encoders import WHY, change_json, tiny
from PIL import Image

from gmeta.data.pack import open_pack
from gmeta.text.images import Preparation, images_of

transformers = pytest.importorskip("transformers", reason=WHY)
SIDE = 32


def vision(folder: Path, kind: str = "vit", seed: int = 0, **processor: Any) -> Path:
    """A vision encoder of random weights, 16 wide."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(seed)
    if kind == "clip":
        towers = {"vision_config": {**sizes, "image_size": SIDE, "patch_size": 8}, "text_config": sizes}
        model = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=12))
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=SIDE, patch_size=8))
    model.save_pretrained(folder)
    told = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**told, **processor}))
    return folder


def pictures(number: int, side: int = SIDE) -> dict[str, bytes]:
    found = {}
    for item in range(number):
        data = io.BytesIO()
        pixels = np.random.default_rng(item).integers(0, 256, (side, side + 4, 3), np.uint8)
        Image.fromarray(pixels).save(data, "PNG")
        found[f"i{item}"] = data.getvalue()
    return found


def write_folder(folder: Path, images: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for item, data in images.items():
        (folder / f"{item}.png").write_bytes(data)
    return folder


def write_archive(path: Path, images: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for item, data in images.items():
            entry = tarfile.TarInfo(f"AntM2C_image/{item}.png")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def vectors(folder: Path) -> dict[str, list[float]]:
    rows = [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    return {row["item"]: row["vector"] for row in rows}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision(tmp_path_factory.mktemp("encoder") / "vit")


def test_vectors_are_those_of_the_model(encoder: Path, tmp_path: Path) -> None:
    images = pictures(5)
    for source in (write_folder(tmp_path / "folder", images), write_archive(tmp_path / "a.tar.gz", images)):
        out = tmp_path / f"{source.name}.vectors"
        gmeta("embed-images", "--images", source, "--encoder", encoder, "--out", out, "--batch", 2)
        found = vectors(out)
        assert set(found) == set(images)
        model = transformers.ViTModel.from_pretrained(encoder).eval()
        for item, data in images.items():
            pixels = np.asarray(Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
            normed = (pixels / 255 - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
            with torch.no_grad():
                expected = model(torch.from_numpy(normed.transpose(2, 0, 1).copy())[None].float()).pooler_output[0]
            np.testing.assert_allclose(found[item], expected, atol=1e-5)


def test_a_model_of_images_and_texts_gives_what_it_compares(tmp_path: Path) -> None:
    encoder = vision(tmp_path / "clip", "clip")
    source = write_folder(tmp_path / "images", pictures(2))
    gmeta("embed-images", "--images", source, "--encoder", encoder, "--out", tmp_path / "out")
    assert {len(vector) for vector in vectors(tmp_path / "out").values()} == {12}


def test_the_middle_is_cut_out_where_the_encoder_says_so() -> None:
    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    prepared = Preparation(50, 50, 50, Image.Resampling.NEAREST, 1.0, (0.0,) * 3, (1.0,) * 3)(wide)
    assert prepared.shape == (3, 50, 50)
    assert (prepared[0, 0, 0], prepared[0, 0, -1]) == (51, 149)  # of 200 columns the middle 100


def test_a_damaged_image_is_left_out_and_named(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    images = pictures(4)
    images["i1"], images["i2"] = images["i1"][:60], b"no image"
    source = write_folder(tmp_path / "images", images)
    (source / "notes.txt").write_text("passed over")
    gmeta("embed-images", "--images", source, "--encoder", encoder, "--out", tmp_path / "out")
    assert set(vectors(tmp_path / "out")) == {"i0", "i3"}
    assert "left out: 2 images that cannot be read: i1, i2" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "images.json").read_text())["damaged"] == ["i1", "i2"]


def test_a_run_that_was_stopped_goes_on(encoder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("gmeta.text.images.PART_IMAGES", 3)
    archive = write_archive(tmp_path / "a.tar.gz", pictures(8))
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) - 3000])
    words = ["embed-images", "--images", archive, "--encoder", encoder, "--out", tmp_path / "out"]
    fails(words, capsys, "is damaged behind its file", "fetch it again; the images before it are kept")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.parquet")}
    assert kept
    archive.write_bytes(whole)
    gmeta(*words)
    assert len(vectors(tmp_path / "out")) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    gmeta(*words)
    assert "8 images, 0 of them read now" in capsys.readouterr().out


def test_folders_that_are_none_of_vision_encoders(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_folder(tmp_path / "images", pictures(1))
    words = ["embed-images", "--images", source, "--out", tmp_path / "out", "--encoder"]
    fails([*words, tmp_path / "none"], capsys, "is no folder")
    text = tiny(tmp_path / "bert", "bert")
    fails([*words, text], capsys, "has no preprocessor_config.json")
    (text / "preprocessor_config.json").write_text("{}")
    fails([*words, text], capsys, "does not read images", "name a vision encoder")
    change_json(encoder / "preprocessor_config.json", auto_map={"AutoProcessor": "code.py"})
    fails([*words, encoder], capsys, "wants to run code of its own")
    change_json(encoder / "preprocessor_config.json", auto_map=None)
    told = json.loads((encoder / "preprocessor_config.json").read_text())
    del told["auto_map"]
    (encoder / "preprocessor_config.json").write_text(json.dumps(told))
    fails(
        ["embed-images", "--images", tmp_path / "no.tar", "--encoder", encoder, "--out", tmp_path / "o"],
        capsys,
        "no.tar",
    )
    (tmp_path / "empty").mkdir()
    words = ["embed-images", "--encoder", encoder, "--images"]
    fails([*words, tmp_path / "empty", "--out", tmp_path / "e"], capsys, "has no image that can be read")
    gmeta(*words, source, "--out", tmp_path / "out")
    other = vision(tmp_path / "other", seed=1)
    fails(
        ["embed-images", "--images", source, "--encoder", other, "--out", tmp_path / "out"],
        capsys,
        "another encoder made",
    )
    fails([*words, source, "--out", source], capsys, "has other files")


def test_an_item_counts_once(tmp_path: Path) -> None:
    images = pictures(2)
    source = write_folder(tmp_path / "images", images)
    (source / "more").mkdir()
    (source / "more" / "i0.jpg").write_bytes(images["i1"])
    (source / ".i9.png").write_bytes(images["i1"])
    assert [item for item, _ in images_of(source)] == ["i0", "i1"]


def test_a_log_is_prepared_with_its_images(encoder: Path, tmp_path: Path, capsys: Any) -> None:
    """Vectors lie once for each item, those that train has not among them; a model reads them."""
    gmeta("synth", "--kind", "antm2c", "--rows", 3000, "--out", tmp_path / "clone")
    archive = tmp_path / "clone" / "AntM2C_image.tar.gz"
    gmeta("embed-images", "--images", archive, "--encoder", encoder, "--out", tmp_path / "images")
    words = ["prepare", "--dataset", "antm2c", "--root", tmp_path / "clone", "--out", tmp_path / "pack"]
    fails([*words, "--images", tmp_path / "clone"], capsys, "has no images.json", "gmeta embed-images")
    gmeta(*words, "--images", tmp_path / "images")
    told = " ".join(capsys.readouterr().out.split())
    pack = open_pack(tmp_path / "pack")
    names = ["", *pq.read_table(pack.vocab_file("item_id"))["value"].to_pylist()]
    stored = np.load(tmp_path / "pack" / "vocab" / "image.npy")
    expected = vectors(tmp_path / "images")
    assert stored.shape == (len(names), 16)
    assert f"items with an image: {sum(name in expected for name in names)} of {len(names) - 1}" in told
    for name, vector in zip(names, stored, strict=True):
        np.testing.assert_allclose(vector, expected.get(name, [0] * 16), atol=2e-3)
    counts = pq.read_table(pack.vocab_file("item_id"))["count"].to_numpy()
    cold = [name for name, count in zip(names[1:], counts, strict=True) if count == 0]
    assert any(np.abs(stored[names.index(name)]).sum() > 0 for name in cold)
    run = ["--pack", tmp_path / "pack", "--run_dir", tmp_path / "run", "--model.name", "mmoe", "--meta.adapt", "[]"]
    gmeta("train", *run, "--schedule.max_steps", 2, "--loader.tasks_per_batch", 4)
    others = pa.table(
        {"item": ["x"], "vector": pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 16, pa.float32()), 16)}
    )
    (tmp_path / "images" / "part-00000.parquet").unlink()
    pq.write_table(others, tmp_path / "images" / "part-00000.parquet")
    words = [*words[:-1], tmp_path / "again"]
    fails([*words, "--images", tmp_path / "images"], capsys, "no item of the log has an image", "'x'")
