"""`gmeta.load`: adapt to tables in memory and score candidates, as `gmeta predict` does with files."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from packs import make_pack
from packs import user_rows as rows

import gmeta
from gmeta.cli import run

SETTINGS: dict[str, dict[str, Any]] = {
    "factored": {"meta": {"inner_steps": 2, "inner_lr": 0.5}},
    "reference": {"meta": {"engine": "reference", "inner_lr": 0.5}},
    "embeddings": {"meta": {"adapt": ["embeddings"], "inner_steps": 2, "inner_lr": 2.0, "order": "first"}},
    "modulated": {"meta": {"adapt": ["head"], "modulation": "film", "inner_lr": 0.5}},
    "short": {"meta": {"inner_lr": 0.5}, "loader": {"tasks_per_batch": 20, "max_support_rows": 2}},
    "solved": {
        "model": {"name": "neural_linear", "args": {"task_features": ["group"]}},
        "meta": {"adapt": ["last_layer"]},
    },
    "plain": {"meta": {"adapt": []}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("recommender") / "pack")


@pytest.fixture(scope="module")
def runs(pack: Path) -> dict[str, Path]:
    """A trained run of each of `SETTINGS`."""
    trained = {}
    for name, values in SETTINGS.items():
        config = {"pack": str(pack), "run_dir": str(pack.parent / name), "loader": {"tasks_per_batch": 20}, **values}
        config |= {"schedule": {"epochs": 1}, "precision": "float64", "embedding": {"init_std": 0.5}}
        config["model"] = {"name": "melu", **config.get("model", {})}
        trained[name] = gmeta.train(config).path
    return trained


@pytest.fixture(scope="module")
def rec(runs: dict[str, Path]) -> gmeta.Recommender:
    return gmeta.load(runs["factored"])


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_those_of_the_command(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    support, candidates = rows(5, 4, 1, label=True), rows(7, 3, 2, label=False)  # two users have no support
    pq.write_table(support, tmp_path / "support.parquet")
    pq.write_table(candidates, tmp_path / "query.parquet")
    words = ["predict", "--run_dir", runs[name], "--support", tmp_path / "support.parquet"]
    words += ["--query", tmp_path / "query.parquet", "--out", tmp_path / "out.parquet"]
    assert run([str(word) for word in words]) == 0
    expected = pq.read_table(tmp_path / "out.parquet")
    rec = gmeta.load(runs[name])
    users = rec.adapt(support)
    np.testing.assert_allclose(users.predict(candidates), expected["score"].to_numpy(), rtol=1e-12)
    before = rec.adapt({}).predict(candidates)
    np.testing.assert_allclose(before, expected["score_before"].to_numpy(), rtol=1e-12)
    changed = np.abs(users.predict(candidates) - before) > 1e-9
    known = np.isin(candidates["user"].to_pylist(), list(users.keys))
    assert changed[known].any() == (name != "plain")
    assert not changed[~known].any()


def test_every_kind_of_table_gives_the_same(rec: gmeta.Recommender) -> None:
    support, candidates = rows(3, 4, 1, label=True), rows(3, 3, 2, label=False)
    expected = rec.adapt(support).predict(candidates)
    frame = support.to_pandas()
    odd = frame.set_index(np.arange(100, 112)).astype({"user": "category", "item": "category", "click": "int8"})
    tables = [
        support.to_pydict(),
        frame,
        odd,
        frame.convert_dtypes(),
        pl.from_arrow(support),
        pl.from_arrow(support).with_columns(pl.col("item").cast(pl.Categorical), pl.col("click").cast(pl.Boolean)),
        support.to_batches()[0],
        support.append_column("other", [["x"] * support.num_rows]),
        {name: np.array(values) if name not in ("tags",) else values for name, values in support.to_pydict().items()},
    ]
    for table in tables:
        np.testing.assert_array_equal(rec.adapt(table).predict(candidates), expected, type(table).__name__)
    assert rec.adapt(frame).predict(candidates.to_pandas()).tolist() == expected.tolist()


def test_threads_share_one_recommender(rec: gmeta.Recommender) -> None:
    tables = [(rows(3, 4, seed, label=True), rows(3, 3, seed + 50, label=False)) for seed in range(8)]
    expected = [rec.adapt(support).predict(candidates) for support, candidates in tables]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: rec.adapt(pair[0]).predict(pair[1]), tables * 3))
    for scores, alone in zip(found, expected * 3, strict=True):
        np.testing.assert_array_equal(scores, alone)


def test_half_precision_is_read(rec: gmeta.Recommender) -> None:
    support, candidates = rows(3, 4, 1, label=True).to_pydict(), rows(3, 3, 2, label=False).to_pydict()
    halves = {**candidates, "age": np.asarray(candidates["age"], np.float16)}
    singles = {**candidates, "age": halves["age"].astype(np.float32)}
    adapted = rec.adapt(support)
    np.testing.assert_array_equal(adapted.predict(halves), adapted.predict(singles))


def test_candidates_keep_their_order_and_may_repeat(rec: gmeta.Recommender) -> None:
    users, candidates = rec.adapt(rows(4, 3, 1, label=True)), rows(4, 3, 2, label=False)
    expected = users.predict(candidates)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_allclose(users.predict(candidates.take(order)), expected[order], rtol=1e-12)
    twice = users.predict(pa.concat_tables([candidates, candidates]))
    np.testing.assert_allclose(twice, np.tile(expected, 2), rtol=1e-12)


def test_tasks_do_not_depend_on_each_other(rec: gmeta.Recommender) -> None:
    """300 tasks take two passes; each of them learns from its own rows alone."""
    support, candidates = rows(300, 3, 1, label=True), rows(300, 2, 2, label=False)
    together = rec.adapt(support).predict(candidates)
    for user in ("new0", "new299"):
        mine = pa.compute.equal(candidates["user"], user)
        own = rec.adapt(support.filter(pa.compute.equal(support["user"], user)))
        assert own.keys == (user,)
        found = own.predict(candidates.filter(mine))
        np.testing.assert_allclose(found, together[mine.to_numpy()], rtol=1e-9)


def test_one_long_task_pads_no_other(rec: gmeta.Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound on cells, tasks are adapted and scored in parts; nothing else changes."""
    long = rows(1, 40, 3, label=True)
    support = pa.concat_tables([rows(6, 3, 1, label=True), long.set_column(0, "user", pa.array(["new6"] * 40))])
    candidates = rows(8, 3, 2, label=False)  # one of them has no support
    expected = rec.adapt(support)
    monkeypatch.setattr("gmeta.recommender.recommender.MAX_CELLS", 100)
    found = rec.adapt(support)
    assert len(expected.parts) == 1
    assert len(found.parts) > 1
    np.testing.assert_allclose(found.predict(candidates), expected.predict(candidates), rtol=1e-9)
    again = rec.restore(found.state())
    assert again.predict(candidates).tolist() == found.predict(candidates).tolist()


