"""`gmeta benchmark`: its cells, what is read of their predictions, and its leaderboards."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from antm2c_rows import row, write_log
from commands import fails

from gmeta.benchmark.cells import Cell, CellFolder
from gmeta.benchmark.leaderboards import boards_of
from gmeta.benchmark.measure import base_rate_shift, gain_of, measure_scenes
from gmeta.benchmark.packs import known_rows, rows_of_scene, rows_of_some_users, scene_rows
from gmeta.benchmark.scored import Scored, aligned, read_scored, rows_of_all
from gmeta.benchmark.tracks import Tracks
from gmeta.config.benchmark import BenchmarkConfig
from gmeta.evaluation.metrics import auc


def scored(seed: int, skill: float = 1.0, rows: int = 600, scenes: int = 2) -> Scored:
    """Rows of 40 users, the same for every skill, and logits that tell labels by it."""
    rng = np.random.default_rng(0)
    user, scene = rng.integers(40, size=rows), rng.integers(scenes, size=rows)
    label = (rng.random(rows) < 0.4).astype(float)
    logit = skill * label + np.random.default_rng(seed).standard_normal(rows)
    none = np.full(rows, -1)
    return rows_of_all([Scored(np.array([f"u{u}" for u in user]), scene, np.arange(rows), none, label, logit)])


def keep(folder: CellFolder, cell: Cell, of: Scored, tasks: list[str] | None = None) -> None:
    """Write what a cell would leave."""
    for split in ("valid", "test"):
        table = pa.table(
            {
                "task": tasks or of.unit.tolist(),
                "scenario": [str(s) for s in of.scene],
                "row": of.row,
                "label": of.label,
                "before": of.score,
                "before.ranking": of.logit,
            }
        )
        file = folder.predictions(cell.name, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"variants": json.dumps(["before"])}), file)
    kept = {"asked": asdict(cell), "began": None, "cpu_s": 7.0, "peak_mb": 100.0}
    (folder.out / "cells" / cell.name / "cell.json").write_text(json.dumps(kept))


def boards(folder: CellFolder, cells: list[Cell], **reference: Any) -> dict[str, Any]:
    kept = {cell: folder.kept(cell) for cell in cells}
    assert all(kept.values())
    return {board.title: board for board in boards_of(folder, kept, reference, 50)}  # type: ignore[arg-type]


def value(board: Any, case: str, variant: str, metric: str) -> float:
    (found,) = (r for r in board.records if (r["case"], r["variant"], r["metric"]) == (case, variant, metric))
    return float(found["value"])


def test_aucs_of_scenes_are_those_of_their_rows_and_the_macro_is_their_mean() -> None:
    seeds = [scored(1), scored(2)]
    found = measure_scenes({"model": seeds, "worse": [scored(3, 0.3)]}, {}, 200)
    for scene in (0, 1):
        each = [auc(s.logit[s.scene == scene], s.label[s.scene == scene]) for s in seeds]
        assert found["model"].scenes[scene]["auc"] == pytest.approx(np.mean(each))
    assert found["model"].macro["auc"] == pytest.approx(found["model"].auc_macro[0])
    assert found["model"].spread
    gain = gain_of(found["model"].auc_macro, found["worse"].auc_macro)
    assert 0 < gain["low"] < gain["value"] < gain["high"]
    assert gain_of(found["model"].auc_macro, found["model"].auc_macro) == {"value": 0, "low": 0, "high": 0}


def test_a_resample_draws_the_same_users_in_each_scene() -> None:
    one = scored(1, scenes=1)
    twice = {name: np.concatenate([values, values]) for name, values in vars(one).items()}
    both = Scored(**{**twice, "scene": np.repeat([0, 1], len(one.unit))})
    found = measure_scenes({"model": [rows_of_all([both])]}, {}, 100)["model"]
    first, second = found.auc.values()
    np.testing.assert_allclose(first, second)


def test_the_base_rate_of_valid_rows_corrects_a_scene() -> None:
    of = scored(1)
    off = of.shifted({0: 2.0})
    found = measure_scenes({"off": [off]}, {"off": [off]}, 20)["off"]
    assert found.scenes[0]["calibration"] > 1.3
    assert found.scenes[0]["calibration_corrected"] == pytest.approx(1, abs=1e-6)
    assert found.scenes[0]["logloss_corrected"] < found.scenes[0]["logloss"]
    assert found.scenes[0]["auc"] == pytest.approx(measure_scenes({"of": [of]}, {}, 20)["of"].scenes[0]["auc"])
    logit = np.array([-1.0, 0.0, 3.0])
    assert (1 / (1 + np.exp(-(logit + base_rate_shift(logit, 0.25))))).mean() == pytest.approx(0.25)


def test_predictions_are_read_in_one_order(tmp_path: Path) -> None:
    """Tasks may be users, users in scenes, or items of a scene that know some rows; time breaks ties."""
    folder, of = CellFolder(tmp_path), scored(1)
    users, scenes = Cell("t", "a", 0, "all", ()), Cell("t", "b", 0, "in_scenes", ())
    shuffled = of.where(np.lexsort((np.arange(len(of.unit)), of.unit, of.scene)))  # type: ignore[arg-type]
    keep(folder, users, of)
    keep(folder, scenes, shuffled, [f"{u}/{s}" for u, s in zip(shuffled.unit, shuffled.scene, strict=True)])
    first = read_scored(folder.predictions(users.name, "test"), users.pack)
    second = read_scored(folder.predictions(scenes.name, "test"), scenes.pack)
    np.testing.assert_allclose(first.logit, aligned(first, second, "b").logit)
    items = Cell("t", "c", 0, "new_1", ())
    keep(folder, items, of, [f"1/{u}@{'100' if s else '0'}" for u, s in zip(of.unit, of.scene, strict=True)])
    third = read_scored(folder.predictions(items.name, "test"), items.pack)
    assert set(third.known.tolist()) == {0, 100}
    assert third.unit[0].startswith("1/u")
    with pytest.raises(ValueError, match="c has other rows"):
        aligned(first, third, "c")
    mailed = Cell("t", "d", 0, "all", ())
    keep(folder, mailed, of, [f"{user}@2" for user in of.unit])
    assert read_scored(folder.predictions(mailed.name, "test"), "all").unit[0] == "u0@2"  # it is of the user's name


def test_a_cell_counts_as_run_while_that_it_goes_on_from_is_the_same(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    base, other = Cell("t", "base", 0, "all", ("--a", "1")), Cell("t", "base", 0, "all", ("--a", "2"))
    tuned = Cell("t", "tuned", 0, "all", (), begins=base.name)
    keep(folder, base, scored(1))
    keep(folder, tuned, scored(1))
    assert folder.kept(tuned) is None  # it does not say from what
    file = tmp_path / "cells" / tuned.name / "cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "began": json.loads(json.dumps(asdict(base)))}))
    assert folder.kept(tuned)
    keep(folder, other, scored(1))
    assert folder.kept(tuned) is None


def test_a_scene_without_valid_rows_has_no_correction() -> None:
    of = scored(1)
    found = measure_scenes({"of": [of]}, {"of": [of.where(of.scene == 0)]}, 20)["of"]
    assert "calibration_corrected" in found.scenes[0]
    assert "calibration_corrected" not in found.macro


def test_boards_join_models_of_single_scenes_and_name_negative_transfer(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    cells = [Cell("scenarios", "dnn", 0, "all", ()), Cell("scenarios", "star", 0, "all", ())]
    cells += [Cell("scenarios", f"dnn, scene {s}", 0, f"scene_{s}", ()) for s in (0, 1)]
    for cell, of in zip(cells, (scored(1, 0.3), scored(2, 3.0), scored(3, 1.0), scored(3, 1.0)), strict=True):
        keep(folder, cell, of if cell.pack == "all" else of.where(of.scene == int(cell.pack[-1])))
    pack_without_new_items(folder.pack("all"))
    board = boards(folder, cells, posterior={"auc": [0.9, 0.9], "auc_macro": 0.9})["Scenarios"]
    assert [line[0] for line in board.rows] == ["star", "dnn, separate", "dnn", "*posterior*"]
    assert board.rows[1][-2:] == ["14", "100"]  # CPU seconds of both scenes' models
    assert any(note.startswith("Negative transfer: dnn") and "loses in scene 0" in note for note in board.notes)
    assert any(note.startswith("star, the best with parts for scenes, against dnn,") for note in board.notes)
    assert value(board, "scenarios/1", "star", "auc") > value(board, "scenarios/1", "dnn", "auc")
    assert value(board, "scenarios", "reference, posterior", "auc_macro") == 0.9
    assert "Scenarios" in board.markdown()
    assert boards(folder, cells[2:]) == {}  # models of single scenes alone tell nothing yet
    cells = [cell for cell in cells if cell.variant != "dnn, scene 1"]
    assert [line[0] for line in boards(folder, cells)["Scenarios"].rows] == ["star", "dnn"]  # a scene is missing


def pack_without_new_items(path: Path) -> None:
    """A pack whose test rows are those of `scored`, none of a new item."""
    from event_packs import quiet

    from gmeta.config.data import PrepareConfig
    from gmeta.data.prepare.prepare import prepare

    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"train": 2, "test": 600}
    table = pa.table(
        {
            "user": [f"{n}{i % 40}" for n, count in names.items() for i in range(count)],
            "item": ["a"] * 602,
            "label": [i % 2 for i in range(602)],
            "part": [n for n, count in names.items() for _ in range(count)],
        }
    )
    pq.write_table(table, path.parent / "rows.parquet")
    schema = "{task: user, label: label, item: item, partition: part, categorical: [item]}"
    (path.parent / "schema.yaml").write_text(schema)
    words = {"input": str(path.parent / "rows.parquet"), "schema": str(path.parent / "schema.yaml"), "out": str(path)}
    prepare(PrepareConfig(**words, valid_fraction=0.0), quiet)  # type: ignore[arg-type]


def test_trained_towers_are_held_against_kept_vectors(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    cells = [Cell("towers", "kept vectors", 0, "some_users", ()), Cell("towers", "upper layers", 0, "some_users", ())]
    for cell, skill in zip(cells, (0.3, 2.0), strict=True):
        keep(folder, cell, scored(1, skill))
    board = boards(folder, cells)["Trained towers"]
    assert [line[0] for line in board.rows] == ["upper layers", "kept vectors"]
    assert value(board, "towers", "upper layers - kept vectors", "auc_macro") > 0.1


def test_a_new_scene_is_told_by_known_rows(tmp_path: Path) -> None:
    folder, of = CellFolder(tmp_path), scored(1, scenes=1)
    plain, adapted = Cell("new_scene_0", "dlrm", 0, "new_0", ()), Cell("new_scene_0", "adapted", 0, "new_0", ())
    tuned = Cell("new_scene_0", "dlrm fine-tuned, 100", 0, "known_0_100", ())
    both = Scored(**{name: np.concatenate([v, v]) for name, v in vars(of).items()})
    better = Scored(**{**vars(both), "logit": both.logit + both.label * np.repeat([0, 1], len(of.unit))})
    tasks = [f"0/{u}@{n}" for n in (0, 100) for u in of.unit]
    keep(folder, plain, both, tasks)
    keep(folder, adapted, better, tasks)
    keep(folder, tuned, of, [f"0/{u}" for u in of.unit])
    board = boards(folder, [plain, adapted, tuned])["A new scene"]
    assert [line[:2] for line in board.rows] == [
        *(["dlrm", "0"], ["adapted", "0"], ["adapted", "100"], ["dlrm fine-tuned", "100"])
    ]
    assert value(board, "leave-one-out/0/100", "adapted", "auc") > value(board, "leave-one-out/0/0", "adapted", "auc")
    assert value(board, "leave-one-out/all/100", "adapted - dlrm fine-tuned", "auc_macro") > 0.1
    assert any(note.startswith("adapted, 100 known rows, against dlrm fine-tuned, 100") for note in board.notes)


def test_rows_of_a_scene_are_filtered_in_their_order(tmp_path: Path) -> None:
    hours = [row("u", f"i{hour}", f"01 {hour:02}:00:00", hour % 2, hour % 2) for hour in range(9)]
    root = write_log(tmp_path / "log", [*hours, row("u", "t", "07 10:00:00", 1, 1), row("u", "v", "04 10:00:00", 1, 1)])
    assert scene_rows(root) == {1: 5}  # the other has no rows of valid and test
    assert sorted(items(rows_of_scene(root, tmp_path / "one", 1))) == ["i1", "i3", "i5", "i7", "t", "v"]
    known = known_rows(root, tmp_path / "known", 1, 3)
    assert sorted(items(known)) == ["i5", "i7", "t", "v"]
    times = f"SELECT log_time, item_id FROM read_csv('{known}/*.csv', all_varchar = true) WHERE item_id <> 't'"
    trained = sorted(duckdb.execute(times).fetchall())
    assert [item for _, item in trained] == ["i5", "i7", "v"]
    assert all(time <= "2023-08-03 00:00:00" for time, _ in trained)
    with (tmp_path / "one" / "antm2c_10m_part1.csv").open() as of_one, (root / "antm2c_10m_part1.csv").open() as whole:
        ours, theirs = list(csv.DictReader(of_one)), list(csv.DictReader(whole))
    assert ours == [line for line in theirs if line["scene"] == "1"]


def test_some_users_have_all_of_their_rows(tmp_path: Path) -> None:
    rows = [row(f"u{user}", f"i{n}", f"0{1 + n} 10:00:00", n % 2) for user in range(200) for n in range(6)]
    root = write_log(tmp_path / "log", rows)
    some = rows_of_some_users(root, tmp_path / "some", 240)
    count = "SELECT user_id, count(*), count(DISTINCT item_id) FROM read_csv('{}/*.csv', all_varchar = true) GROUP BY 1"
    found, whole = (duckdb.execute(count.format(of)).fetchall() for of in (some, root))
    assert set(found) <= set(whole)
    assert 0.1 < len(found) / len(whole) < 0.3  # by 240 of 1,000 or more rows before test
    assert len(items(rows_of_some_users(root, tmp_path / "all", 10_000))) == len(rows)


def items(root: Path) -> list[str]:
    query = f"SELECT item_id FROM read_csv('{root}/*.csv', all_varchar = true, union_by_name = true)"
    return [str(item) for (item,) in duckdb.execute(query).fetchall()]


def config(**changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig(**{"do": ["antm2c"], "root": "r", "out": "o", "encoder": "e", **changes})


def test_cells_have_names_of_their_own_and_come_after_those_they_need() -> None:
    cells = list(Tracks(config(images="i", seeds=2), {0: 20_000, 1: 500, 3: 50}).cells())
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for place, cell in enumerate(cells):
        assert not cell.begins or cell.begins in names[:place]
    assert "new_scene_1-dlrm-fine-tuned-100-0" in names  # a scene of 500 rows has no 1,000 to know
    assert not any("new_scene_1" in name and "1000" in name for name in names)
    assert not any("scene-2" in name for name in names)
    without = [" ".join(cell.words) for cell in Tracks(config(), {0: 20_000}).cells()]
    assert not any("image" in words for words in without)


def test_what_cannot_be_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_log(tmp_path / "log", [row("u", "a", "01 10:00:00", 1)])
    words = ["benchmark", "antm2c", "--root", root, "--out", tmp_path / "out", "--encoder", tmp_path / "encoder"]
    fails(words, capsys, "encoder", "which is no folder")
    (tmp_path / "encoder").mkdir()
    fails([*words, "--cells", "scenario-"], capsys, "no cell begins so: they are scenarios, inputs")
    fails([*words, "--images", tmp_path], capsys, "no images.json")
    more = write_log(tmp_path / "more", [row("u", "a", "01 10:00:00", 1), row("u", "a", "02 10:00:00", 1)])
    fails([*words[:3], more, *words[4:]], capsys, "which is of something else", "parts: ")
    fails([*words, "--quick", "true"], capsys, "quick: False before, True now")
    torn = write_log(tmp_path / "torn", [row("u", "a", "never", 1)])
    fails([*words[:3], torn, "--out", tmp_path / "o", *words[6:]], capsys, "1 rows of", "no time or no scene")
    fails(["benchmark", *words[2:]], capsys, "say what is measured")
