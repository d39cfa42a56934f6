"""The clone of AntM2C: its files, its statistics, and the bounds that its truth gives."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta
from PIL import Image

from gmeta.config.data import SynthConfig
from gmeta.data.antm2c import published
from gmeta.data.clone.bounds import REFERENCES, laplace, scores_of_block
from gmeta.data.clone.rows import bounds_of_splits, draw_block, shifts
from gmeta.data.clone.words import TOPICS
from gmeta.data.clone.world import DIM, ITEM_STD, SCENE_TASTE_STD, TASTE_STD, USER_STD, draw_world
from gmeta.data.clone.write import write_clone

ROWS = 20_000


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clone") / "antm2c"
    gmeta("synth", "--kind", "antm2c", "--rows", ROWS, "--out", out)
    return out


def log(clone: Path) -> pa.Table:
    kept = pv.ConvertOptions(column_types=dict.fromkeys(["log_time", "item_title"], pa.string()))
    parts = sorted(clone.glob("antm2c_10m_part*.csv"))
    return pa.concat_tables([pv.read_csv(part, convert_options=kept) for part in parts], promote_options="permissive")


def test_files_have_the_published_columns(clone: Path) -> None:
    names = {path.name for path in clone.iterdir()}
    parts = {f"antm2c_10m_part{number}.csv" for number in range(3)}
    assert names == {*parts, "AntM2C_image.tar.gz", "_truth", "summary.json"}
    header = (clone / "antm2c_10m_part0.csv").read_text().splitlines()[0]
    assert header.replace('"', "").split(",") == list(published.COLUMNS)


def test_statistics_are_near_the_published_ones(clone: Path) -> None:
    rows, summary = log(clone), json.loads((clone / "summary.json").read_text())
    assert rows.num_rows == pytest.approx(ROWS, rel=0.15)
    split = np.searchsorted(["2023-08-03 00:00:00", "2023-08-05 00:00:00"], rows["log_time"].to_numpy())
    label = rows["label"].to_numpy()
    for number, name in enumerate(published.SPLITS):
        at = split == number
        assert at.sum() == sum(summary["rows"][name])
        assert label[at].sum() == summary["positives"][name]
        assert at.mean() == pytest.approx(published.ROWS[number] / sum(published.ROWS), abs=0.02)
        assert label[at].mean() == pytest.approx(published.POSITIVES[number] / published.ROWS[number], abs=0.05)
        assert pc.count_distinct(rows["item_id"].filter(pa.array(at))).as_py() == summary["items"][name]


def test_an_item_has_one_title_and_several_names(clone: Path) -> None:
    rows = log(clone)
    titles = rows.group_by("item_id").aggregate([("item_title", "count_distinct"), ("item_entity_names", "distinct")])
    assert pc.max(titles["item_title_count_distinct"]).as_py() == 1
    versions = [len(names) for names in titles["item_entity_names_distinct"].to_pylist()]
    assert 0 < np.mean(np.array(versions) > 1) < 0.2
    topic = pq.read_table(clone / "_truth" / "items.parquet")["topic"].to_pylist()
    for item, names in zip(
        titles["item_id"].to_pylist(), titles["item_entity_names_distinct"].to_pylist(), strict=True
    ):
        assert all(set(name.split(",")) <= set(TOPICS[topic[item]]) for name in names)


def test_images_are_of_items_and_tell_their_look(clone: Path) -> None:
    items = pq.read_table(clone / "_truth" / "items.parquet").to_pandas()
    with tarfile.open(clone / published.IMAGES) as archive:
        found = {
            int(Path(entry.name).stem): np.asarray(Image.open(io.BytesIO(archive.extractfile(entry).read())), float)  # type: ignore[union-attr]
            for entry in archive
        }
    assert set(found) == set(items.item_id[items.has_image])
    assert {image.shape for image in found.values()} == {(32, 32, 3)}
    of_look = items[items.has_image].groupby("look").item_id.apply(list)
    same = [np.abs(found[a[0]] - found[a[1]]).mean() for a in of_look if len(a) > 1]
    other = [np.abs(found[a[0]] - found[b[0]]).mean() for a, b in pairwise(of_look)]
    assert max(same) < min(other)


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clone(SynthConfig(out=str(tmp_path / name), kind="antm2c", rows=2000))
    for path in sorted((tmp_path / "a").rglob("*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), path.name
    write_clone(SynthConfig(out=str(tmp_path / "c"), kind="antm2c", rows=2000, seed=1))
    part = "antm2c_10m_part0.csv"
    assert (tmp_path / "a" / part).read_bytes() != (tmp_path / "c" / part).read_bytes()


def test_topics_have_as_many_words_each() -> None:
    assert {len(words) for words in TOPICS} == {len(TOPICS[0])}


def test_the_truth_is_what_its_constants_say() -> None:
    """Scene-specific taste is at least a fifth of the logit's variance, and items' vectors are of norm 1."""
    world = draw_world(500_000, 0)
    assert (world.items.latent**2).sum(1).mean() == pytest.approx(1, abs=0.1)
    users, rows = draw_block(world, 0, 0)
    latent = world.items.latent[rows.item]
    scene = world.items.scene[rows.item]
    parts = [
        ((users.taste[rows.user] * latent).sum(1).std(), TASTE_STD),
        ((users.of_scene[rows.user, scene] * latent).sum(1).std(), SCENE_TASTE_STD),
        (users.leaning.std(), USER_STD),
        (world.items.effect.std(), ITEM_STD),
    ]
    for found, expected in parts:
        assert found == pytest.approx(expected, rel=0.1)
    assert parts[1][0] ** 2 / rows.logit.var() > 0.2


def test_splits_are_parted_at_the_published_seconds() -> None:
    (_, train), (valid, last), (test, _) = bounds_of_splits()
    assert np.datetime64(int(train), "s") == np.datetime64("2023-08-03T00:00:00")
    assert (valid, test) == (train + 1, last + 1)
    assert np.datetime64(int(last), "s") == np.datetime64("2023-08-05T00:00:00")


def test_who_knows_more_sorts_better(clone: Path) -> None:
    found = json.loads((clone / "summary.json").read_text())["reference"]
    assert list(found) == list(REFERENCES)
    auc = {name: of["auc_macro"] for name, of in found.items()}
    assert auc["prior"] == 0.5
    assert auc["ids"] < auc["ids+text"] < auc["posterior"] < auc["oracle"]
    assert auc["ids"] < auc["ids+image"] < auc["posterior"]
    assert 0.8 < auc["oracle"] < 0.9
    assert auc["posterior"] - auc["ids"] > 0.03


def test_references_are_calibrated() -> None:
    """Each is a probability given what it knows: of rows that it gives p, p are clicked."""
    world = draw_world(500_000, 0)
    shift = shifts(world, 0)
    drawn = [draw_block(world, 0, block, shift=shift) for block in range(2)]
    scored = [scores_of_block(world, shift, *block) for block in drawn]
    label = np.concatenate([rows.label[judged] for (_, rows), (judged, _) in zip(drawn, scored, strict=True)])
    for name in ("ids", "ids+image", "ids+text", "posterior", "oracle"):
        score = np.concatenate([scores[name] for _, scores in scored])
        for low, high in pairwise([0, 0.2, 0.4, 0.6, 0.8, 1.0]):
            at = (score > low) & (score <= high)
            assert label[at].mean() == pytest.approx(score[at].mean(), abs=0.03), (name, low)


def test_the_mode_is_that_of_the_posterior() -> None:
    """Of one number the posterior's mode, and its width, are those of a fine grid."""
    rng = np.random.default_rng(0)
    offset, design = rng.standard_normal(60), rng.standard_normal((60, 1))
    label = rng.integers(2, size=60)
    mode, covariance = laplace(offset, design, label)
    grid = np.linspace(-4, 4, 40_001)
    logit = offset + grid[:, None] * design.T
    density = -np.logaddexp(0, -(2 * label - 1) * logit).sum(1) - 0.5 * grid**2
    weight = np.exp(density - density.max())
    mean = (weight * grid).sum() / weight.sum()
    assert mode[0] == pytest.approx(grid[density.argmax()], abs=2e-4)
    assert covariance[0, 0] == pytest.approx((weight * (grid - mean) ** 2).sum() / weight.sum(), rel=0.05)


def test_a_mode_is_found_from_far_away() -> None:
    label = np.ones(500, np.int64)
    design = np.ones((500, DIM)) * 3
    mode, _ = laplace(np.full(500, -40.0), design, label)
    gradient = design.T @ (label - 1 / (1 + np.exp(40.0 - design @ mode))) - mode
    assert np.abs(gradient).max() < 1e-4


def test_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synth", "--out", tmp_path / "no"]
    fails([*words, "--rows", 5000], capsys, "rows is 5000", "--kind antm2c")
    words += ["--kind", "antm2c"]
    fails([*words, "--users", 7], capsys, "users is 7", "out, rows and seed")
    fails([*words, "--days", 3], capsys, "days is 3", "out, rows and seed")
    fails([*words, "--rows", 10], capsys, "rows is 10", "at least 1000")
    fails(["synth", "--kind", "antm2c", "--out", tmp_path], capsys, "exists")