def test_a_state_can_be_sent(rec: gmeta.Recommender, runs: dict[str, Path]) -> None:
    users, candidates = rec.adapt(rows(3, 4, 1, label=True)), rows(4, 3, 2, label=False)
    file = io.BytesIO()
    torch.save(users.state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = gmeta.load(runs["factored"]).restore(state)
    assert again.keys == users.keys
    assert again.predict(candidates).tolist() == users.predict(candidates).tolist()
    with pytest.raises(ValueError, match="the state is a bytes: give what"):
        rec.restore(b"state")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the state has no 'fast_weights'"):
        rec.restore({"version": rec.version, "keys": [], "num_support": torch.zeros(0)})
    with pytest.raises(ValueError, match=r"this model is .*: adapt again"):
        gmeta.load(runs["embeddings"]).restore(state)


def test_nothing_is_no_mistake(rec: gmeta.Recommender) -> None:
    support, candidates = rows(3, 4, 1, label=True), rows(3, 3, 2, label=False)
    assert len(rec.adapt(support.slice(0, 0))) == 0
    assert rec.adapt(support).predict(candidates.slice(0, 0)).shape == (0,)
    assert len(rec.adapt(support)) == 3


SUPPORT = rows(2, 3, 1, label=True).to_pydict()


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ({k: v for k, v in SUPPORT.items() if k != "click"}, "support has no column 'click'"),
        ({("itm" if k == "item" else k): v for k, v in SUPPORT.items()}, "no column 'item': did you mean 'itm'"),
        (SUPPORT | {"age": [1.0]}, "the columns of support have different lengths"),
        (SUPPORT | {"age": "old"}, "support['age'] is 'old': must be a list"),
        (SUPPORT | {"age": [1, "x", 2, 3, 4, 5]}, "support['age'] cannot be read as one type of values"),
        (SUPPORT | {"age": ["x"] * 6}, "is no number"),
        (SUPPORT | {"click": [2] * 6}, "support has label 2: the run was trained on clicks"),
        (SUPPORT | {"click": [None, 1, 1, 1, 1, 1]}, "is missing"),
        (SUPPORT | {"age": pa.array([Decimal(1)] * 6, pa.decimal256(40, 2))}, "of a type that cannot be read"),
        ([1, 2], "support is a list: give a pandas or polars DataFrame"),
        (pd.DataFrame(SUPPORT).set_index("user"), "support has 'user' as its index, not as a column"),
    ],
)
def test_mistakes_are_named(rec: gmeta.Recommender, support: Any, message: str) -> None:
    with pytest.raises(ValueError, match="support") as caught:
        rec.adapt(support)
    assert message in str(caught.value)


