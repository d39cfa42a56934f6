"""The quality benchmark: cells are kept and run once, metrics sort by logits, differences are paired over seeds."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gmeta.config.evaluation import FactorConfig
from gmeta.evaluation.metrics import metric

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package
import quality
from cells import cases, measure, outcome, raw, run


def _outcome(variants: dict[str, np.ndarray], rows: int = 72, tasks: int = 12) -> outcome.Outcome:
    task = np.repeat(np.arange(tasks), rows // tasks)
    label = np.random.default_rng(0).integers(2, size=rows)
    return outcome.Outcome.of([f"u{i}" for i in task], label, {name: np.ones(rows) for name in variants}, variants)


def test_auc_is_that_of_the_logits_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 5)
    variants = ("taste-before", "taste-after", "item-mean")
    label = _outcome({}).label
    outcomes = []
    for seed in range(2):
        noise = np.random.default_rng(seed).normal(size=(3, 72))
        outcomes.append(_outcome({name: 50 + i * label + noise[i] for i, name in enumerate(variants)}))
    found = measure.measure("case", ("auc",), ("taste",), outcomes)
    value = {record.variant: record.value for record in found.records if record.metric == "auc"}
    for name in variants:
        expected = [metric("auc", one.ranking[name], label, np.repeat(np.arange(12), 6)) for one in outcomes]
        assert value[name] == pytest.approx(np.mean(expected))
    difference = next(d for d in found.differences if d.against == "taste-before")
    assert difference.value == pytest.approx(value["taste-after"] - value["taste-before"])
    assert {d.against for d in found.differences} == {"taste-before", "item-mean"}


def test_whole_stars_and_variants_that_a_seed_lacks() -> None:
    both = {"a-after": np.linspace(1, 5, 72), "item-mean": np.ones(72)}
    seeds = [_outcome(both | {"a-plain-finetuned": np.ones(72)}), _outcome(both)]  # it diverged in the second
    found = measure.measure("case", ("mae",), ("a",), seeds)
    assert {record.variant for record in found.records} == {"a-after", "a-after-rounded", "item-mean"}
    assert "a-after − item-mean" in measure.render(found)


def test_outcomes_survive_the_disk(tmp_path: Path) -> None:
    found = {"": _outcome({"a": np.arange(72)}), "5 clicks": _outcome({"b": np.ones(72), "c": np.zeros(72)})}
    outcome.write_outcomes(tmp_path / "x.npz", found)
    again = outcome.read_outcomes(tmp_path / "x.npz")
    assert list(again) == ["", "5 clicks"]
    assert again["5 clicks"].task.tolist() == found["5 clicks"].task.tolist()
    assert {name: values.tolist() for name, values in again[""].ranking.items()} == {"a": list(range(72))}
    with pytest.raises(ValueError, match="other query rows"):
        found[""].joined(_outcome({"d": np.ones(60)}, rows=60))


@pytest.mark.slow
def test_a_cell_is_run_once_and_again_when_its_settings_change(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """A real training on a synthetic log of few users: model, twin and baselines."""
    short = ("--schedule.max_steps", 2, "--meta.adapt", "[head]", "--model.name", "melu")
    twins = {"plain": ("--schedule.max_steps", 2)}
    case = cases.Case("tiny", "", raw.synthetic, {"default": short}, ("auc",), twins, truth=True)
    study = run.Study(case, 0, tmp_path / "kept", quick=True)
    cells = run.cells_of(case, ["default"])
    tuned = FactorConfig(num_factors=2)
    found = study.run(cells, tuned, tmp_path / "scratch")[""]
    assert {"default-before", "default-after", "default-plain", "default-plain-finetuned"} < found.scores.keys()
    assert {"factor-analysis", run.TUNED, "posterior"} < found.scores.keys()
    assert (study.folder(cells[1]) / "config.yaml").exists()
    assert capfd.readouterr().out.count("tiny, seed 0") == 3
    study.run(cells, tuned, tmp_path / "scratch")
    changed = replace(case, models={"default": (*short, "--dense.lr", 0.01)})
    run.Study(changed, 0, tmp_path / "kept", quick=True).run(run.cells_of(changed, []), tuned, tmp_path / "scratch")
    assert "tiny" not in capfd.readouterr().out
    assert (
        not run.Study(changed, 0, tmp_path / "kept", quick=True).folder(run.cells_of(changed, ["default"])[1]).exists()
    )


def test_negatives_are_items_that_the_user_did_not_buy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "DATA", tmp_path)
    (tmp_path / "amazon-3domain").mkdir()
    rng = np.random.default_rng(0)
    users = {f"u{i}": [f"i{j}" for j in rng.permutation(60)[: 7 + i % 9]] for i in range(45)}  # u0, u9, … have too few
    lines = "\n".join(" ".join([user, *items]) for user, items in users.items())
    (tmp_path / "amazon-3domain" / "Toys.user_sequence.txt").write_text(lines)
    words = raw.shop(raw.Place(tmp_path, seed=0), "Toys")[""]
    rows = [line.replace('"', "").split(",") for line in Path(str(words[1])).read_text().splitlines()[1:]]
    assert {row[0] for row in rows} == {user for user, items in users.items() if len(items) >= raw.MIN_EVENTS}
    part = {row[0]: row[4] for row in rows}
    assert sorted(part.values()).count("test") == 4
    for user in part:
        mine = [(item, click) for key, item, click, *_ in rows if key == user]
        assert [item for item, click in mine if click == "1"] == users[user]
        assert [click for _, click in mine] == ["1", "0"] * len(users[user])
        near = {item for other in part if other != user and part[other] == part[user] for item in users[other]}
        assert {item for item, click in mine if click == "0"} <= near - {*users[user]}


def test_place_in_group() -> None:
    found = raw._place_in_group(np.array(["b", "a", "b", "b"]), np.array([3.0, 0.0, 1.0, 2.0]))
    assert found.tolist() == [2, 0, 0, 1]


@pytest.mark.data
def test_few_users_keep_the_test_users(tmp_path: Path) -> None:
    if not (raw.DATA / "ml-100k").is_dir():
        pytest.skip(f"no data in {raw.DATA}")
    words = raw.few_ratings(raw.Place(tmp_path, seed=3), users=100)[""]
    rows = [line.replace('"', "").split(",") for line in Path(str(words[1])).read_text().splitlines()[1:]]
    count = {part: len({row[0] for row in rows if row[4] == part}) for part in ("train", "valid", "test")}
    assert count == {"train": 100, "valid": 12, "test": 94}


def test_case_names_and_digests_differ() -> None:
    assert len({run.slug(case.name) for case in cases.CASES}) == len(cases.CASES)
    folders = {
        run.Study(case, 0, Path(), False).folder(cell)
        for case in cases.CASES
        for cell in run.cells_of(case, [*case.models])
    }
    assert len(folders) == sum(len(run.cells_of(case, [*case.models])) for case in cases.CASES)
    assert quality.CASES is cases.CASES
    assert all(not isinstance(case.make, partial) or case.make.keywords for case in cases.CASES)


def test_what_cannot_be_run_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "DATA", tmp_path)
    (tmp_path / "ml-1m-ads").mkdir()
    missing = {"other": ("--config", "examples/none.yaml")}
    known = [replace(case, models=missing | case.models) for case in cases.CASES]
    monkeypatch.setattr(quality, "CASES", known)
    args = Namespace(case=None, model=["melu", "other"], seeds=3, quick=False)
    (found,) = quality.chosen(args)
    assert (found.name, list(found.models), found.seeds) == ("ml-1m-ads/new films", ["melu"], 3)
    said = capsys.readouterr().out
    assert "ml-1m-ads/new films, other is left out: there is no examples/none.yaml" in said
    assert "set GMETA_DATA" in said
    quick = quality.chosen(Namespace(case=None, model=None, seeds=None, quick=True))
    assert "amazon/toys" not in {case.name for case in quick}
    assert {case.seeds for case in quick} == {1}
