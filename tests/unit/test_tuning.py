"""`gmeta tune`: successive halving over a space, that goes on after any end, and never ends for one bad trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import fails, gmeta, logged
from packs import make_pack
from safetensors.torch import load_file

from gmeta.cli import run
from gmeta.config.parse import modern_words
from gmeta.config.train import EmbeddingConfig, LoaderConfig, MetaConfig, ModelConfig, ScheduleConfig, TrainConfig
from gmeta.config.tune import TuneConfig
from gmeta.parallel.launch import EXIT_PEER_LOST, EXIT_STOPPED
from gmeta.parallel.mesh import PeerLost
from gmeta.training import loop
from gmeta.tuning import supervise
from gmeta.tuning import tune as tuning
from gmeta.tuning.halving import latest, num_rungs, num_survivors, ranked, validations_of
from gmeta.tuning.journal import Done
from gmeta.tuning.space import Range, TrialSettings, built_in_space, draw_trials, read_space
from gmeta.tuning.tune import _Trained, make_plan

FOUR = "dense.lr: [0.001, 0.03]\nmeta.inner_lr: [0.1, 0.5]\n"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("tuning") / "pack")


@pytest.fixture
def words(pack: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A `gmeta tune` of four trials, in two rungs of one and three epochs; what comes last counts."""

    def made(*more: object, space: str = FOUR) -> list[str]:
        (tmp_path / "space.yaml").write_text(space)
        found = ["tune", "--pack", pack, "--out", tmp_path / "out", "--space", tmp_path / "space.yaml", "--seeds", 1]
        found += ["--schedule.epochs", 3, "--loader.tasks_per_batch", 20, "--dense.decay", "cosine"]
        found += ["--model.args.hidden", "[8]", "--model.args.dropout", 0.2, *more]
        return [str(word) for word in found]

    return made


@pytest.fixture
def asked(pack: Path, tmp_path: Path) -> Callable[..., TuneConfig]:
    """The same tuning from Python; `space` is YAML, and what else is given are settings of `gmeta train`."""

    def made(space: str = FOUR, trials: int = 9, seeds: int = 1, budget: float = 30, **train: Any) -> TuneConfig:
        (tmp_path / "space.yaml").write_text(space)
        settings = {"pack": str(pack), "run_dir": "", "schedule": ScheduleConfig(epochs=3)}
        settings |= {
            "loader": LoaderConfig(tasks_per_batch=20),
            "model": ModelConfig(name="melu", args={"hidden": [8]}),
        }
        return TuneConfig(
            out=str(tmp_path / "out"),
            space=str(tmp_path / "space.yaml"),
            trials=trials,
            seeds=seeds,
            budget_minutes=budget,
            train=TrainConfig(**{**settings, **train}),
        )

    return made


def refused(config: Callable[[], TuneConfig], *told: str) -> None:
    """Tuning raises one error that holds all of `told`."""
    with pytest.raises(ValueError) as raised:
        tuning.tune(config())
    for text in told:
        assert text in str(raised.value)


def fake_training(monkeypatch: pytest.MonkeyPatch, values: Callable[[TrainConfig], float], seconds: float = 1) -> None:
    """Trials come to `values` in `seconds`, without training."""
    monkeypatch.setattr(tuning, "_train", lambda config, until, alone: _Trained(values(config), seconds))


