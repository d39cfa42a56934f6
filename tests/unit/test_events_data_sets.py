"""The named data sets of events, from the real files where there are some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from event_packs import quiet, told_tasks

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.prepare import prepare


def made(folder: Path, dataset: str, root: Path, **settings: object) -> TaskPack:
    config = PrepareConfig(out=str(folder / "pack"), dataset=dataset, root=str(root), **settings)  # type: ignore[arg-type]
    prepare(config, quiet)
    return open_pack(config.out)


@pytest.mark.data
@pytest.mark.slow
def test_one_shop_of_amazon(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    root = real_data("amazon-3domain")
    pack = made(tmp_path, "amazon-3domain", root, domains="Beauty")
    audit = pack.manifest["counts"]["audit"]
    assert (audit["users"], audit["items"], audit["events"]) == (22_363, 12_101, 198_502)
    assert audit["cold_targets"]["test"] == {"Beauty": 138}
    assert pack.catalogue().num_ids == 12_102
    user, *items = (root / "Beauty.user_sequence.txt").read_text().splitlines()[0].split()
    assert told_tasks(pack, "test")[user] == f"{' '.join(items[:-1])} -> {items[-1]}"


@pytest.mark.data
@pytest.mark.slow
def test_three_shops_of_amazon(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    pack = made(tmp_path, "amazon-3domain", real_data("amazon-3domain"))
    audit = pack.manifest["counts"]["audit"]
    assert (audit["users"], audit["items"], audit["events"]) == (72_682, 42_382, 662_436)
    assert audit["cold_targets"]["test"] == {"Beauty": 138, "Sports": 317, "Toys": 279}
    assert audit["users_by_domains"] == {"1": 68_732, "2": 3_209, "3": 741}
    assert all(ascending < 0.2 * sequences for ascending, sequences in audit["sorted_by_item"].values())


@pytest.mark.data
def test_office_has_its_targets_as_given(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    root = real_data("amazon-office")
    pack = made(tmp_path, "amazon-office", root)
    counts = pack.manifest["counts"]
    assert {name: split["tasks"] for name, split in counts["splits"].items()} == {
        "train": 1_795,
        "valid": 4_866,
        "test": 4_866,
    }
    assert counts["audit"]["catalogue"] == 3_459
    assert "histories before a user's first target of split valid alone" in counts["note"]
    rows = pq.read_table(root / "next_item.parquet").to_pylist()
    for split in ("valid", "test"):
        own = [row for row in rows if row["split"] == split]
        given = [f"{' '.join(map(str, row['history_item_id']))} -> {row['item_id']}" for row in own]
        assert sorted(told_tasks(pack, split).values()) == sorted(given)
    trained = told_tasks(pack, "train")
    assert trained["A1228"] == "-> 926", "the history of the user's first target, and no target"


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks Beauty\.user_sequence\.txt.*Toys\.item_text\.txt.*IDGenRec"):
        made(tmp_path, "amazon-3domain", tmp_path)
