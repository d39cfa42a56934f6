"""A long task as several episodes an epoch: every row once, in any number of workers, resumed anywhere."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from commands import fails, gmeta, logged, train_words
from packs import make_pack
from random_packs import random_tasks, schema, write_pack

from gmeta.config.train import TrainConfig
from gmeta.core.batch import TaskBatch
from gmeta.data.episodes import Episodes
from gmeta.data.loader import SplitSpec, TaskLoader
from gmeta.data.pack import open_pack
from gmeta.data.shards import PackSplit
from gmeta.training.membership import job_of

MOST = 5
ROWS, SUPPORT = (3, 40, 5, 6, 23, 17, 11), (1, 38, 0, 3, 2, 0, 11)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PackSplit:
    """Seven tasks of up to 40 rows in two shards."""
    tasks = random_tasks(np.random.default_rng(5), schema(), len(ROWS), max_rows=1)
    for task, rows, support in zip(tasks, ROWS, SUPPORT, strict=True):
        task.rows, task.num_support = task.rows * rows, support
    path = tmp_path_factory.mktemp("packs") / "pack"
    return open_pack(write_pack(path, schema(), [("train", tasks[:3]), ("train", tasks[3:])])).split("train")


def loader(split: PackSplit, **changes: object) -> TaskLoader[TaskBatch]:
    settings: dict[str, object] = {"tasks_per_batch": 4, "seed": 9, "window_batches": 2, "prefetch": 0}
    return TaskLoader(split, **{**settings, "episode_rows": MOST, **changes})  # type: ignore[arg-type]


def rows_of(batch: TaskBatch) -> list[tuple[int, list[int], list[int]]]:
    """Task, support rows and query rows of each episode."""
    sides = [
        [row[mask].tolist() for row, mask in zip(s.row, s.mask, strict=True)] for s in (batch.support, batch.query)
    ]
    return list(zip(batch.task_id.tolist(), *sides, strict=True))


def test_every_row_is_in_one_episode_of_its_task(split: PackSplit) -> None:
    whole = loader(split)
    counts = [-(-n // MOST) for n in ROWS]
    assert whole.num_tasks == sum(counts)
    for _ in range(2):
        epoch = [episode for batch in islice(whole, whole.batches_per_epoch) for episode in rows_of(batch)]
        assert len(epoch) == sum(counts)
        starts = np.cumsum(ROWS) - ROWS
        for task, (rows, support, count) in enumerate(zip(ROWS, SUPPORT, counts, strict=True)):
            found = sorted((s + q, len(s)) for of, s, q in epoch if of == task)
            assert [row for episode, _ in found for row in episode] == list(range(starts[task], starts[task] + rows))
            assert len(found) == count
            sizes = [len(episode) for episode, _ in found]
            assert max(sizes) - min(sizes) <= 1
            for size, (_, n) in zip(sizes, found, strict=True):
                shorter = min(support, rows - support, size // 2)
                assert n == (support if count == 1 else shorter if support <= rows - support else size - shorter)


def test_the_order_is_a_function_of_seed_epoch_and_index(split: PackSplit) -> None:
    epochs = [[rows_of(b) for b in islice(loader(split, seed=seed), 14)] for seed in (9, 9, 8)]
    assert epochs[0] == epochs[1] != epochs[2]


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(split: PackSplit, world_size: int, resample: bool) -> None:
    alone = loader(split, resample=resample)
    ranks = [loader(split, resample=resample, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(14):
        parts = [rows_of(next(r)) for r in ranks]
        assert [episode for part in parts for episode in part] == rows_of(next(alone))


@pytest.mark.parametrize("resample", [False, True])
def test_restored_at_every_step_the_tail_is_the_same(split: PackSplit, resample: bool) -> None:
    whole = loader(split, resample=resample)
    states, batches = [], []
    for _ in range(14):
        states.append(whole.state_dict())
        batches.append(rows_of(next(whole)))
    for step, state in enumerate(states):
        with loader(split, resample=resample, prefetch=2) as restored:
            restored.load_state_dict(state)
            assert [rows_of(next(restored)) for _ in batches[step:]] == batches[step:]


def test_a_resampled_episode_keeps_its_rows_and_sizes(split: PackSplit) -> None:
    stored, drawn = (
        {(i, e[0]): e for b in range(7) for i, e in enumerate(rows_of(batches[b]))}
        for batches in (list(islice(loader(split, resample=resample), 7)) for resample in (False, True))
    )
    assert stored.keys() == drawn.keys()
    moved = 0
    for key, (_, support, query) in stored.items():
        assert sorted(support + query) == sorted(drawn[key][1] + drawn[key][2])
        assert len(drawn[key][1]) == len(support)
        moved += drawn[key][1] != support
    assert moved > 5


def test_only_the_last_support_rows_of_an_episode_are_kept(split: PackSplit) -> None:
    for batch in islice(loader(split, max_support_rows=2), 7):
        assert int(batch.support.mask.sum(1).max()) <= 2


def test_tasks_put_back_are_episodes(split: PackSplit) -> None:
    handed = loader(split)
    handed.split_by(lambda step: SplitSpec())
    first = next(handed)
    assert first.batch_split is not None
    handed.put_back(first.batch_split.tasks[:2])
    for _ in range(handed.batches_per_epoch - 1):
        next(handed)
    assert rows_of(next(handed)) == rows_of(first)[:2]


def test_a_job_has_as_many_samples_as_episodes(split: PackSplit) -> None:
    assert (
        job_of(TrainConfig(pack="p", run_dir="r"), loader(split).num_tasks).num_samples
        == Episodes(split, MOST).num_episodes
    )


def test_a_run_trains_on_episodes_and_does_not_resume_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(make_pack(tmp_path / "pack"), tmp_path / "run", epochs=1)
    gmeta(*words, "--loader.episode_rows", 4)
    assert "60 tasks in " in capsys.readouterr().err
    split = open_pack(tmp_path / "pack").split("train")
    steps = -(-Episodes(split, 4).num_episodes // 20)
    assert [r["step"] for r in logged(tmp_path / "run") if r["kind"] == "train"] == list(range(1, steps + 1))
    fails([*words, "--resume", "true"], capsys, "loader.episode_rows is 0, but the run to resume has 4")
    fails(
        [*words[:-1], "1", "--loader.episode_rows", "3"],
        capsys,
        "loader.episode_rows is 3: must be 0 (off) or at least 4",
    )
