import dataclasses
import json

import numpy as np
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml
from sklearn.metrics import roc_auc_score

from gmeta.config.data import SynthConfig
from gmeta.data import synthetic
from gmeta.data.synthetic import (
    LogRows,
    last_rows,
    lattice,
    posterior_predictive,
    prior_predictive,
    reference_scores,
    synthesize,
)

SMALL = {"users": 300, "items": 50, "rows_per_user": 16, "num_query": 6}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "log"
    return out, synthesize(SynthConfig(out=str(out), **SMALL))


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_same_seed_gives_the_same_files(log, tmp_path):
    synthesize(SynthConfig(out=str(tmp_path / "again"), **SMALL))
    assert files(tmp_path / "again") == files(log[0])
    synthesize(SynthConfig(out=str(tmp_path / "other"), **SMALL, seed=1))
    assert files(tmp_path / "other")["part-00000.parquet"] != files(log[0])["part-00000.parquet"]


def test_a_log_is_that_of_earlier_releases(log):
    """Published numbers were measured on such logs; settings of a stream are not told of one."""
    rows = json.dumps(pq.read_table(log[0] / "part-00000.parquet").to_pylist())
    assert xxhash.xxh3_64_hexdigest(rows.encode()) == "c395d07e71d55f98"
    assert list(log[1]["settings"]) == [
        *("users", "items", "rows_per_user", "latent_dim", "taste_std", "side_std", "item_std", "item_side_share"),
        *("bias", "zipf", "num_query", "seed"),
    ]
    assert json.loads((log[0] / "_truth" / "truth.json").read_text()) == {"taste_std": 2.2}


def test_a_smaller_log_is_a_prefix_of_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "BLOCK_USERS", 64)
    for users in (100, 200):
        synthesize(SynthConfig(out=str(tmp_path / str(users)), **{**SMALL, "users": users}))
    names = [sorted(p.name for p in (tmp_path / str(users)).glob("*.parquet")) for users in (100, 200)]
    assert [len(n) for n in names] == [2, 4], "one file a block of users"
    small, large = (pads.dataset(sorted((tmp_path / u).glob("*.parquet"))).to_table() for u in ("100", "200"))
    assert small.equals(large.slice(0, len(small)))
    assert large["user_id"].unique().to_pylist() == list(range(200))


def test_the_log_is_what_the_schema_says(log):
    out, summary = log
    schema = yaml.safe_load((out / "schema.yaml").read_text())
    table = pq.read_table(out / "part-00000.parquet")
    named = {schema["task"], schema["label"], schema["time"], *schema["categorical"], *schema["numeric"]}
    assert named == set(table.column_names)
    assert len(table) == summary["rows"]
    assert set(table["label"].unique().to_pylist()) == {0, 1}
    assert json.loads((out / "summary.json").read_text()) == summary
    counts = np.bincount(table["user_id"].to_numpy())
    assert (counts.min(), counts.max()) == (8, 24)
    time, user = table["timestamp"].to_numpy(), table["user_id"].to_numpy()
    assert (np.diff(time)[np.diff(user) == 0] > 0).all()


def test_labels_follow_the_true_logit(tmp_path):
    config = SynthConfig(out=str(tmp_path / "x"), users=1500, items=50, rows_per_user=16)
    synthesize(config)
    _, rows = last_rows(tmp_path / "x", range(1500), 10)
    chance = reference_scores(tmp_path / "x", LogRows(*[np.empty(0, np.int64)] * 3), rows)["oracle"]
    cut = np.quantile(chance, np.linspace(0, 1, 11)[1:-1])
    decile = np.searchsorted(cut, chance)
    for d in range(10):
        part = decile == d
        error = (chance[part] * (1 - chance[part])).sum() ** 0.5 / part.sum()
        assert abs(rows.label[part].mean() - chance[part].mean()) < 4 * error


