"""A stream of days: what a day is made of, who comes and goes, and that its truth is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, train_words

from gmeta.config.data import SynthConfig
from gmeta.data import synthetic_days as days
from gmeta.data.pack import open_pack
from gmeta.data.stream_truth import DAY_US, START_US, day_name
from gmeta.data.synthetic import LogRows, exact_auc, last_rows, reference_aucs, reference_scores, sigmoid
from gmeta.data.synthetic_days import days_of, synthesize_days
from gmeta.evaluation.variants import truth_scores

NUM_DAYS = 6
SMALL: dict[str, Any] = {"users": 1200, "items": 60, "rows_per_user": 16, "num_query": 6, "late": 0.1}
"""About 2,700 rows a day."""


def config(out: Path | str = "unused", **changed: Any) -> SynthConfig:
    return SynthConfig(out=str(out), **{**SMALL, "days": NUM_DAYS, **changed})


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("days") / "stream"
    return out, synthesize_days(config(out))


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def file_of(out: Path, day: int) -> pa.Table:
    return pads.dataset(out / day_name(day)).to_table()


def micros(table: pa.Table) -> np.ndarray:
    return table["timestamp"].to_numpy().astype(np.int64)


def test_a_day_depends_on_the_seed_and_its_number_alone(stream: tuple[Path, Any], tmp_path: Path) -> None:
    """The same bytes again, whether the stream ends after the day or goes on; another seed gives others."""
    whole = files(stream[0])
    synthesize_days(config(tmp_path / "again"))
    assert files(tmp_path / "again") == whole
    synthesize_days(config(tmp_path / "short", days=3))
    short = files(tmp_path / "short")
    of_days = [name for name in short if "day=" in name]
    assert sorted(of_days) == sorted(
        [f"day=0{d}/part-00000.parquet" for d in range(3)] + [f"_truth/rows/day=0{d}.parquet" for d in range(3)]
    )
    assert {name: short[name] for name in of_days} == {name: whole[name] for name in of_days}
    synthesize_days(config(tmp_path / "other", days=1, seed=1))
    assert not set(files(tmp_path / "other").values()) & {whole[name] for name in of_days}


def test_the_files_are_what_the_schema_and_the_summary_say(stream: tuple[Path, dict[str, Any]]) -> None:
    out, summary = stream
    schema = yaml.safe_load((out / "schema.yaml").read_text())
    named = {schema["task"], schema["label"], schema["time"], *schema["categorical"], *schema["numeric"]}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["settings"]["late"] == 0.1
    assert summary["settings"]["user_turnover"] == 0.05, "what was left unset is told"
    for day, told in enumerate(summary["days"]):
        table = file_of(out, day)
        assert set(table.column_names) - {"day"} == named
        time = micros(table)
        assert (np.diff(time) >= 0).all()
        assert time.max() < START_US + (day + 1) * DAY_US
        assert told["rows"] == len(table)
        assert told["users"] == len(pc.unique(table["user_id"]))
        assert told["late_rows"] == (time < START_US + day * DAY_US).sum()
        assert told["click_rate"] == pytest.approx(pc.mean(table["label"]).as_py())


def test_late_rows_lie_in_a_later_file_and_nothing_else_is_lost(stream: tuple[Path, Any]) -> None:
    """Against the truth, which tells of each row under its own day."""
    out, _ = stream
    happened: dict[tuple[int, int], int] = {}
    for day in range(NUM_DAYS):
        truth = pq.read_table(out / "_truth" / "rows" / f"{day_name(day)}.parquet")
        assert ((micros(truth) - START_US) // DAY_US == day).all()
        keys = zip(truth["user_id"].to_pylist(), micros(truth).tolist(), strict=True)
        happened |= dict(zip(keys, truth["item_id"].to_pylist(), strict=True))
    share = {day: sum((t - START_US) // DAY_US == day for _, t in happened) for day in range(NUM_DAYS)}
    delays = []
    for day in range(NUM_DAYS):
        table = file_of(out, day)
        keys = zip(table["user_id"].to_pylist(), micros(table).tolist(), strict=True)
        for key, item in zip(keys, table["item_id"].to_pylist(), strict=True):
            assert happened.pop(key) == item, "each row is told of once, and lies in one file"
        own = (micros(table) - START_US) // DAY_US
        delays += [(int(o), day - int(o)) for o in own]
    assert {delay for _, delay in delays} == set(range(days.LATE_DAYS + 1))
    for day in range(NUM_DAYS - days.LATE_DAYS):
        late = sum(own == day and delay > 0 for own, delay in delays)
        assert late / share[day] == pytest.approx(0.1, abs=0.025)
    still_to_come = [(t - START_US) // DAY_US for _, t in happened]
    assert min(still_to_come) >= NUM_DAYS - days.LATE_DAYS


def test_no_row_is_late_where_none_shall_be() -> None:
    assert all((day.delay == 0).all() for day, _, _ in days_of(config(late=0.0), 2))
    assert all((day.delay > 0).all() for day, _, _ in days_of(config(late=1.0), 2))


def test_users_and_items_come_and_go() -> None:
    """Their numbers stay, ids rise, who left does not come back, and who arrived is active on his first day."""
    rates = config(user_turnover=0.2, item_turnover=0.1, active=0.5)
    seen_users, seen_items, arrived_users, arrived_items = [], [], [], []
    for day, users, items in days_of(rates, 12):
        seen_users.append(set(day.log["user_id"].tolist()))
        seen_items.append(set(day.log["item_id"].tolist()))
        arrived_users.append(users)
        arrived_items.append(items)
    assert (arrived_users[0], arrived_items[0]) == (1200, 60)
    assert np.mean(arrived_users[1:]) == pytest.approx(0.2 * 1200, rel=0.1)
    assert np.mean(arrived_items[1:]) == pytest.approx(0.1 * 60, rel=0.35)
    for day in range(1, 12):
        first = sum(arrived_users[:day])
        assert {u for u in seen_users[day] if u >= first} == set(range(first, first + arrived_users[day]))
        assert max(seen_items[day]) < sum(arrived_items[: day + 1])
        assert len(seen_items[day]) <= 60
    active = [len(seen) for seen in seen_users[1:]]
    assert np.mean(active) == pytest.approx(0.2 * 1200 + 0.5 * 0.8 * 1200, rel=0.05)
    # of the users of the first day, 0.8 ** d are left on day d, half of them active
    left = [len([u for u in seen if u < 1200]) for seen in seen_users]
    np.testing.assert_allclose(left[1:], [0.5 * 1200 * 0.8**d for d in range(1, 12)], rtol=0.2, atol=15)
    assert 0 < sum(item < 60 for item in seen_items[11]) < 40, "0.9 ** 11 of 60 items are left: 19"


def test_who_leaves_gives_his_place_to_a_new_one_and_who_stays_keeps_his_taste() -> None:
    rates = config(user_turnover=0.2)
    users, num = days._draw_users(rates, days._rng(rates, 5, 0), 1200, 0), 1200
    for day in range(1, 6):
        after = days.next_users(rates, users, day, num)
        stayed = after.user_id == users.user_id
        np.testing.assert_array_equal(after.user_id[~stayed], num + np.arange((~stayed).sum()))
        np.testing.assert_array_equal(after.taste[stayed], users.taste[stayed])
        assert (after.taste[~stayed] != users.taste[~stayed]).all()
        assert stayed.mean() == pytest.approx(0.8, abs=0.05)
        users, num = after, num + int((~stayed).sum())


def test_nothing_comes_goes_or_drifts_where_all_rates_are_0() -> None:
    rates = config(user_turnover=0.0, item_turnover=0.0, drift=0.0)
    world = days._draw_world(rates, 0)
    after = days.next_world(rates, world, 1)
    np.testing.assert_array_equal(after.items.item_id, world.items.item_id)
    for name in ("effect", "latent", "popularity"):
        np.testing.assert_array_equal(getattr(after.items, name), getattr(world.items, name))
    np.testing.assert_array_equal(after.tables.city, world.tables.city)
    assert max(day.log["user_id"].max() for day, _, _ in days_of(rates, 3)) < 1200


def test_drift_is_a_stationary_walk() -> None:
    """After d days the correlation is (1 - drift²)^(d/2), and the spread is that of the first day."""
    rates = config(items=4000, item_turnover=0.0, drift=0.3)
    first = world = days._draw_world(rates, 0)
    for day in range(1, 9):
        world = days.next_world(rates, world, day)
    expected = (1 - 0.3**2) ** 4
    for name in ("effect", "latent", "popularity"):
        before, after = getattr(first.items, name).ravel(), getattr(world.items, name).ravel()
        assert np.corrcoef(before, after)[0, 1] == pytest.approx(expected, abs=0.03)
        assert after.std() == pytest.approx(before.std(), rel=0.05)
    assert np.corrcoef(first.tables.city.ravel(), world.tables.city.ravel())[0, 1] == pytest.approx(expected, abs=0.15)
    np.testing.assert_array_equal(first.items.category, world.items.category)


def test_popularity_stays_zipf_while_its_order_drifts() -> None:
    rates = config(users=4000, active=1.0, item_turnover=0.0, zipf=1.0, drift=0.3)
    counts = [np.bincount(day.log["item_id"], minlength=60) for day, _, _ in days_of(rates, 12)]
    for day in (0, 11):
        ranked = np.sort(counts[day])[::-1]
        np.testing.assert_allclose(ranked[0] / ranked[[1, 4, 19]], [2, 5, 20], rtol=0.15)
    assert np.argmax(counts[0]) != np.argmax(counts[11])
    order = [np.argsort(np.argsort(count)) for count in counts]
    near, far = (np.corrcoef(order[0], order[d])[0, 1] for d in (1, 11))
    assert near > 0.85 > far


def test_labels_follow_the_true_logit_of_their_day() -> None:
    """In every tenth of the probabilities; truth that is ten days old ranks worse, as the docs say."""
    rates = config(users=6000, items=500, rows_per_user=24, user_turnover=0.0, item_turnover=0.0)
    users = days._draw_users(rates, days._rng(rates, 5, 0), rates.users, 0)
    worlds = [days._draw_world(rates, 0)]
    for number in range(1, 11):
        worlds.append(days.next_world(rates, worlds[-1], number))
    day = days.draw_day(rates, worlds[10], users, np.zeros(rates.users, bool), 10)
    label, taste = day.log["label"].astype(np.int64), users.taste[day.log["user_id"]]

    def logit(world: days.World) -> np.ndarray:
        base, latent = days.row_terms(rates, world, users, day.log["user_id"], day.log["item_id"])
        return base + (taste * latent).sum(axis=1)

    chance = sigmoid(logit(worlds[10]))
    told = sum(day.truth[f"latent_{k}"] * day.truth[f"taste_{k}"] for k in range(2)) + day.truth["base"]
    np.testing.assert_allclose(sigmoid(told), chance, rtol=1e-12)
    decile = np.searchsorted(np.quantile(chance, np.linspace(0, 1, 11)[1:-1]), chance)
    for d in range(10):
        part = decile == d
        error = (chance[part] * (1 - chance[part])).sum() ** 0.5 / part.sum()
        assert abs(label[part].mean() - chance[part].mean()) < 4 * error
    auc = [exact_auc(logit(worlds[10 - age]), label) for age in (0, 1, 10)]
    assert auc[0] > auc[1] > auc[2]
    assert 0.015 < auc[0] - auc[2] < 0.04


def test_the_posterior_uses_rows_of_earlier_days(stream: tuple[Path, Any]) -> None:
    """Of users who go on: with their older rows as support it predicts the last day better than with that day's."""
    out, _ = stream
    last = file_of(out, NUM_DAYS - 1)["user_id"].unique()
    rows = [last_rows(out / day_name(day), last.to_pylist(), 10_000)[1] for day in range(NUM_DAYS)]
    support, query = last_rows(out / day_name(NUM_DAYS - 1), last.to_pylist(), 10)
    parts = [*rows[:-1], support]
    older = LogRows(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("user_id", "item_id", "label", "time")))
    goes_on = np.isin(query.user_id, np.concatenate([r.user_id for r in rows[:-1]]))
    assert goes_on.sum() > 300
    with_older, alone = (reference_scores(out, part, query) for part in (older, support))
    np.testing.assert_array_equal(with_older["oracle"], alone["oracle"])
    unchanged = with_older["posterior"] == alone["posterior"]
    assert unchanged[~goes_on].all()
    assert not unchanged[goes_on].any()

    def loss(chance: np.ndarray) -> float:
        chance = chance[goes_on]
        return float(-np.log(np.where(query.label[goes_on] == 1, chance, 1 - chance)).mean())

    assert loss(with_older["posterior"]) < loss(alone["posterior"]) < loss(alone["prior"])