def test_a_run_of_somebody_elses_code_is_not_opened_unasked(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_towers.py").write_text(
        "import torch\n"
        "from pathlib import Path\n"
        "Path('imported').touch()\n"
        "class Towers(torch.nn.Module):\n"
        "    def __init__(self, inputs, *, hidden: int = 4):\n"
        "        super().__init__()\n"
        "        self.layer, self.head_ = torch.nn.Linear(inputs.width, hidden), torch.nn.Linear(hidden, 1)\n"
        "    def forward(self, dense, embedded):\n"
        "        x = torch.cat([dense, *embedded.values()], -1)\n"
        "        return self.head_(torch.relu(self.layer(x))).squeeze(-1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["train", "--pack", pack, "--run_dir", "run", "--loader.tasks_per_batch", 30, "--schedule.epochs", 1]
    assert run([str(w) for w in [*words, "--model.name", "my_towers:Towers", "--model.args.hidden", 5]]) == 0
    (tmp_path / "imported").unlink()
    monkeypatch.delitem(__import__("sys").modules, "my_towers")
    with pytest.raises(ValueError, match=r"my_towers:Towers: loading it runs that code"):
        gmeta.load("run")
    assert run(["evaluate", "--run_dir", "run", "--resamples", "5"]) == 2
    assert "--trust_model true" in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()
    assert run(["evaluate", "--run_dir", "run", "--resamples", "5", "--trust_model", "true"]) == 0
    assert (tmp_path / "imported").exists()
    assert run(["report", "--run_dir", "run"]) == 0
    trusted = gmeta.load("run", trust_model=True)
    assert run(["bundle", "--run_dir", "run", "--out", "version"]) == 2
    assert "a model of its own" in capsys.readouterr().err
    assert run(["bundle", "--run_dir", "run", "--out", "version", "--trust_model", "true"]) == 0
    with pytest.raises(ValueError, match="a model of its own"):
        gmeta.load("version")
    assert gmeta.load("version", trust_model=True).version == trusted.version
    from my_towers import Towers  # type: ignore[import-not-found]

    given = gmeta.load("run", model=Towers)
    support, candidates = rows(2, 3, 1, label=True), rows(2, 3, 2, label=False)
    assert trusted.adapt(support).predict(candidates).tolist() == given.adapt(support).predict(candidates).tolist()
    assert json.loads(json.dumps(given.config.model.args)) == {"hidden": 5}


def test_another_class_of_the_same_shapes_is_told_of(runs: dict[str, Path]) -> None:
    from gmeta.models.melu import MeLU

    class Melu2(MeLU):
        pass

    with pytest.warns(UserWarning, match=r"was trained with the model melu, and is opened with"):
        gmeta.load(runs["factored"], model=Melu2)


def test_checkpoints_by_number_and_runs_that_are_none(runs: dict[str, Path], tmp_path: Path) -> None:
    assert gmeta.load(runs["factored"], checkpoint=3).version.endswith("/3")
    with pytest.raises(ValueError, match=r"checkpoint is '7': must be best, last or one of"):
        gmeta.load(runs["factored"], checkpoint=7)
    with pytest.raises(ValueError, match=r"nothing holds no run"):
        gmeta.load(tmp_path / "nothing")


def test_a_checkpoint_that_training_replaces_meanwhile(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are of the step that the version names; where it is gone, the newer one is taken."""
    from gmeta.recommender import recommender

    real, gone = recommender.checkpoints.find_checkpoint, [runs["factored"] / "checkpoints" / "step-00000002"]
    monkeypatch.setattr(recommender.checkpoints, "find_checkpoint", lambda *words: gone.pop() if gone else real(*words))
    assert gmeta.load(runs["factored"]).version.endswith("/3")


@pytest.mark.parametrize(
    ("items", "message"),
    [([2**63 - 1, 2**63] * 3, "beyond"), ([2**70] * 6, "support['item'] holds whole numbers beyond 64 bits")],
)
def test_whole_numbers_beyond_64_bits(rec: gmeta.Recommender, items: list[int], message: str) -> None:
    with pytest.raises(ValueError, match="support") as caught:
        rec.adapt(SUPPORT | {"item": items})
    assert message in str(caught.value)


def test_loading_holds_no_optimizer_state(runs: dict[str, Path]) -> None:
    rec = gmeta.load(runs["factored"])
    assert all(not table.state for table in rec.system.tables.fused.values())
    assert not any(p.grad is not None for p in rec.system.learner.parameters())


def test_uncertainty_falls_with_support_and_draws_follow_it(runs: dict[str, Path]) -> None:
    rec, candidates = gmeta.load(runs["solved"]), rows(3, 4, 2, label=False)
    few, many = (rec.adapt(rows(3, each, 1, label=True)) for each in (1, 60))
    stds = [tasks.uncertainty(candidates) for tasks in (rec.adapt({}), few, many)]
    assert all(std.shape == (12,) and (std > 0).all() for std in stds)
    assert stds[0].mean() > stds[1].mean() > stds[2].mean()
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    draws = np.stack([logit(many.sample(seed).predict(candidates)) for seed in range(60)])
    np.testing.assert_array_equal(draws[3], logit(many.sample(3).predict(candidates)))
    np.testing.assert_allclose(draws.std(0), stds[2], rtol=0.3)
    mode = logit(many.predict(candidates)) * np.sqrt(1 + np.pi / 8 * stds[2] ** 2)  # predicted is the mean probability
    np.testing.assert_allclose(draws.mean(0), mode, atol=5 * stds[2].max() / 60**0.5)
    again = rec.restore(many.state())
    np.testing.assert_array_equal(again.uncertainty(candidates), stds[2])
    with pytest.raises(ValueError, match="only a last layer that was solved for has a posterior"):
        gmeta.load(runs["factored"]).adapt(rows(3, 2, 1, label=True)).uncertainty(candidates)


def test_draws_of_tasks_that_were_not_adapted_are_of_the_prior(runs: dict[str, Path]) -> None:
    """A task's draw is its own, whatever else is adapted or asked with it, and the same again once it is stored."""
    rec, candidates = gmeta.load(runs["solved"]), rows(3, 4, 2, label=False)
    nothing, first = rec.adapt({}), rec.adapt(rows(1, 5, 1, label=True))
    std, mean = nothing.uncertainty(candidates), nothing.predict(candidates)
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    draws = np.stack([logit(nothing.sample(seed).predict(candidates)) for seed in range(80)])
    np.testing.assert_allclose(draws.std(0), std, rtol=0.3)
    np.testing.assert_allclose(
        draws.mean(0), logit(mean) * np.sqrt(1 + np.pi / 8 * std**2), atol=5 * std.max() / 80**0.5
    )
    drawn = nothing.sample(3)
    assert not drawn.uncertainty(candidates).any()
    assert drawn.sample(4) is drawn
    task = np.array(candidates["user"].to_pylist())
    for key in dict.fromkeys(task):
        np.testing.assert_allclose(
            logit(drawn.predict(candidates.filter(pa.array(task == key)))), draws[3][task == key]
        )
    between = np.corrcoef([draws[:, np.flatnonzero(task == key)[0]] for key in dict.fromkeys(task)])
    assert np.abs(between[np.triu_indices(3, 1)]).max() < 0.45  # each task has its own draw
    known = logit(first.sample(3).predict(candidates))
    np.testing.assert_allclose(known[task != "new0"], draws[3][task != "new0"])
    assert not np.allclose(known[task == "new0"], draws[3][task == "new0"])
    file = io.BytesIO()
    torch.save(first.sample(3).state(), file)
    file.seek(0)
    again = rec.restore(torch.load(file, weights_only=True))
    np.testing.assert_array_equal(logit(again.predict(candidates)), known)
    with pytest.raises(ValueError, match="only a last layer that was solved for has a posterior"):
        gmeta.load(runs["factored"]).adapt({}).sample(0)


@pytest.mark.parametrize("seed", ["a", 1.5, None, True, -1, 2**63])
def test_a_seed_that_is_none_is_named(runs: dict[str, Path], seed: Any) -> None:
    drawn = gmeta.load(runs["solved"]).adapt({})
    with pytest.raises(ValueError, match=rf"^seed is {seed!r}: must be a whole number in \[0, 2\^63\)$"):
        drawn.sample(seed)
    assert drawn.sample(np.int64(3)).state()["seed"] == drawn.sample(3).state()["seed"] == 3  # type: ignore[arg-type]


def test_a_task_without_a_posterior_is_named(runs: dict[str, Path]) -> None:
    rec, support = gmeta.load(runs["solved"]), rows(3, 4, 1, label=True)
    with torch.no_grad():  # no table gives such numbers, a damaged or diverged model does
        rec.system.learner.model.tower[0].weight[0] = torch.inf
    with pytest.raises(ValueError, match="task 'new0' has no posterior: the model gives its support numbers that are"):
        rec.adapt(support)