def journal(out: Path, kind: str = "done") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == kind]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds."""
    last = max(run_dir.glob("checkpoints/step-*"))
    return {name: value for file in sorted(last.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def whole(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tuning that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "space.yaml").write_text(FOUR)
    words = ["--schedule.epochs", 3, "--loader.tasks_per_batch", 20, "--dense.decay", "cosine", "--seeds", 1]
    words += ["--model.args.hidden", "[8]", "--model.args.dropout", 0.2]
    gmeta("tune", "--pack", pack, "--out", folder / "out", "--space", folder / "space.yaml", *words)
    return folder / "out"


def test_the_best_trial_trains_on_and_is_what_its_settings_train(whole: Path, tmp_path: Path) -> None:
    """A rung pauses a run of the whole schedule: rates, validations and weights are those of `gmeta train`."""
    done = journal(whole)
    assert [(line["trial"], line["rung"], line["steps"]) for line in done[:4]] == [(t, 0, 3) for t in range(4)]
    best = min(done[:4], key=lambda line: line["values"][0])["trial"]
    assert [(line["trial"], line["rung"], line["steps"]) for line in done[4:]] == [(best, 1, 9)]
    gmeta("train", "--config", whole / "best.yaml", "--run_dir", tmp_path / "run")
    ours, again = whole / "runs" / f"trial-{best + 1}-seed-0", tmp_path / "run"
    assert logged(ours) == logged(again)
    first, second = tensors(ours), tensors(again)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    dropped = [path for path in whole.glob("runs/*") if path != ours]
    assert [path.name for path in dropped if (path / "checkpoints").exists()] == []


def test_a_tuning_that_was_killed_goes_on_to_the_same_end(
    words: Callable[..., list[str]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed amid a trial, amid the last rung, and while it writes a line."""
    usual = loop.train_step
    for kill_at in (5, 12):
        steps = count(1)

        def killed(*arguments: Any, steps: Iterator[int] = steps, kill_at: int = kill_at) -> Any:
            if next(steps) == kill_at:
                raise SystemExit(137)
            return usual(*arguments)

        monkeypatch.setattr(loop, "train_step", killed)
        with pytest.raises(SystemExit):
            run(words())
        with (tmp_path / "out" / "journal.jsonl").open("a") as file:
            file.write('{"kind": "do')
    monkeypatch.setattr(loop, "train_step", usual)
    gmeta(*words())
    assert journal(tmp_path / "out") == journal(whole)
    settings = [yaml.safe_load((folder / "best.yaml").read_text()) for folder in (tmp_path / "out", whole)]
    assert settings[0] | {"run_dir": ""} == settings[1] | {"run_dir": ""}
    best = f"runs/trial-{journal(whole)[-1]['trial'] + 1}-seed-0"
    first, second = tensors(tmp_path / "out" / best), tensors(whole / best)
    assert all(torch.equal(first[name], second[name]) for name in first)
    gmeta(*words())  # all is done: nothing is trained again
    assert journal(tmp_path / "out") == journal(whole)


