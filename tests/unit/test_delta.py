"""`gmeta delta`: a delta and its base make the full version, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import fails, gmeta
from safetensors.torch import load_file
from versions import Growing, content

from gmeta.runs import bundle as bundles
from gmeta.runs.bundle import open_bundle
from gmeta.runs.delta import apply_delta, delta_bytes, make_delta, read_delta

DAYS = 10


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles 0 … 10 of a table that grows and forgets, in parts of a few rows whose borders move."""
    place, model = tmp_path_factory.mktemp("days"), Growing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "PART_BYTES", 800)
        for day in range(DAYS + 1):
            if day:
                model.next_day()
            model.write(place / str(day))
    assert len(list((place / "10" / "tables").glob("item-*"))) > 1
    assert pq.read_table(place / "10" / "vocab" / "item.parquet")["value"].null_count > DAYS
    return place


def test_ten_days_of_growth_and_eviction_are_the_full_versions_bit_for_bit(days: Path, tmp_path: Path) -> None:
    held = days / "0"
    for day in range(1, DAYS + 1):
        delta, made = tmp_path / f"delta{day}", tmp_path / f"made{day}"
        make_delta(days / str(day - 1), days / str(day), delta)
        apply_delta(held, delta, made)
        assert content(made) == content(days / str(day)), day
        held = made
    open_bundle(held, training=True)


def test_a_delta_may_skip_days_and_leave_training_out(days: Path, tmp_path: Path) -> None:
    gmeta("delta", "--base", days / "2", "--to", days / "9", "--out", tmp_path / "delta", "--training", "false")
    gmeta("delta", "--base", days / "2", "--apply", tmp_path / "delta", "--out", tmp_path / "made")
    full = {name: data for name, data in content(days / "9").items() if not name.startswith("training/")}
    made = content(tmp_path / "made")
    assert made.pop("manifest.json") != full.pop("manifest.json")
    assert made == full
    assert not open_bundle(tmp_path / "made").manifest["training"]
    # ... and what was made without it is a base as good as the whole
    make_delta(days / "9", days / "10", tmp_path / "next")
    apply_delta(days / "9", tmp_path / "next", tmp_path / "of-whole", training=False)
    apply_delta(tmp_path / "made", tmp_path / "next", tmp_path / "of-made", training=False)
    assert content(tmp_path / "of-whole") == content(tmp_path / "of-made")


def test_it_holds_what_changed_and_no_more(days: Path, tmp_path: Path) -> None:
    document = make_delta(days / "3", days / "4", tmp_path / "delta")
    assert document["tables"]["item"]["changed"] <= 5 + 4 + 2
    assert document["tables"]["group"] == {"changed": 5, "ids": 8}
    assert document["how"]["schema.json"] == "whole"
    assert document["how"]["config.yaml"] == "same"
    assert document["how"]["vocab/tags.parquet"] in ("values", "whole")
    rows = [load_file(file) for file in (tmp_path / "delta" / "rows" / "tables").glob("item-*")]
    assert sum(len(part["ids"]) for part in rows) == document["tables"]["item"]["changed"]


def test_a_vocabulary_is_sent_as_what_is_new_in_it(tmp_path: Path) -> None:
    model = Growing(items=5000)
    before = model.write(tmp_path / "0")
    model.next_day()
    after = model.write(tmp_path / "1")
    document = make_delta(before, after, tmp_path / "delta")
    assert document["how"]["vocab/item.parquet"] == "values"
    assert delta_bytes(document) < 0.2 * sum(file.stat().st_size for file in after.rglob("*") if file.is_file())
    apply_delta(before, tmp_path / "delta", tmp_path / "made")
    assert content(tmp_path / "made") == content(after)


def test_rows_go_by_the_raw_value_where_ids_have_other_numbers(tmp_path: Path) -> None:
    model = Growing()
    before = model.write(tmp_path / "0")
    model.next_day(changed=0, arrive=0, leave=0)
    for values in (model.values["item"], model.counts["item"], model.last_days["item"]):
        values[:] = values[::-1]
    for name, rows in model.rows["item"].items():
        model.rows["item"][name] = rows.new_tensor(rows.numpy()[[0, *range(len(rows) - 1, 0, -1)]])
    after = model.write(tmp_path / "1")
    document = make_delta(before, after, tmp_path / "delta")
    assert document["tables"]["item"] == {"changed": 0, "ids": 61}
    apply_delta(before, tmp_path / "delta", tmp_path / "made")
    assert content(tmp_path / "made") == content(after)


def test_another_width_or_table_is_sent_whole(days: Path, tmp_path: Path) -> None:
    model = Growing(seed=1)
    for name, rows in model.rows["item"].items():
        model.rows["item"][name] = rows.double()
    model.rows["new"] = model.rows["group"]
    other = model.write(tmp_path / "other")
    assert make_delta(days / "1", other, tmp_path / "delta")["how"]["tables/new-00000.safetensors"] == "whole"
    apply_delta(days / "1", tmp_path / "delta", tmp_path / "made")
    assert content(tmp_path / "made") == content(other)


def test_mistakes(days: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta = tmp_path / "delta"
    make_delta(days / "1", days / "2", delta)
    words = ["delta", "--base", days / "2", "--out", tmp_path / "out"]
    fails([*words, "--apply", delta], capsys, "goes on from version run1/1", "is version run2/2")
    fails([*words, "--apply", days / "1"], capsys, "is no delta")
    fails([*words, "--to", delta], capsys, "is no bundle")
    fails(words, capsys, "give either --to BUNDLE or --apply DELTA")
    fails(["delta", "--base", days / "1", "--to", days / "2", "--out", delta], capsys, "exists")
    document = json.loads((delta / "delta.json").read_text())
    (delta / "delta.json").write_text(json.dumps({**document, "how": {}}))
    with pytest.raises(ValueError, match=r"delta.json is damaged"):
        read_delta(delta)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("where", ["base", "delta"])
def test_damage_never_gives_a_bundle(days: Path, tmp_path: Path, where: str) -> None:
    shutil.copytree(days / "1", tmp_path / "base")
    make_delta(days / "1", days / "2", tmp_path / "delta")
    names = {"base": "tables/item-00000.safetensors", "delta": "files/dense.safetensors"}
    file = tmp_path / where / names[where]
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"is damaged"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "delta"]