def test_popularity_is_zipf_and_latents_have_their_size():
    config = SynthConfig(out="unused", items=400, zipf=1.0)
    items = synthetic._draw_items(config)
    share = np.diff(items.popularity, prepend=0)
    np.testing.assert_allclose(share[0] / share[[1, 9, 99]], [2, 10, 100])
    assert (items.latent**2).sum(axis=1).mean() == pytest.approx(1, rel=0.25)
    tables = synthetic.draw_user_tables(config, np.random.default_rng([config.seed, 1]))
    block = synthetic._draw_block(config, items, tables, 0)
    assert block.taste.std() == pytest.approx(config.taste_std, rel=0.05)
    assert ((block.mean**2).sum(axis=1).mean() / config.latent_dim) ** 0.5 == pytest.approx(config.side_std, rel=0.1)


def test_the_defaults_reward_adaptation(tmp_path):
    aucs = synthesize(SynthConfig(out=str(tmp_path / "x"), users=1000))["reference"]
    for metric in ("auc", "gauc"):
        assert aucs["prior"][metric] + 0.07 < aucs["posterior"][metric] < aucs["oracle"][metric] - 0.02
    assert aucs["prior"]["auc"] > 0.65


def test_no_taste_leaves_nothing_to_learn(tmp_path):
    aucs = synthesize(SynthConfig(out=str(tmp_path / "x"), **SMALL, taste_std=0.0))["reference"]
    assert aucs["prior"]["auc"] == pytest.approx(aucs["oracle"]["auc"], abs=1e-4)
    assert aucs["posterior"]["auc"] == pytest.approx(aucs["oracle"]["auc"], abs=1e-4)


def problem(seed, dim, rows, scale):
    rng = np.random.default_rng(seed)
    draw = [rng.standard_normal(n) for n in (rows, 5)]
    coefficient = [scale * rng.standard_normal((n, dim)) for n in (rows, 5)]
    label = rng.integers(2, size=rows)
    return draw[0], coefficient[0], label, draw[1], coefficient[1]


@pytest.mark.parametrize(("dim", "rows"), [(1, 30), (2, 1), (2, 3), (2, 40), (3, 12)])
def test_the_posterior_has_converged(dim, rows):
    """Against nodes twice as dense over a wider ball."""
    for seed in range(2):
        case = problem(seed, dim, rows, scale=1.6)
        coarse = posterior_predictive(*case, lattice(dim))
        fine = posterior_predictive(*case, lattice(dim, spacing=0.25, radius=9.0))
        np.testing.assert_allclose(coarse, fine, atol=2e-4)


@pytest.mark.parametrize("dim", [1, 3])
def test_the_prior_is_the_posterior_given_an_empty_fact(dim):
    """A support row that no taste moves says nothing."""
    _, _, _, base, coefficient = problem(2, dim, 1, scale=1.0)
    fact = np.zeros(1), np.zeros((1, dim)), np.ones(1, np.int64)
    expected = posterior_predictive(*fact, base, coefficient, lattice(dim, spacing=0.3))
    np.testing.assert_allclose(prior_predictive(base, coefficient), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 25])
def test_the_posterior_is_that_of_importance_sampling(rows):
    """Against draws from the prior weighted by the likelihood: another method, no mode and no grid."""
    base, coefficient, label, query_base, query_coefficient = case = problem(7, 2, rows, scale=1.0)
    z = np.random.default_rng(0).standard_normal((200_000, 2))
    logit = base + z @ coefficient.T
    weight = np.exp(np.where(label, logit, 0).sum(axis=1) - np.logaddexp(0, logit).sum(axis=1))
    chance = 1 / (1 + np.exp(-(query_base + z @ query_coefficient.T)))
    expected = weight @ chance / weight.sum()
    effective = weight.sum() ** 2 / (weight**2).sum()
    assert effective > 1000
    np.testing.assert_allclose(posterior_predictive(*case, lattice(2)), expected, atol=4 * 0.5 / effective**0.5)