def test_a_stop_is_obeyed_and_the_same_command_goes_on(
    asked: Callable[..., TuneConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = tuning.training_loop

    def stopped(run: Any, until: int) -> None:
        run.state.stop.set()
        usual(run, until)

    monkeypatch.setattr(tuning, "training_loop", stopped)
    assert tuning.tune(asked()) == EXIT_STOPPED
    assert "the same command goes on" in capsys.readouterr().out
    assert journal(tmp_path / "out") == []
    monkeypatch.setattr(tuning, "training_loop", usual)
    fake_training(monkeypatch, lambda config: config.dense.lr)
    assert tuning.tune(asked()) == 0
    assert len(journal(tmp_path / "out")) == 5


def test_a_trial_that_diverges_is_the_worst_and_named(
    asked: Callable[..., TuneConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuning.tune(asked("dense.lr: [1.0e30, 0.001]")) == 0
    output = capsys.readouterr().out
    assert "trial 1 failed in rung 1: step " in output
    assert "best: trial 2 (dense.lr 0.001)" in output
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["dense"]["lr"] == 0.001


def test_a_tuning_whose_trials_all_fail_says_so(
    words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(words(space="dense.lr: [1.0e30]"), capsys, "every trial failed, the first: step ", "narrow the rates")
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_a_trial_without_enough_memory_is_the_worst_and_named(
    asked: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {0.01: torch.OutOfMemoryError("CUDA out of memory. Tried"), 0.02: MemoryError()}
    errors[0.03] = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    def full(run: Any, until: int) -> None:
        if run.config.dense.lr in errors:
            raise errors[run.config.dense.lr]
        run.state.progress.best = 0.5

    monkeypatch.setattr(tuning, "training_loop", full)
    assert tuning.tune(asked("dense.lr: [0.01, 0.02, 0.03, 0.001]")) == 0
    output = capsys.readouterr().out
    assert all(f"trial {trial} failed in rung 1: out of memory" in output for trial in (1, 2, 3))
    assert "best: trial 4" in output


def test_another_error_is_no_bad_trial(asked: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Any, until: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(tuning, "training_loop", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        tuning.tune(asked())


def test_a_training_that_ends_the_process_each_time_is_given_up(
    asked: Callable[..., TuneConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel kills what takes too much memory, and no message remains."""

    def killed(config: TrainConfig, until: int, alone: bool) -> _Trained:
        if config.dense.lr == 0.001 and config.meta.inner_lr == 0.5:
            raise SystemExit(137)
        return _Trained(config.dense.lr, 1)

    monkeypatch.setattr(tuning, "_train", killed)
    for _ in range(3):
        with pytest.raises(SystemExit):
            tuning.tune(asked())
    tuning.tune(asked())
    assert "trial 2 failed in rung 1: the process ended each time" in capsys.readouterr().out
    assert [line["trial"] for line in journal(tmp_path / "out")] == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(
    ("codes", "begun", "signals", "starts"),
    [
        ([137, EXIT_PEER_LOST, 0], [1, 1, 1], 0, 3),  # a trial ends workers, and others are there to be trained
        ([137, 0], [0], 0, 1),  # nothing was begun: it is no trial's fault
        ([130, 0], [1], 1, 1),
        ([2, 0], [1], 0, 1),
        ([EXIT_STOPPED, 0], [1], 0, 1),
        ([1, 0], [1], 0, 1),  # a bug
    ],
)
def test_workers_start_again_where_a_trial_ended_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    begun: list[int],
    signals: int,
    starts: int,
) -> None:
    started = []

    def launch(nproc: int, argv: list[str], asked: list[Any], advice: str) -> int:
        started.append(nproc)
        asked += [2] * signals
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write("begun\n" * begun[len(started) - 1])
        return codes[len(started) - 1]

    monkeypatch.setattr(supervise, "launch", launch)
    assert supervise.supervise_tuning(tmp_path, 2, ["tune"]) == codes[starts - 1]
    assert started == [2] * starts


def test_one_of_several_ranks_without_memory_ends_as_one_that_lost_its_peers(
    asked: Callable[..., TuneConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(run: Any, until: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "training_loop", full)
    config = replace(asked().train, run_dir=str(tmp_path / "run"))
    with pytest.raises(PeerLost, match="run ran out of memory: CUDA out of memory"):
        tuning._train(config, 3, alone=False)


def test_the_budget_ends_the_tuning_and_a_larger_one_goes_on(
    asked: Callable[..., TuneConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It counts the training of all starts. Nothing is trained for 0 minutes; what would be is shown."""
    fake_training(monkeypatch, lambda config: config.dense.lr + config.meta.inner_lr, seconds=60)
    out = tmp_path / "out"
    assert tuning.tune(asked(budget=0)) == 0
    output = capsys.readouterr().out
    assert "not tried: trial 1, 2, 3, 4 in rung 1, and the 1 rung(s) after it" in output
    assert "dense.lr: 0.001, 0.03" in output
    assert journal(out) == []
    assert not (out / "best.yaml").exists()
    assert tuning.tune(asked(budget=1.5)) == 0
    assert "not tried: trial 3, 4 in rung 1" in capsys.readouterr().out
    assert (out / "best.yaml").exists()
    assert tuning.tune(asked(budget=1.5)) == 0
    assert len(journal(out)) == 2
    assert tuning.tune(asked(budget=9)) == 0
    assert [line["trial"] for line in journal(out)] == [0, 1, 2, 3, 0]


def test_seeds_are_averaged_and_their_spread_is_shown(
    asked: Callable[..., TuneConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The mean decides: trial 1 has the best single seed."""
    values = {(0.001, 7): 0.1, (0.001, 8): 0.9, (0.03, 7): 0.4, (0.03, 8): 0.42}
    fake_training(monkeypatch, lambda config: values[config.dense.lr, config.seed])
    tuning.tune(asked("dense.lr: [0.001, 0.03]", seeds=2, seed=7))
    output = capsys.readouterr().out
    assert "best: trial 2 (dense.lr 0.03): loss 0.4100 ± 0.0141" in output
    assert "0.5000 ± 0.5657" in output
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["seed"] == 7


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("dense.lrr: [0.1]", ("unknown key dense.lrr: did you mean dense.lr?",)),
        ("nothing: [0.1]", ("unknown key nothing", "--help")),
        ("dense: {lr: [0.1]}", ("dense is a section", "dense.lr: [value, value]")),
        ("schedule.epochs: [1, 2]", ("schedule.epochs cannot be tuned: rungs are cut from the schedule",)),
        ("seed: [1, 2]", ("seed cannot be tuned",)),
        ("dense.lr: 0.1", ("dense.lr is 0.1: list the values",)),
        ("dense.lr: []", ("dense.lr is []: list the values",)),
        ("dense.lr: [0.1, 0.1]", ("stands there twice",)),
        ("dense.lr: {low: 0.1}", ("dense.lr is {'low': 0.1}: a range is {low",)),
        ("dense.lr: {low: 0.1, high: 1, base: 2}", ("a range is {low",)),
        ("dense.lr: {low: 0.1, high: 0.01}", ("dense.lr: low is 0.1: must be less than high, 0.01",)),
        ("dense.lr: {low: 0, high: 1, log: true}", ("dense.lr: low is 0: must be more than 0 with log",)),
        ("dense.lr: {low: 0, high: .inf}", ("dense.lr has inf",)),
        ("dense.lr: {low: 0.1, high: 1, log: 2}", ("log is 2: must be true or false",)),
        ("dense.lr: [-1, 1]", ("trial 1 (dense.lr -1)", "dense.lr is -1", "must not be negative")),
        ("dense.lr: [much]", ("trial 1 (dense.lr much)", "must be of type float")),
        ("meta.recompute: [false, true]\nmeta.order: [first]", ("trial 2", "meta.recompute is True")),
        ("model.args.hiden: [[8]]", ("trial 1", "no argument 'hiden', did you mean 'hidden'?")),
        ("meta.adapt: [[dense], [heads]]", ("trial 2", "'heads'")),
        ("loss: [bce, mse]", ("schedule.metric is 'loss'", "do not compare")),
        ("{}", ("names no setting",)),
        ("[1]", ("holds no mapping",)),
    ],
)
def test_a_space_that_cannot_be_tried_is_refused_before_anything_is_trained(
    asked: Callable[..., TuneConfig], tmp_path: Path, space: str, told: tuple[str, ...]
) -> None:
    refused(lambda: asked(space), *told)
    assert not (tmp_path / "out").exists()


def test_settings_that_no_trial_can_have_are_refused(
    words: Callable[..., list[str]],
    asked: Callable[..., TuneConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails(words("--elastic.enabled", "true"), capsys, "elastic.enabled is True")
    fails(words("--dense.lrr", 1), capsys, "unknown key dense.lrr: did you mean dense.lr?")
    refused(lambda: asked(resume=True), "resume is True", "by itself")
    refused(lambda: asked(trials=0), "trials is 0")
    refused(lambda: asked(seeds=0), "seeds is 0")
    refused(lambda: asked(budget=-1), "budget_minutes is -1")
    refused(lambda: asked(pack=str(make_pack(tmp_path / "bare", valid=0))), "ranked on the valid split", "has none")


def test_another_tuning_in_the_same_directory_is_refused_by_name(
    asked: Callable[..., TuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training(monkeypatch, lambda config: 1.0)
    tuning.tune(asked(budget=0))
    other = str(make_pack(tmp_path / "other", seed=2))
    refused(lambda: asked(pack=other), "holds a tuning of another pack", "name another out")
    refused(lambda: asked(trials=3), "trials 9, now it is 3")
    refused(lambda: asked(seeds=2), "seeds 1, now it is 2")
    refused(lambda: asked(embedding=EmbeddingConfig(lr=0.3)), "embedding.lr 0.05, now it is 0.3")
    refused(lambda: asked("dense.lr: [0.001, 0.03]\nmeta.inner_lr: [0.1]"), "space: meta.inner_lr [0.1, 0.5], now")
    refused(lambda: asked("dense.lr: [0.001, 0.03]"), "space: meta.inner_lr [0.1, 0.5], now it is unset")
    assert tuning.tune(asked(loader=LoaderConfig(tasks_per_batch=20, prefetch=0), timeout_s=60, run_dir="x")) == 0


def test_a_journal_that_gmeta_did_not_write_is_refused(asked: Callable[..., TuneConfig], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").write_text('{"kind": "done", "trial": 1}\n')
    refused(asked, "journal.jsonl, line 1 is not what gmeta writes")


def test_a_run_s_own_config_is_what_trials_share(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code is imported only where the command line names it, as in `gmeta train`."""
    fake_training(monkeypatch, lambda config: config.dense.lr)
    old = tmp_path / "old"
    old.mkdir()
    (old / "run_id").write_text("old")
    settings = {"run_dir": "runs/old", "model": {"embedding_dim": 4}, "schedule": {"metric": "auc"}}
    (old / "config.yaml").write_text(yaml.safe_dump(settings))
    gmeta(*words("--config", old / "config.yaml"))
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert (best["run_dir"], best["model"]["embedding_dim"]) == ("runs/old", 4)
    assert best["dense"]["lr"] == 0.03  # of auc the highest is best
    (old / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "towers:Towers"}}))
    fails(words("--config", old / "config.yaml"), capsys, "names code of its own", "--model.name towers:Towers")


def test_old_keys_of_train_work_in_tune_too() -> None:
    words, told = modern_words(["--dense.placement", "NNN", "--comm.dedup", "true"], "tune")
    assert words == ["--dense.sharding", "NNN"]
    assert len(told) == 2


@pytest.mark.parametrize("model", ["melu", "dlrm", "taste", "own:Model"])
def test_the_built_in_space_holds_what_is_given_as_the_first_trial(pack: Path, model: str) -> None:
    config = TrainConfig(pack=str(pack), run_dir="", model=ModelConfig(name=model))
    space = built_in_space(config)
    assert {"dense.lr", "embedding.lr", "meta.inner_lr"} <= space.keys()
    if model == "own:Model":
        return
    found = make_plan(TuneConfig(out="", train=config), 1)
    assert len(found.trials) == 9
    assert found.trials[0] == {key: found.trials[0][key] for key in space}
    assert found.configs[0].dense.lr == config.dense.lr
    assert len({found.configs[n].dense.lr for n in range(9)}) == 9


def test_plain_training_is_not_tuned_in_an_inner_loop_that_it_lacks() -> None:
    plain = built_in_space(TrainConfig(pack="", run_dir="", model=ModelConfig(name="melu"), meta=MetaConfig(adapt=[])))
    assert [key for key in plain if key.startswith("meta.")] == []


def test_draws_follow_the_seed_and_stay_in_their_range() -> None:
    space = {"a": Range(0.001, 1.0, log=True), "b": Range(2, 5), "c": ["x", "y"]}
    first = draw_trials(space, 50, seed=3)
    assert first == draw_trials(space, 50, seed=3) != draw_trials(space, 50, seed=4)
    assert all(0.001 <= one["a"] <= 1 and one["b"] in (2, 3, 4, 5) and one["c"] in ("x", "y") for one in first)
    assert 15 < sum(one["a"] < 0.0316 for one in first) < 35  # half of a logarithmic range
    assert {one["b"] for one in first} == {2, 3, 4, 5}
    few = {"b": Range(1, 2), "c": ["x", "y"]}
    assert len(draw_trials(few, 9, seed=0)) == 4
    grid = draw_trials({"c": ["x", "y"], "d": [1, 2]}, 4, seed=0)
    assert grid == [{"c": c, "d": d} for c in "xy" for d in (1, 2)]
    some = draw_trials({"c": ["x", "y"], "d": [1, 2]}, 3, seed=0)
    assert len(some) == 3
    assert all(one in grid for one in some)
    given: TrialSettings = {"c": "x", "d": 7}
    assert draw_trials({"c": ["x", "y"], "d": [1, 2]}, 3, seed=0, first=[given])[0] == given


def test_a_space_reads_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("dense.lr: {low: 1e-3, high: 1e-1, log: true}\nmodel.args.hidden: [[8], [16]]")
    assert read_space(tmp_path / "space.yaml") == {
        "dense.lr": Range(0.001, 0.1, log=True),
        "model.args.hidden": [[8], [16]],
    }


def test_rungs_take_a_third_of_the_trials_and_three_times_the_validations() -> None:
    assert [num_rungs(n, 100) for n in (1, 2, 3, 4, 8, 9, 26, 27)] == [1, 1, 2, 2, 2, 3, 3, 4]
    assert [num_rungs(27, v) for v in (1, 2, 3, 8, 9, 26, 27)] == [1, 1, 2, 2, 3, 3, 4]
    assert [num_survivors(9, rung) for rung in range(3)] == [9, 3, 1]
    assert [num_survivors(5, rung) for rung in range(2)] == [5, 1]
    assert [validations_of(rung, 3, 10) for rung in range(3)] == [1, 3, 10]
    for validations in range(1, 60):
        rungs = num_rungs(81, validations)
        found = [validations_of(rung, rungs, validations) for rung in range(rungs)]
        assert found == sorted(set(found))
        assert found[0] >= 1
        assert found[-1] == validations


def test_what_failed_has_no_rank_and_later_rungs_count() -> None:
    results = [
        Done(0, 0, [0.5], 1, 1),
        Done(1, 0, [0.2], 1, 1, "diverged"),
        Done(2, 0, [0.4, 0.4], 1, 1),
        Done(3, 0, [0.4], 1, 1),
        Done(0, 1, [0.3], 1, 1),
    ]
    assert [done.trial for done in ranked(results[:4], False)] == [2, 3, 0]
    assert [done.trial for done in ranked(results[:4], True)] == [0, 2, 3]
    assert [done.trial for done in ranked(latest(results), False)] == [0, 2, 3]
