"""Models of one's own that do not work, as the command line tells of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packs import make_pack

from gmeta.cli import run

MODELS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, inputs, *, hidden: int = 4):
        super().__init__()
        self.layer, self.last = nn.Linear(inputs.width, hidden), nn.Linear(hidden, 1)

    def forward(self, dense, embedded):
        return self.last(torch.relu(self.layer(torch.cat([dense, *embedded.values()], -1)))).squeeze(-1)

class Raises(Base):
    def forward(self, dense, embedded):
        return embedded["nope"]

class WrongShape(Base):
    def forward(self, dense, embedded):
        return self.layer(torch.cat([dense, *embedded.values()], -1))

class BatchNorm(Base):
    def __init__(self, inputs):
        super().__init__(inputs)
        self.norm = nn.BatchNorm1d(4)

class OwnTables(Base):
    def __init__(self, inputs):
        super().__init__(inputs)
        self.users = nn.Embedding(10, 3)

class OtherInputs(Base):
    def forward(self, x):
        return self.layer(x)

class Centred(Base):
    def forward(self, dense, embedded):
        out = super().forward(dense, embedded)
        return out - out.mean()

class NotMade(Base):
    def __init__(self, inputs):
        super().__init__(inputs)
        self.layer = nn.Linear(inputs.embedding_dim, inputs.wrong)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("own") / "pack")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "faulty_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("faulty_models", None)


def train(pack: Path, run_dir: Path, *words: object) -> int:
    return run([str(word) for word in ["train", "--model.name", "melu", "--pack", pack, "--run_dir", run_dir, *words]])


@pytest.mark.parametrize(
    ("name", "message", "own_line"),
    [
        ("Nothing", "faulty_models has no 'Nothing'", None),
        ("Raises", "Raises.forward fails at faulty_models.py", 'return embedded["nope"]'),
        ("WrongShape", "must return one logit an example", None),
        ("BatchNorm", "batch norm at 'norm'", None),
        ("OwnTables", "embedding table of its own at 'users'", None),
        ("OtherInputs", "cannot be called with (dense, embedded)", None),
        ("Centred", "Centred", None),
        ("NotMade", "could not be made: AttributeError", "self.layer = nn.Linear(inputs.embedding_dim, inputs.wrong)"),
    ],
)
def test_what_is_wrong_is_named(
    pack: Path,
    tmp_path: Path,
    models: None,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
    own_line: str | None,
) -> None:
    """The user's own traceback is shown where their code raised, and no other."""
    assert train(pack, tmp_path / "run", "--model.name", f"faulty_models:{name}") == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("gmeta train: error: ") == 1
    assert ("Traceback" in told) == (own_line is not None)
    assert own_line is None or own_line in told


@pytest.mark.parametrize(
    ("argument", "message"),
    [("hiden=8", "did you mean 'hidden'"), ("hidden=wide", "model.args.hidden is 'wide': faulty_models:Base takes a")],
)
def test_wrong_arguments_are_named(
    pack: Path, tmp_path: Path, models: None, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    words = ["--model.name", "faulty_models:Base", f"--model.args.{argument}"]
    assert train(pack, tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
