"""What `gmeta train` takes where no model is named: chosen from the pack, with reasons; what the user gives stays."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import fails, gmeta, logged

import gmeta as api
from gmeta.cli import run
from gmeta.config.train import ModelConfig, ScheduleConfig, TrainConfig
from gmeta.data.pack import open_pack
from gmeta.models.inputs import usual_features
from gmeta.models.melu import MeLU
from gmeta.recipes import recipes
from gmeta.recipes.facts import read_facts
from gmeta.recipes.recipes import Recipe, recipe_for

SCHEMA = {
    "task": "user",
    "label": "stars",
    "item": "film",
    "time": "at",
    "categorical": ["user", "film", "city"],
    "multi": [{"name": "hobbies", "separator": "|"}, {"name": "genres", "separator": "|"}],
}


def log(users: int = 40, rows: int = 15, films: int = 30, unit: float = 1) -> str:
    """CSV rows of users whose city and hobbies, in any order, never change. A star counts `unit`."""
    rng = np.random.default_rng(0)
    hobbies = [rng.permutation(["a", "b", "c", "d"])[:2] for _ in range(users)]
    lines = ["user,film,stars,at,city,hobbies,genres"]
    for user in range(users):
        for at, film in enumerate(rng.permutation(films)[:rows]):
            own = "|".join(rng.permutation(hobbies[user]))
            genres = "|".join(rng.permutation(["x", "y", "z"])[: rng.integers(0, 3)])
            lines.append(f"u{user},f{film},{unit * rng.integers(1, 6)},{at},c{user % 3},{own},{genres}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a pack of the log with some options of `gmeta prepare`; the schema may leave keys out."""
    place = tmp_path_factory.mktemp("recipes")

    def made(name: str, *options: object, without: tuple[str, ...] = (), unit: float = 1) -> Path:
        (place / "log.csv").write_text(log(unit=unit))
        if not (place / name).exists():
            schema = {key: value for key, value in SCHEMA.items() if key not in without}
            (place / "schema.yaml").write_text(yaml.safe_dump(schema))
            words = ["prepare", "--input", place / "log.csv", "--schema", place / "schema.yaml", "--query_size", 4]
            gmeta(*words, "--out", place / name, *options)
        return place / name

    return made


@pytest.fixture(scope="module")
def clicks(prepared: Callable[..., Path]) -> Path:
    return prepared("clicks", "--label_threshold", 4)


def settings(recipe: Recipe) -> dict[str, Any]:
    assert all(choice.why for choice in recipe.choices)
    return {choice.key: choice.value for choice in recipe.choices}


def test_facts_of_a_pack(clicks: Path, prepared: Callable[..., Path]) -> None:
    pack = open_pack(clicks)
    facts = read_facts(pack, usual_features(pack.schema))
    assert (facts.task_features, facts.lists) == (("city", "hobbies"), ("hobbies",))
    assert (facts.binary, facts.item, facts.num_items, facts.median_rows) == (True, "film", 30, 15)
    assert (facts.query_is_last, facts.roles_are_given, facts.varying) == (True, False, True)
    stars = open_pack(prepared("stars"))
    found = read_facts(stars, ["city"])
    assert (found.binary, found.item, found.varying) == (False, None, False)
    assert found.label_std == pytest.approx(2**0.5, rel=0.1)


def test_clicks_and_ratings(clicks: Path, prepared: Callable[..., Path]) -> None:
    found = settings(recipe_for(open_pack(clicks), {}))
    assert found["model.name"] == "neural_linear"
    assert found["loss"] == "bce"
    assert found["model.args.task_features"] == ["city", "hobbies"]
    assert found["embedding.start"] == "factors"
    stars = settings(recipe_for(open_pack(prepared("stars")), {}))
    assert stars["loss"] == "mse"


def test_amounts_are_counted_in_units_of_their_deviation(prepared: Callable[..., Path], tmp_path: Path) -> None:
    """The same labels in another unit train the same model."""
    stars, cents = prepared("stars"), prepared("cents", unit=100)
    assert "model.args.label_scale" not in settings(recipe_for(open_pack(stars), {}))
    assert settings(recipe_for(open_pack(cents), {}))["model.args.label_scale"] == pytest.approx(142, abs=10)
    losses = []
    for scale, pack in ((1, stars), (100, cents), (1e-4, prepared("tiny", unit=1e-4))):
        words = ["--pack", pack, "--run_dir", tmp_path / str(scale), "--model.args.label_scale", scale]
        words += ["--embedding.start", "random", "--embedding.init_std", 0.5]
        trained(*words, "--model.args.drift_std", 0.3, "--precision", "float64", "--schedule.epochs", 3)
        losses.append([record["loss"] / scale**2 for record in logged(tmp_path / str(scale)) if "loss" in record])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-4)


