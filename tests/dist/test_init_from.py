"""`gmeta train --init_from`: parts of another model; and `--embedding.pretrained`: first rows from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import fails, gmeta
from days import NEW, STILL, Prepare, by_value, preparing, tensors, train

from gmeta.training import pretrained
from gmeta.training.init_from import ModelPart, _named

ANOTHER = (*NEW, "--model.args.hidden", "[8, 4]", "--embedding.optimizer", "rowwise_adagrad", "--seed", 7)
MAP = "{tables.product: tables.item, tables.city: tables.city, model.layers.0: model.layers.0}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    return preparing(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def base(prepared: Prepare) -> Path:
    """A bundle of a model of items 0 to 29."""
    place = prepared("day0").parent
    train(prepared("day0"), place / "run", *NEW, "--schedule.max_steps", 3)
    gmeta("bundle", "--run_dir", place / "run", "--out", place / "version")
    return place / "version"


@pytest.fixture(scope="module")
def shop(prepared: Prepare) -> Path:
    """A pack that calls items 10 to 39 products."""
    return prepared("shop", range(10, 40), range(100, 140), item="product")


@pytest.fixture(scope="module")
def fresh(shop: Path) -> Path:
    """A run that begins with nothing."""
    return train(shop, shop.parent / "fresh", *ANOTHER, *STILL)


@pytest.mark.parametrize("nproc", [1, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_named_parts_are_taken(shop: Path, base: Path, fresh: Path, tmp_path: Path, nproc: int) -> None:
    """Rows go by raw value, new ids begin as the row of unknown ones, and all else as in a run of its own."""
    sharded = ("--dense.sharding", "GGG") if nproc > 1 else ()
    words = ("--init_from", base, "--init_map", MAP, "--nproc", nproc)
    run_dir = train(shop, tmp_path / "run", *ANOTHER, *STILL, *words, *sharded)
    theirs, found, alone = (tensors(source) for source in (base, run_dir, fresh))
    for name, tensor in alone.items():
        if name.startswith("dense."):
            taken = name.startswith("dense.model.layers.0")
            assert torch.equal(found[name], (theirs if taken else alone)[name].view(tensor.shape)), name
    items, products = by_value(base, "item"), by_value(run_dir, "product")
    assert len(items.keys() & products.keys()) > 15
    for value, row in products.items():
        assert torch.equal(row, items.get(value, items[""])), value
    genres, expected = by_value(run_dir, "genre"), by_value(fresh, "genre")
    assert all(torch.equal(row, expected[value]) for value, row in genres.items())


def test_without_a_map_all_that_fits_is_taken(
    shop: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train(shop, tmp_path / "run", *ANOTHER, *STILL, "--init_from", base)
    said = capsys.readouterr().err
    assert "2 tensors of 152 numbers, 2 tables" in said
    assert (
        "begin anew: model.layers.1.weight, model.layers.1.bias, model.output.weight, model.output.bias, tables.product"
        in said
    )
    assert "not taken: model.output.bias, model.output.weight, tables.item" in said
    cities, expected = by_value(run_dir, "city"), by_value(base, "city")
    assert all(torch.equal(row, expected[value]) for value, row in cities.items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--init_map", "{tables.prodct: tables.item}"], "'tables.prodct', which is no part of this model: did you"),
        (["--init_map", "{tables.product: tables.itm}"], "does not have: did you mean 'tables.item'?"),
        (["--init_map", "{model.layers: model.layers}"], "model.layers.1.weight from 'model.layers.1.weight', which"),
        (["--init_map", "{model.output: model.output}"], "its shape is [1, 8], here it is [1, 4]"),
        (
            ["--init_map", "{tables.product: tables.item}", "--model.embedding_dim", "4"],
            "takes tables.product from tables.item of {base}: its shape is [6], here it is [4]",
        ),
        (["--warm_start", "{base}"], "warm_start goes on with a whole model"),
        (["--init_from", "", "--init_map", MAP], "says what to take of init_from"),
        (["--init_from", "nowhere"], "nowhere is no bundle"),
        (["--embedding.start", "factors"], "init_from sets first rows too"),
    ],
)
def test_what_cannot_be_taken_is_named(
    shop: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    words = [word.replace("{base}", str(base)) for word in words]
    given = ["train", "--pack", shop, "--run_dir", tmp_path / "run", *ANOTHER, "--init_from", base, *words]
    fails(given, capsys, told.replace("{base}", str(base)))


def test_hashed_tables_must_be_hashed_alike() -> None:
    values, hashed, other = (
        ModelPart((6,)),
        ModelPart((6,), ("hash seed 0", 100)),
        ModelPart((6,), ("hash seed 1", 100)),
    )
    assert _named({"tables.a": "tables.b"}, {"tables.a": hashed}, {"tables.b": hashed}, Path("x"))
    for part in (values, other):
        with pytest.raises(ValueError, match=r"its ids are numbered by .*, here by hash seed 0 of 100 ids"):
            _named({"tables.a": "tables.b"}, {"tables.a": hashed}, {"tables.b": part}, Path("x"))


def test_of_two_names_for_a_part_the_longer_counts() -> None:
    ours, theirs = (
        {"model.a.x": ModelPart((1,)), "model.a.y": ModelPart((2,))},
        {"model.b.x": ModelPart((1,)), "model.c": ModelPart((2,))},
    )
    found = _named({"model.a": "model.b", "model.a.y": "model.c"}, ours, theirs, Path("x"))
    assert found == {"model.a.x": "model.b.x", "model.a.y": "model.c"}


def vectors(file: Path, values: Any, dim: int = 6, **changes: Any) -> tuple[Path, np.ndarray]:
    """A file of random vectors, in small row groups."""
    numbers = np.random.default_rng(3).normal(size=(len(values), dim)).astype(np.float32)
    columns = {"value": pa.array(values), "vector": pa.array(list(numbers)), **changes}
    pq.write_table(
        pa.table({name: column for name, column in columns.items() if column is not None}), file, row_group_size=5
    )
    return file, numbers


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_begin_with_vectors_of_a_file(
    shop: Path, fresh: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], nproc: int
) -> None:
    values = [f"i{i}" for i in range(20, 60)]
    file, numbers = vectors(tmp_path / "vectors.parquet", values)
    words = ("--embedding.pretrained", f"{{product: {file}}}", "--nproc", nproc)
    run_dir = train(shop, tmp_path / "run", *ANOTHER, *STILL, *words)
    found, expected = by_value(run_dir, "product"), by_value(fresh, "product")
    given = dict(zip(values, torch.from_numpy(numbers).double(), strict=True))
    for value, row in found.items():
        assert torch.equal(row, given.get(value, expected[value])), value
    known = len(found.keys() & given.keys())
    said = f"{known} of {len(found) - 1} ids of product begin with vectors of {file}; {40 - known} of its rows"
    assert said in capfd.readouterr().err


def test_in_a_warm_start_only_new_ids_do(prepared: Prepare, base: Path, tmp_path: Path) -> None:
    pack = prepared("day1", range(10, 40), range(100, 140))
    values = list(range(60))
    file, numbers = vectors(tmp_path / "vectors.parquet", [f"i{i}" for i in values])
    words = ("--embedding.pretrained", f"{{item: {file}}}")
    run_dir = train(pack, tmp_path / "run", "--warm_start", base, *STILL, *words)
    before, after = by_value(base, "item"), by_value(run_dir, "item")
    for value, row in after.items():
        expected = before[value] if value in before else torch.from_numpy(numbers[int(value[1:])]).double()
        assert torch.equal(row, expected), value


IDS = [f"i{i}" for i in range(10, 20)]
HOLED = [[0.0] * 6] * 9 + [[0.0] * 5 + [float("nan")]]


@pytest.mark.parametrize(
    ("values", "dim", "changes", "told"),
    [
        (IDS, 4, {}, "row 0 of {file} has 4 numbers, rows have 6"),
        (IDS, 6, {"vector": None}, "has no column 'vector': give a Parquet file with the columns value (raw id)"),
        (
            IDS,
            6,
            {"vector": pa.array(HOLED)},
            "the vector of 'i19' in {file} has a number that is missing or not finite",
        ),
        (IDS, 6, {"vector": pa.array([[1.0] * 6] * 9 + [None])}, "row 9 of {file} has 0 numbers"),
        (IDS, 6, {"vector": pa.array(IDS)}, "vector of {file} is string"),
        (IDS[:9] + IDS[:1], 6, {}, "{file} has 'i10' twice: keep one of its vectors"),
        (np.arange(10) / 2, 6, {}, "value of {file} is double: write raw ids as text or whole numbers"),
    ],
)
def test_a_bad_file_is_named(
    shop: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    values: Any,
    dim: int,
    changes: dict[str, Any],
    told: str,
) -> None:
    monkeypatch.setattr(pretrained, "_BATCH_ROWS", 4)
    file, _ = vectors(tmp_path / "vectors.parquet", values, dim, **changes)
    words = ["train", "--pack", shop, "--run_dir", tmp_path / "run", *ANOTHER]
    fails([*words, "--embedding.pretrained", f"{{product: {file}}}"], capsys, told.replace("{file}", str(file)))


def test_a_table_or_file_that_is_not_there_is_named(
    shop: Path, prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no Parquet")
    words = ["train", "--pack", shop, "--run_dir", tmp_path / "run", *ANOTHER, "--embedding.pretrained"]
    fails([*words, "{prodct: x}"], capsys, "the model reads no table 'prodct'; did you mean 'product'?")
    fails([*words, "{product: nowhere}"], capsys, "embedding.pretrained.product: nowhere cannot be read")
    fails([*words, f"{{product: {tmp_path / 'text'}}}"], capsys, "cannot be read")
    hashed = prepared("hashed", changes={"categorical": ["item", {"name": "city", "hash_buckets": 50}]})
    words[2] = hashed
    fails([*words, "{city: x}"], capsys, "table 'city' is hashed")
