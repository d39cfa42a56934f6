"""A log whose items are texts, one of each user's own among them, and a model that reads these."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from histories import SCHEMA, history_pack, history_rows
from torch import Tensor, nn

from gmeta.core.batch import mask_of, text_ids_of
from gmeta.models.inputs import InputSpec, output_layer

TEXTS: dict[str, Any] = {
    **SCHEMA,
    "categorical": [{"name": "item", "text": True}, "place"],
    "sequence": [{**SCHEMA["sequence"][0], "text": True}],
}
"""What `histories.SCHEMA` says, with texts for items: in rows and in what was clicked before."""


def title(item: str) -> str:
    """The text of an item."""
    return f"Part {item[1:]} of {'the ' * (int(item[1:]) % 7)}story"


def text_rows(*args: Any, **kwargs: Any) -> dict[str, list[Any]]:
    """Rows of `history_rows` with titles for items. The third row of each user, and the end of the third history, have
    a text of the user's own.
    """
    rows = history_rows(*args, **kwargs)
    rows["item"] = [title(item) for item in rows["item"]]
    rows["last"] = [[title(item) for item in last] for last in rows["last"]]
    first = {user: row for row, user in reversed(list(enumerate(rows["user"])))}
    for user, row in first.items():
        rows["item"][row + 2] = f"Only for {user}"
        rows["last"][row + 2] = [*rows["last"][row + 2], f"Written by {user}"]
    return rows


def text_pack(folder: Path, schema: dict[str, Any] | None = None, **columns: Any) -> Path:
    """The pack of such a log, whose own texts are cold in valid and test tasks."""
    return history_pack(folder, schema or TEXTS, **{**text_rows(), **columns})


LATER = 20_000


def day_rows(day: int) -> dict[str, list[Any]]:
    """Rows of a day: users of the days before and some of its own, with the texts of the log, and the day's."""
    rows = text_rows(20, 8, seed=day, first_user=10 * day)
    rows["time"] = [time + day * LATER for time in rows["time"]]
    rows["item"][3::8] = [f"New on day {day}"] * len(rows["item"][3::8])
    rows["item"][4::8] = [f"Day {day} for {user}" for user in rows["user"][4::8]]
    return rows


def in_words(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows with texts of words that `encoders.tiny` knows, to which all others are one."""

    def words(text: str) -> str:
        number = sum(place * ord(letter) for place, letter in enumerate(text, 1))
        return f"w{4 + number % 50} w{4 + number // 50 % 50} w{4 + number // 2500 % 50}"

    last = [[words(text) for text in of] for of in rows["last"]]
    return {**rows, "item": [words(text) for text in rows["item"]], "last": last}


def number_of(text: str) -> float:
    """What `Titles` knows of a text: all its letters count."""
    return sum(map(ord, text)) % 97 / 97 if text else 0.0


class Titles(nn.Module):
    """Reads a number of each text, and no embedding row of it."""

    head = "out"
    texts = ("item", "last")

    def __init__(self, inputs: InputSpec, *, hidden: int = 6, features: list[str] = ["place"]) -> None:  # noqa: B006
        super().__init__()
        self.features = tuple(features)
        width = 2 + sum(inputs.widths[name] for name in features) + inputs.num_numeric
        self.layer, self.out = nn.Linear(width, hidden), output_layer(hidden, inputs)
        self.table = inputs.tables["item"]
        numbers = torch.tensor([number_of(text) for text in inputs.text_tables[self.table]])
        self.register_buffer("numbers", numbers, persistent=False)
        self.num_given = len(numbers)

    def add_texts(self, table: str, texts: Sequence[str]) -> None:
        assert table == self.table
        more = self.numbers.new_tensor([number_of(text) for text in texts])
        self.numbers = torch.cat([self.numbers, more])

    def forget_texts(self, table: str) -> None:
        assert table == self.table
        self.numbers = self.numbers[: self.num_given]

    def forward(self, dense: Tensor, embedded: dict[str, Tensor]) -> Tensor:
        own = self.numbers[embedded[text_ids_of("item")][..., :1]].to(dense.dtype)
        history = self.numbers[embedded[text_ids_of("last")]].to(dense.dtype).sum(-1, keepdim=True)
        assert all(mask_of(name) not in embedded for name in self.texts), "it reads no row of a text"
        inputs = [own, history, *(embedded[name] for name in self.features), dense]
        return self.out(torch.relu(self.layer(torch.cat(inputs, -1)))).squeeze(-1)


class Shelf(Titles):
    """Needs a file besides its weights: a number, by which it multiplies those of texts."""

    def __init__(self, inputs: InputSpec, *, scale: str, hidden: int = 6) -> None:
        super().__init__(inputs, hidden=hidden)
        self._scale = Path(scale)
        self.numbers *= float((self._scale / "scale.txt").read_text())

    def save_assets(self, folder: Path) -> dict[str, str]:
        shutil.copytree(self._scale, folder / "shelf")
        (folder / "texts.txt").write_text(str(self.num_given))
        return {"scale": "shelf"}