def test_without_an_item_rows_start_at_random(prepared: Callable[..., Path]) -> None:
    pack = prepared("no-item", "--label_threshold", 4, without=("item",))
    recipe = recipe_for(open_pack(pack), {})
    assert "embedding.start" not in settings(recipe)
    assert any("reads no item" in choice.why for choice in recipe.choices)


def test_what_the_user_gives_is_kept(clicks: Path) -> None:
    found = settings(recipe_for(open_pack(clicks), {"loss": "mse", "model.features": ["film", "city"]}))
    assert "loss" not in found
    assert found["model.args.task_features"] == ["city"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"embedding.start": "random"}, {"embedding.lr": 0.01}),
        ({"init_from": "version"}, {"embedding.start": None, "embedding.lr": 0.01}),
        ({"loss": "l1"}, {"meta.inner_loss": "mse"}),
        ({"model.args.task_features": ["film"]}, {"embedding.start": None}),
        ({"model.features": ["city"]}, {"model.args.task_features": None, "embedding.start": None}),
    ],
)
def test_a_recipe_reckons_with_what_is_given(clicks: Path, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    found = settings(recipe_for(open_pack(clicks), given))
    assert {key: found.get(key) for key in chosen} == chosen


@pytest.mark.parametrize(
    ("given", "drifts"), [({}, True), ({"loader.resample": True}, False), ({"loader.max_support_rows": 20}, False)]
)
def test_a_level_drifts_over_long_ordered_supports(
    clicks: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], drifts: bool
) -> None:
    facts = replace(read_facts(open_pack(clicks), ["film"]), median_rows=60)
    monkeypatch.setattr(recipes, "read_facts", lambda *_, **__: facts)
    found = settings(recipe_for(open_pack(clicks), given))
    assert ("model.args.drift_std" in found) == drifts
    assert found.get("loader.resample", True) != drifts


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, {"embedding.start": "factors", "embedding.lr": 0.002, "loader.episode_rows": 400}),
        ({}, {"model.args.drift_std": 0.5, "loader.resample": False, "loader.max_support_rows": None}),
        ({"query_is_last": False}, {"model.args.drift_std": None, "loader.resample": True}),
        ({"item": None}, {"embedding.start": None, "embedding.lr": 0.005}),
        ({"roles_are_given": True}, {"loader.episode_rows": None, "loader.max_support_rows": None}),
    ],
)
def test_few_long_tasks_are_scenarios(
    clicks: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], chosen: dict[str, Any]
) -> None:
    """They too start from factor analysis, and adapt to all of their support."""
    facts = replace(read_facts(open_pack(clicks), ["film"]), num_tasks=20, median_rows=900)
    monkeypatch.setattr(recipes, "read_facts", lambda *_, **__: replace(facts, **changes))
    recipe = recipe_for(open_pack(clicks), {})
    assert recipe.name == "scenarios"
    found = settings(recipe)
    assert {key: found.get(key) for key in chosen} == chosen


def test_scenarios_train(prepared: Callable[..., Path], tmp_path: Path) -> None:
    config = trained(
        "--pack", prepared("clicks", "--label_threshold", 4), "--run_dir", tmp_path / "run", "--recipe", "scenarios"
    )
    assert (config["loader"]["episode_rows"], config["embedding"]["start"]) == (400, "factors")


def test_one_label_trains(prepared: Callable[..., Path], tmp_path: Path) -> None:
    trained("--pack", prepared("one", "--label_threshold", 0), "--run_dir", tmp_path / "run")


