"""Events of tasks behind each other: where each one stands, and back to padded blocks."""

import torch

from gmeta.core.sequences import sequences_of


def test_events_of_several_blocks_are_one_sequence_a_task() -> None:
    support = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    query = torch.tensor([[1, 0], [1, 1], [1, 0]], dtype=torch.bool)
    values = torch.arange(15)

    sequences, cells = sequences_of(support, query)

    assert values[cells].tolist() == [0, 1, 9, 11, 12, 6, 7, 8, 13]
    assert sequences.lengths.tolist() == [3, 2, 4]
    assert sequences.task.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert sequences.place.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert sequences.last.tolist() == [2, 4, 8]
    assert sequences.longest == 4


def test_padded_and_flat_are_inverse() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    sequences, _ = sequences_of(mask)
    events = torch.randn(4, 2, 5)

    padded = sequences.padded(events)

    assert padded.shape == (3, 3, 2, 5)
    assert torch.equal(sequences.flat(padded), events)
    assert padded[1].eq(0).all()
    assert padded[2, 1:].eq(0).all()


def test_no_tasks_at_all() -> None:
    sequences, cells = sequences_of(torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 1, dtype=torch.bool))

    assert len(cells) == 0
    assert sequences.longest == 1
    assert sequences.padded(torch.zeros(0, 2)).shape == (0, 1, 2)