def test_evaluate_frames_a_model_of_one_day(stream: tuple[Path, Any], tmp_path: Path) -> None:
    """Items may be out of the pack's vocabulary, and the frame is that of the log."""
    out, _ = stream
    schema = yaml.safe_load((out / "schema.yaml").read_text())
    schema["categorical"] = [{"name": "item_id", "min_count": 20}, *schema["categorical"][1:]]
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({**schema, "item": "item_id"}))
    pack, run = tmp_path / "pack", tmp_path / "run"
    words = ["--schema", tmp_path / "schema.yaml", "--out", pack, "--query_size", 6]
    words += ["--min_task_rows", 7, "--test_fraction", 0.6]
    gmeta("prepare", "--input", out / day_name(4), *words)
    gmeta(*train_words(pack, run, epochs=1))
    gmeta("evaluate", "--run_dir", run, "--truth", out, "--resamples", 2, "--baselines", "false")
    found = pq.read_table(run / "predictions.parquet")
    assert found["item"].null_count > 0
    users = [int(task) for task in pc.unique(found["task"]).to_pylist()]
    expected = reference_aucs(out, *last_rows(out / day_name(4), users, 6))
    label = found["label"].to_numpy().astype(np.int64)
    auc = {name: exact_auc(found[name].to_numpy(), label) for name in expected}
    assert auc == pytest.approx({name: value["auc"] for name, value in expected.items()}, abs=1e-9)
    assert auc["oracle"] > auc["posterior"] > auc["prior"] + 0.03
    assert auc["prior"] > 0.6