def test_settings_are_printed_as_they_will_be(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["train", "--pack", str(clicks), "--run_dir", str(tmp_path), "--print_config", "--seed", "3"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["name"], printed["recipe"], printed["seed"]) == ("neural_linear", "cold_items", 3)


def test_empty_names_are_left_out(clicks: Path, tmp_path: Path) -> None:
    values = {"pack": str(clicks), "run_dir": str(tmp_path / "run"), "recipe": None, "model": {"name": None}}
    api.train({**values, "schedule": {"epochs": 1}})
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"] == "cold_items"


def trained(*words: object) -> dict[str, Any]:
    gmeta("train", *words, "--schedule.epochs", 1)
    named = dict(zip(words[::2], words[1::2], strict=False))
    config: dict[str, Any] = yaml.safe_load((Path(str(named["--run_dir"])) / "config.yaml").read_text())
    return config


def test_a_first_command_trains_and_tells(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pack", clicks, "--run_dir", tmp_path / "run", "--model.args.hidden", "[6]", "--model.embedding_dim", 4]
    config = trained(*words, "--loader.resample", "false")
    said = capsys.readouterr().err
    assert "recipe cold_items:" in said
    assert "model.args.task_features: [city, hobbies]" in said
    assert "resample" not in said
    assert (config["recipe"], config["model"]["name"]) == ("cold_items", "neural_linear")
    assert config["model"]["args"]["hidden"] == [6]
    assert config["model"]["args"]["task_features"] == ["city", "hobbies"]
    assert config["model"]["embedding_dim"] == 4
    assert config["loader"]["resample"] is False
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert text.startswith("# recipe cold_items:")
    assert "#   model.name: neural_linear" in text
    # What was chosen is in the file: it trains the same run, wherever it is read.
    words = ["--config", tmp_path / "run" / "config.yaml", "--run_dir", tmp_path / "again"]
    assert trained(*words) == {**config, "run_dir": str(tmp_path / "again")}
    assert logged(tmp_path / "again") == logged(tmp_path / "run")


def test_a_file_and_python_are_completed_too(clicks: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    asked = {"pack": str(clicks), "schedule": {"epochs": 1}, "model": {"args": {"hidden": [6]}}}
    file.write_text(yaml.safe_dump({**asked, "run_dir": str(tmp_path / "words")}))
    gmeta("train", "--config", file)
    api.train({**asked, "run_dir": str(tmp_path / "mapping")})
    model = ModelConfig(args={"hidden": [6]})
    schedule = ScheduleConfig(epochs=1)
    api.train(TrainConfig(pack=str(clicks), run_dir=str(tmp_path / "dataclass"), model=model, schedule=schedule))
    runs = [logged(tmp_path / name) for name in ("words", "mapping", "dataclass")]
    assert runs[0] == runs[1]
    first = [record["loss"] for record in runs[0] if record["kind"] == "train"]
    assert first == [record["loss"] for record in runs[2] if record["kind"] == "train"][: len(first)]


@pytest.mark.dist
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_train_the_recipe(clicks: Path, tmp_path: Path, nproc: int) -> None:
    words = ["--pack", clicks, "--precision", "float64", "--run_dir"]
    alone, together = (trained(*words, tmp_path / str(n), "--nproc", n) for n in (1, nproc))
    assert together == {**alone, "run_dir": str(tmp_path / str(nproc))}
    losses = [[r["loss"] for r in logged(tmp_path / str(n)) if r["kind"] == "train"] for n in (1, nproc)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)


def test_rows_from_elsewhere_take_the_place_of_factors(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a recipe, a version of one, and a warm start from that; what the user gives is refused beside it."""
    table = pa.table({"value": ["f1", "f2"], "vector": [[0.1] * 4, [0.2] * 4]})
    pq.write_table(table, tmp_path / "vectors.parquet")
    vectors = ("--embedding.pretrained", f"{{film: {tmp_path / 'vectors.parquet'}}}")
    first = ["--pack", clicks, "--run_dir", tmp_path / "run", "--model.embedding_dim", 4]
    assert trained(*first)["embedding"]["start"] == "factors"
    gmeta("bundle", "--run_dir", tmp_path / "run", "--out", tmp_path / "version", "--training", "true")
    capsys.readouterr()
    for place, more in (("a", vectors), ("b", ("--init_from", tmp_path / "version"))):
        words = ["--pack", clicks, "--run_dir", tmp_path / place, "--model.embedding_dim", 4, *more]
        assert trained(*words)["embedding"]["start"] == "random"
        assert f"{more[0][2:]} sets first rows, and not factor analysis" in capsys.readouterr().err
        fails(
            ["train", *words, "--run_dir", tmp_path / "no", "--embedding.start", "factors"], capsys, "sets first rows"
        )
    words = ["--pack", clicks, "--run_dir", tmp_path / "c", "--warm_start", tmp_path / "version"]
    assert trained(*words, *vectors)["embedding"]["start"] == "random"
    words[3] = tmp_path / "d"
    told = fails(["train", *words, "--model.name", "taste"], capsys, "a warm start goes on with the model of")
    assert "model.args" not in told
    fails(["train", *words[:4], "--init_from", tmp_path / "run"], capsys, f"{tmp_path / 'run'} is no bundle")
    fails(["train", *words[:4], "--init_from", clicks], capsys, "manifest.json is of format", "give a bundle")
    assert not (tmp_path / "d").exists()


def test_a_run_goes_on_with_its_own_settings(clicks: Path, tmp_path: Path) -> None:
    """One that a release before began named no model, and was a melu."""
    words = ["--pack", clicks, "--run_dir", tmp_path / "run"]
    first = trained(*words, "--model.name", "melu", "--model.args.hidden", "[5]")
    gmeta("train", *words, "--resume", "true", "--schedule.epochs", 2)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"] == first["model"]
    assert config["recipe"] == ""


def test_a_run_goes_on_where_its_model_is_named_again(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pack", clicks, "--run_dir", tmp_path / "run", "--resume", "true"]
    first = trained(*words)
    gmeta("train", *words, "--model.name", "neural_linear", "--schedule.epochs", first["schedule"]["epochs"] + 1)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"] == first["model"]
    fails(["train", *map(str, words), "--model.name", "melu"], capsys, "model.name", "neural_linear")


def test_a_run_that_goes_on_takes_no_other_recipe(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pack", clicks, "--run_dir", tmp_path / "run"]
    trained(*words)
    more = ["--resume", "true", "--recipe", "scenarios"]
    fails(["train", *map(str, words), *more], capsys, "recipe is 'scenarios'", "goes on with its own settings")


def test_a_recipe_and_a_model_of_ones_own_are_refused(clicks: Path, tmp_path: Path) -> None:
    values = {"pack": str(clicks), "run_dir": str(tmp_path / "run"), "recipe": "cold_users"}
    with pytest.raises(ValueError, match="recipe is 'cold_users', which chooses the model, and a model is given"):
        api.train(values, model=MeLU)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe", "cold_user"], ["recipe", "cold_users"]),
        (["--recipe", "cold_users", "--model.name", "melu"], ["recipe is 'cold_users'", "model.name is 'melu'"]),
        (["--model.features", "[flim]"], ["'flim'", "did you mean 'film'"]),
    ],
)
def test_mistakes_are_told(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: list[str]
) -> None:
    fails(["train", "--pack", str(clicks), "--run_dir", str(tmp_path / "run"), *words], capsys, *told)
    assert not (tmp_path / "run").exists()


def test_a_recipe_by_name(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = trained("--pack", clicks, "--run_dir", tmp_path / "run", "--recipe", "cold_users")
    assert config["recipe"] == "cold_users"
    assert "named, where cold_items would fit" in capsys.readouterr().err


def test_tuning_begins_at_the_recipe(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gmeta("tune", "--pack", clicks, "--out", tmp_path / "out", "--budget_minutes", 0)
    said = "".join(capsys.readouterr())
    assert "dense.lr" in said
    assert "meta.inner_lr" not in said  # nothing of the closed form


def test_rows_of_a_support_count_by_their_time(clicks: Path, tmp_path: Path) -> None:
    """In whatever order a table has them; without the column they count as they come."""
    train = ["train", "--pack", clicks, "--run_dir", tmp_path / "run", "--model.name", "melu"]
    gmeta(*train, "--schedule.max_steps", 3, "--loader.max_support_rows", 3, "--meta.inner_lr", 1)
    rec = api.load(tmp_path / "run")
    rows = pd.read_csv(io.StringIO(log())).query("user == 'u3'").assign(stars=lambda t: t["stars"] % 2)
    support, candidates = rows.iloc[:10], rows.iloc[10:]
    expected = rec.adapt(support).predict(candidates)
    mixed = support.sample(frac=1, random_state=1)
    np.testing.assert_allclose(rec.adapt(mixed).predict(candidates), expected, rtol=1e-6)
    assert not np.allclose(rec.adapt(mixed.drop(columns="at")).predict(candidates), expected)
    support.to_csv(tmp_path / "support.csv", index=False)
    mixed.to_csv(tmp_path / "mixed.csv", index=False)
    candidates.to_csv(tmp_path / "query.csv", index=False)
    for name in ("support", "mixed"):
        files = ["--support", tmp_path / f"{name}.csv", "--query", tmp_path / "query.csv"]
        gmeta("predict", "--run_dir", tmp_path / "run", *files, "--out", tmp_path / f"{name}.out.csv")
    assert (tmp_path / "support.out.csv").read_text() == (tmp_path / "mixed.out.csv").read_text()


def test_labels_of_one_kind_are_told_of(
    prepared: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = prepared("ones", "--label_threshold", 0)
    assert "every training label is 1" in capsys.readouterr().out
    gmeta("train", "--pack", pack, "--run_dir", tmp_path / "run", "--schedule.max_steps", 2)
    assert "every training label is 1" in capsys.readouterr().err
    users = api.load(tmp_path / "run").adapt({})
    row = pd.read_csv(io.StringIO(log())).iloc[:1]
    assert users.predict(row)[0] > 0.99
