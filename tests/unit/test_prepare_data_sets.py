"""The named data sets: from small files of the public layout, and from the real ones where there are some."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gmeta.config.data import PrepareConfig
from gmeta.data.pack import TaskPack, open_pack
from gmeta.data.prepare.prepare import prepare

USERS, FILMS = 20, 40


def quiet(*_: object) -> None:
    """A report that says nothing."""


@pytest.fixture
def ml_1m(tmp_path: Path) -> Path:
    """The public ML-1M layout with MeLU's film facts: 20 users rate 40 films of 1990 to 2000."""
    root = tmp_path / "ml-1m"
    root.mkdir()
    year = {m: 1990 + m % 11 for m in range(FILMS)}
    ratings = [f"{u}::{m}::{1 + (u + m) % 5}::{1000 * u + m}" for u in range(USERS) for m in range(FILMS)]
    ratings.append(f"0::{FILMS}::5::7")  # a film without facts
    users = [f"{u}::{'FM'[u % 2]}::25::{u % 21}::9810{u % 3}-2117" for u in range(USERS)]
    films = [f"{m}::Café {m} ({year.get(m, 1999)})::Comedy|Drama" for m in range(FILMS + 1)]
    facts = [f"{m}::Café::{year[m]}::PG::N/A::Comedy, Short::N/A::w::Ann Lee, Bo Li::plot::url" for m in range(FILMS)]
    for name, lines in (("ratings", ratings), ("users", users), ("movies", films), ("movies_extrainfos", facts)):
        # The original is Latin-1.
        (root / f"{name}.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return root


def made(tmp_path: Path, dataset: str, root: Path, **settings: object) -> tuple[TaskPack, dict[str, object]]:
    values: dict[str, object] = {"threads": 1, "memory_limit": "400MB", **settings}
    config = PrepareConfig(out=str(tmp_path / "pack"), dataset=dataset, root=str(root), **values)  # type: ignore[arg-type]
    return open_pack((prepare(config, quiet))["out"]), open_pack(config.out).manifest["counts"]


def vocabulary(pack: TaskPack, table: str) -> dict[str, int]:
    found = pq.read_table(pack.vocab_file(table)).to_pydict()
    return dict(zip(found["value"], found["count"], strict=True))


def test_ml_1m(tmp_path: Path, ml_1m: Path):
    pack, counts = made(tmp_path, "ml-1m", ml_1m, label_threshold=4.0)
    assert counts["rows_read"] == USERS * FILMS + 1
    assert counts["bad_rows"] == counts["dropped_tasks"] == {}
    assert pack.schema.binary_label
    assert set(vocabulary(pack, "release_year")) == {str(y) for y in range(1990, 2001)}
    assert set(vocabulary(pack, "genre")) == {"Comedy", "Drama"}
    assert set(vocabulary(pack, "zip")) == {"981"}
    assert {name: s["tasks"] for name, s in counts["splits"].items()} == {"train": 14, "valid": 2, "test": 4}


def test_ml_1m_melu_from_the_public_files(tmp_path: Path, ml_1m: Path):
    films = sum(1990 + m % 11 >= 1998 for m in range(FILMS))
    names = {"warm": "train", "item_cold": "valid", "user_cold": "test", "user_item_cold": "test"}
    settings = {"partitions": names, "valid_fraction": 0.0, "min_task_rows": 2, "query_size": 3}
    pack, counts = made(tmp_path, "ml-1m-melu", ml_1m, **settings)
    new = USERS // 5
    tasks = {name: s["tasks"] for name, s in counts["splits"].items()}
    assert tasks == {"train": USERS - new, "valid": USERS - new, "test": 2 * new}
    rows = {name: s["rows"] for name, s in counts["splits"].items()}
    assert rows == {"train": (USERS - new) * (FILMS - films), "valid": (USERS - new) * films, "test": new * FILMS}
    assert sum(counts["dropped_tasks"].values()) == 1
    assert "partition no_film_facts is not in partitions" in counts["dropped_tasks"]
    assert counts["splits"]["valid"]["cold_item_rows"] == 1
    assert set(vocabulary(pack, "actor")) == {"Ann Lee", "Bo Li"}
    assert vocabulary(pack, "director") == {}
    assert set(vocabulary(pack, "zip")) == {"98100", "98101", "98102"}


def test_a_broken_side_file_is_named(tmp_path: Path, ml_1m: Path):
    (ml_1m / "users.dat").write_text("0::F::25::1::98107\n1::F::25\n")
    with pytest.raises(ValueError, match=r"users\.dat, line 2: 3 fields, expected 5"):
        made(tmp_path, "ml-1m", ml_1m)


def test_a_user_without_side_information_is_a_bad_row(tmp_path: Path, ml_1m: Path):
    (ml_1m / "users.dat").write_text("0::F::25::1::98107\n")
    with pytest.raises(ValueError, match=r"ratings\.dat, row 41, column 'gender': is missing"):
        made(tmp_path, "ml-1m", ml_1m)


@pytest.mark.data
@pytest.mark.slow
def test_ml_1m_melu_of_the_subset_has_the_protocols_tasks(tmp_path: Path, real_data: Callable[[str], Path]):
    pack, counts = made(tmp_path, "ml-1m-melu", real_data("ml-1m-subset"))
    test = counts["splits"]["test"]
    assert (test["tasks"], test["query"], test["cold_tasks"]) == (723, [10, 10.0, 10], 1.0)
    assert test["support"][0] == 3
    assert test["support"][2] <= 90
    keys = pq.read_table(pack.tasks_file()).to_pydict()
    assert Counter(keys["split"]) == {"train": 2634, "valid": 229, "test": 723}
    assert max(Counter(keys["key"]).values()) == 1


@pytest.mark.data
def test_ml_100k(tmp_path: Path, real_data: Callable[[str], Path]):
    pack, counts = made(tmp_path, "ml-100k", real_data("ml-100k"), label_threshold=4.0)
    assert counts["rows_read"] == 100_000
    assert {name: s["tasks"] for name, s in counts["splits"].items()} == {"train": 660, "valid": 94, "test": 189}
    assert pack.schema.binary_label
    assert "Children's" in vocabulary(pack, "class")
    assert set(vocabulary(pack, "age")) <= {str(a) for a in range(0, 90, 10)}
