"""What does not fit a pack of next items is told in one sentence, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
from commands import fails, gmeta
from next_items import event_rows, next_item_pack

from gmeta.data.pack import open_pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next_item_pack(tmp_path_factory.mktemp("events"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.name", "melu"), "melu scores rows, and the pack is one of next items"),
        (("--meta.adapt", "[head]"), "where a task adapts a prompt or nothing"),
        (("--loader.resample", "true"), "histories are in the order of what came next: leave it out"),
        (("--loader.episode_rows", "10"), "an episode would make support and query of rows of either"),
        (("--model.features", "[domain]"), "model.features leaves them out: name the item"),
        (("--model.args", "{heads: 5}"), "model.args.heads is 5: must divide the width 64"),
        (("--model.args", "{similarity: far}"), "model.args.similarity is 'far': must be one of dot, cosine"),
        (("--next_item.candidates", "-1"), "next_item.candidates is -1: must be 0 (all) or more"),
        (("--next_item.in_batch", "-1"), "next_item.in_batch is -1: must be 0 (none) or a number of events"),
        (("--next_item.in_batch", "5", "--next_item.candidates", "0"), "all items are candidates already"),
        (("--next_item.in_batch", "5", "--loader.tasks_per_batch", "1"), "a batch of one user has no event of another"),
        (("--next_item.each", "-1"), "next_item.each is -1: must be 0 (all candidates) or a number of them"),
        (("--next_item.each", "600"), "next_item.candidates draws 512 items of a domain; raise that, or lower this"),
        (("--next_item.draw", "popularity", "--next_item.candidates", "0"), "so that none is drawn; leave it out"),
        (("--schedule.metric", "auc"), "of next items must be one of recall@10, ndcg@10, mrr@10"),
        (("--schedule.metric", "loss", "--schedule.patience", "1"), "schedule.metric is 'loss': of next items must"),
        (("--recipe", "cold_users"), "is a pack of next items: leave it out"),
    ],
)
def test_training_refuses(
    pack: Path, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[Any]
) -> None:
    fails(["train", "--pack", pack, "--run_dir", tmp_path / "run", *words], capsys, message)


def test_a_run_goes_on_with_its_own_objective(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    """The loss of a batch depends on what its targets are compared with."""
    words = ["train", "--pack", pack, "--run_dir", tmp_path / "run", "--model.embedding_dim", 8]
    gmeta(*words, "--schedule.max_steps", 1)
    words += ["--schedule.max_steps", 2, "--resume", "true"]
    fails([*words, "--next_item.candidates", 7], capsys, "next_item.candidates is 7", "start a new run_dir")
    fails([*words, "--next_item.targets", "last"], capsys, "next_item.targets is 'last'", "has 'every'")
    gmeta(*words)


def test_an_event_twice_is_no_leak_of_labels(tmp_path: Path) -> None:
    rows = event_rows()
    for column in rows.values():
        column.append(column[-1])
    counts = open_pack(next_item_pack(tmp_path, rows)).manifest["counts"]
    assert "rows_on_both_sides" not in counts
    assert counts["audit"]["targets_in_history"]["test"] > 0
