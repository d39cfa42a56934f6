"""`vocabulary: all`: values of valid and test rows get ids too, with a count of no training row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from event_packs import quiet

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.prepare import prepare

ROWS = ["u,a,Rome,1|2,train", "u,b,Rome,1,train", "v,a,Oslo,2,valid", "v,c,Oslo,3,valid", "w,d,Rome,4,test"]


def made(folder: Path, **more: str) -> TaskPack:
    """A pack of ROWS, whose features `more` has keys of."""
    tags = {"name": "tags", "separator": "|", **more}
    features = {"categorical": [{"name": "item", **more}, "city"], "multi": [tags]}
    roles = {"task": "user", "label": "click", "item": "item", "partition": "part"}
    (folder / "log.csv").write_text("user,item,city,tags,part,click\n" + "".join(f"{row},1\n" for row in ROWS))
    (folder / "schema.yaml").write_text(yaml.safe_dump({**roles, **features}))
    config = PrepareConfig(
        out=str(folder / "pack"),
        input=[str(folder / "log.csv")],
        schema=str(folder / "schema.yaml"),
        threads=1,
        query_size=1,
    )
    prepare(config, quiet)
    return open_pack(config.out)


def test_every_value_has_an_id(tmp_path: Path) -> None:
    pack = made(tmp_path, vocabulary="all")
    found = {table: pq.read_table(pack.vocab_file(table)).to_pydict() for table in ("item", "city", "tags")}
    assert found["item"] == {"value": ["a", "b", "c", "d"], "id": [1, 2, 3, 4], "count": [1, 1, 0, 0]}
    assert found["tags"] == {"value": ["1", "2", "3", "4"], "id": [1, 2, 3, 4], "count": [2, 1, 0, 0]}
    assert found["city"]["value"] == ["Rome"], "what does not say so has values of training rows"
    assert pack.schema.feature("item").num_ids == 5


def test_an_item_of_no_training_row_is_cold_all_the_same(tmp_path: Path) -> None:
    pack = made(tmp_path, vocabulary="all")
    for split, cold in (("train", [False, False]), ("valid", [False, True]), ("test", [True])):
        np.testing.assert_array_equal(pack.split(split).columns(()).item_cold, cold)
    assert pack.manifest["counts"]["cold_items"] == 2


def test_a_schema_that_does_not_say_it_has_the_bytes_of_before(tmp_path: Path) -> None:
    stored = made(tmp_path).manifest
    assert "vocabulary" not in yaml.safe_dump(stored["data_schema"])
    assert not {"next_item", "catalogue"} & stored["schema"].keys()


@pytest.mark.parametrize("value", ["train", None])
def test_train_is_the_default(tmp_path: Path, value: str | None) -> None:
    pack = made(tmp_path, **({} if value is None else {"vocabulary": value}))
    assert pq.read_table(pack.vocab_file("item"))["value"].to_pylist() == ["a", "b"]