def test_rows_of_another_log_are_named(stream: tuple[Path, Any]) -> None:
    out, _ = stream
    _, query = last_rows(out / day_name(1), [int(file_of(out, 1)["user_id"][0].as_py())], 1)
    assert query.time is not None
    none = LogRows(*[np.empty(0, np.int64)] * 4)
    assert len(reference_scores(out, none, query)["oracle"]) == 1
    for time in (query.time + 1, query.time + 90 * DAY_US, np.array([1_700_000_000])):
        moved = LogRows(query.user_id, query.item_id, query.label, time)
        with pytest.raises(ValueError, match=f"user_id {query.user_id[0]} has no row at time {time[0]} in the truth"):
            reference_scores(out, none, moved)
    with pytest.raises(ValueError, match="told by user and time: give the rows their time"):
        reference_scores(out, none, LogRows(query.user_id, query.item_id, query.label))


def test_a_pack_without_times_cannot_be_looked_up(stream: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = stream
    schema = yaml.safe_load((out / "schema.yaml").read_text())
    del schema["time"]
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    gmeta("prepare", "--input", out / day_name(0), "--schema", tmp_path / "schema.yaml", "--out", tmp_path / "pack")
    pack = open_pack(tmp_path / "pack")
    with pytest.raises(ValueError, match="keeps no time, by which a stream's truth is looked up"):
        truth_scores(pack, pack.split("test"), out)


def test_a_stream_of_hardly_anybody(tmp_path: Path) -> None:
    """Days without a row are files without a row."""
    summary = synthesize_days(config(tmp_path / "x", users=1, items=1, active=0.0, user_turnover=0.0, days=2))
    assert [day["rows"] for day in summary["days"]] == [0, 0]
    assert file_of(tmp_path / "x", 1).num_rows == 0
    days.print_days(summary)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--days", "0"], "days is 0: must be in [1, 100]"),
        (["--days", "101"], "days is 101: must be in [1, 100]"),
        (["--days", "3", "--drift", "1.5"], "drift is 1.5: must be in [0, 1]"),
        (["--days", "3", "--late", "-0.1"], "late is -0.1: must be in [0, 1]"),
        (["--days", "3", "--item_turnover", "2"], "item_turnover is 2.0: must be in [0, 1]"),
        (["--drift", "0.2"], "drift is 0.2: is for a stream: set days too, or leave it out"),
        (["--days", "many"], "days is 'many'"),
    ],
)
def test_values_out_of_range_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["synth", "--out", "unused", *words], capsys, message)


def test_the_command_prints_every_day(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    words = ["synth", "--out", tmp_path / "x", "--days", 2, "--users", 200, "--items", 20]
    gmeta(*words)
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert f"2 days, {sum(day['rows'] for day in summary['days']):,} rows" in printed
    assert f"{summary['days'][1]['reference']['posterior']['auc']:.4f}" in printed
    before = files(tmp_path / "x")
    fails(list(words), capsys, "exists: remove it or name another directory")
    assert files(tmp_path / "x") == before


def test_an_interrupted_stream_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(days, "last_rows", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize_days(config(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []
