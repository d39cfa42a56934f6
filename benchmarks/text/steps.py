"""A training step of BAHE beside its twins: CPU and wall seconds, and the memory above the model's own.

Each case runs in a process of its own on one thread, where the variants take turns. Memory is the high-water mark of
the resident set during the steps, less what was resident with the model and its optimizer made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import status

BATCH = 16
VARIANTS = ("behaviours", "batch", "tokens")
HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class StepCase:
    """One split of the encoder and one length of histories; N histories of each user."""

    encoder: str
    layers: int
    titles: int
    histories: int = 1
    repetitions: int = 3

    @property
    def name(self) -> str:
        """Return what records call the case, such as 3/3 M=10."""
        return f"{self.layers}/{6 - self.layers} M={self.titles}" + (
            f" N={self.histories}" if self.histories > 1 else ""
        )


def measure(
    case: StepCase, texts: list[list[str]], variants: Sequence[str] = VARIANTS, *, memory: bool = True
) -> dict[str, dict[str, float]]:
    """Return variant -> cpu_s, wall_s and peak_mb of a step on these histories, which end with the target's title.

    Times come from one new process, and each variant's `memory` from one of its own.
    """
    ask = {"case": asdict(case), "texts": texts}
    found = _apart({**ask, "variants": list(variants), "memory": False})
    for variant in variants if memory else ():
        found[variant] |= _apart({**ask, "variants": [variant], "memory": True})[variant]
    return found


def _apart(ask: dict[str, Any]) -> dict[str, dict[str, float]]:
    words = [sys.executable, "-m", "text.steps"]
    done = subprocess.run(words, cwd=HERE, input=json.dumps(ask), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a step failed:\n{done.stderr}")
    answer: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(ask: dict[str, Any]) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    case = StepCase(**ask["case"])
    steps = {name: _step(case, name, ask["texts"]) for name in ask["variants"]}
    if ask["memory"]:
        ((name, step),) = steps.items()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        step()
        step()
        return {name: {"peak_mb": (status("VmHWM") - before) / 2**20}}
    for step in steps.values():
        step()
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(case.repetitions):
        for name, step in steps.items():
            short = name == "behaviours" and case.titles * case.histories <= 100
            for _ in range(5 if short else 1):  # so that each takes long enough to tell
                begun = time.process_time(), time.perf_counter()
                step()
                cpu[name].append(time.process_time() - begun[0])
                wall[name].append(time.perf_counter() - begun[1])
    return {name: {"cpu_s": float(np.median(cpu[name])), "wall_s": float(np.median(wall[name]))} for name in steps}


def _step(case: StepCase, encode: str, texts: list[list[str]]) -> Callable[[], None]:
    from gmeta.core.batch import text_ids_of
    from gmeta.models.inputs import InputSpec
    from gmeta.text.bahe import BAHE

    known = ["", *dict.fromkeys(text for row in texts for text in row)]
    place = {text: i for i, text in enumerate(known)}
    names = [f"history{n}" for n in range(case.histories)]
    every = ["title", *names]
    inputs = InputSpec(
        {"title": 8},
        (),
        0.0,
        sequences=dict.fromkeys(names, 8),
        tables=dict.fromkeys(every, "title"),
        texts=dict.fromkeys(every, len(known)),
        text_tables={"title": known},
    )
    torch.manual_seed(0)
    model = BAHE(inputs, encoder=case.encoder, layers=case.layers, encode=encode, max_tokens=32)
    if encode == "tokens":
        _repeat_positions(model.source.encoder.low)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.tensor([[place[text] for text in row] for row in texts])
    embedded = {text_ids_of("title"): ids[:, -1:]}
    embedded |= {text_ids_of(name): ids[:, n * case.titles : (n + 1) * case.titles] for n, name in enumerate(names)}
    dense, label = torch.zeros(len(ids), 0), (torch.arange(len(ids)) % 2).float()

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(dense, embedded), label).backward()
        optimizer.step()

    return step


def _repeat_positions(low: Any) -> None:
    """Let a BERT-like encoder read more tokens than it has positions, from the first one again: good for time alone."""
    embed, most = low.embed[0], low.positions
    low.positions = None
    plain = embed.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        place = (torch.arange(ids.shape[1]) % most).unsqueeze(0)
        out: torch.Tensor = plain(input_ids=ids, position_ids=place)
        return out

    embed.forward = forward


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.stdin.read()))))