def test_a_large_support_reveals_the_taste():
    rng = np.random.default_rng(3)
    taste = np.array([1.2, -0.8])
    coefficient = 2 * rng.standard_normal((20_000, 2))
    label = (rng.random(20_000) < 1 / (1 + np.exp(-coefficient @ taste))).astype(np.int64)
    query = 2 * rng.standard_normal((50, 2))
    found = posterior_predictive(np.zeros(20_000), coefficient, label, np.zeros(50), query, lattice(2, spacing=1.0))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-query @ taste)), atol=0.03)


def test_scores_follow_the_rows_and_not_their_order(log):
    out, _ = log
    support, query = last_rows(out, range(20), 6)
    straight = reference_scores(out, support, query)
    rng = np.random.default_rng(0)
    mix = [rng.permutation(len(rows.label)) for rows in (support, query)]
    mixed = [LogRows(r.user_id[m], r.item_id[m], r.label[m]) for r, m in zip((support, query), mix, strict=True)]
    for name, score in reference_scores(out, *mixed).items():
        np.testing.assert_allclose(score, straight[name][mix[1]], atol=1e-12)


def test_a_user_without_support_has_the_prior(log):
    out, _ = log
    support, query = last_rows(out, range(20), 6)
    others = support.user_id != 3
    scores = reference_scores(out, LogRows(*(column[others] for column in dataclasses.astuple(support))), query)
    alone = query.user_id == 3
    np.testing.assert_array_equal(scores["posterior"][alone], scores["prior"][alone])
    assert (scores["posterior"][~alone] != scores["prior"][~alone]).all()


def test_last_rows_are_the_last_by_time(log):
    out, _ = log
    support, query = last_rows(out, [4, 9], 6)
    table = pads.dataset(out / "part-00000.parquet").to_table().to_pydict()
    for user in (4, 9):
        rows = sorted(
            (t, i) for t, i, u in zip(table["timestamp"], table["item_id"], table["user_id"], strict=True) if u == user
        )
        assert list(support.item_id[support.user_id == user]) == [i for _, i in rows[:-6]]
        assert list(query.item_id[query.user_id == user]) == [i for _, i in rows[-6:]]


def test_aucs_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    score, label, group = rng.integers(8, size=400) / 8, rng.integers(2, size=400), rng.integers(60, size=400)
    label[group == 5] = 1
    assert synthetic.exact_auc(score, label) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    parts = [group == g for g in range(60) if len(set(label[group == g])) == 2]
    values = [roc_auc_score(label[part], score[part]) for part in parts]
    expected = np.average(values, weights=[part.sum() for part in parts])
    assert synthetic.grouped_auc(score, label, group) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(synthetic.exact_auc(score[:1], label[:1]))
    assert np.isnan(synthetic.grouped_auc(score[:1], label[:1], group[:1]))


def test_rows_of_another_log_are_refused(log):
    out, _ = log
    one = np.array([1])
    with pytest.raises(ValueError, match="user_id 5000 is not in the truth"):
        reference_scores(out, LogRows(one, one, one), LogRows(np.array([5000]), one, one))
    with pytest.raises(ValueError, match="item_id 50 is not in the truth"):
        reference_scores(out, LogRows(one, np.array([50]), one), LogRows(one, one, one))


def test_an_existing_directory_is_left_alone(log):
    out, _ = log
    before = files(out)
    with pytest.raises(ValueError, match="exists: remove it or name another"):
        synthesize(SynthConfig(out=str(out), **SMALL))
    assert files(out) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "last_rows", full)
    with pytest.raises(OSError, match="No space left"):
        synthesize(SynthConfig(out=str(tmp_path / "x"), **SMALL))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"), [("users", 0), ("latent_dim", 4), ("taste_std", -1.0), ("item_side_share", 1.5), ("seed", -1)]
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}: must"):
        SynthConfig(out="x", **{key: value})


def test_the_summary_is_printed(log, capsys):
    synthetic.print_synthesis(log[1])
    printed = capsys.readouterr().out
    assert "300 users, 50 items" in printed
    assert f"{log[1]['reference']['posterior']['auc']:.4f}" in printed
