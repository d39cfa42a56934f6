"""What of an encoder's upper layers is trained, and which way they look."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from gmeta.text.encoder import LayerStack
from gmeta.text.lora import add_lora

Tune = Literal["full", "lora", "norms", "none"]
Direction = Literal["own", "causal", "both"]


def tuned(high: LayerStack, tune: Tune, rank: int, direction: Direction = "own") -> LayerStack:
    """Freeze what `tune` does not name, and set the direction: the encoder's own, causal, or both ways.

    `lora` trains adapters of `rank`. The layers are in evaluation mode: their dropout would not be seeded by example.
    """
    if direction != "own":
        high.span = replace(high.span, causal=direction == "causal")
    if tune == "lora":
        add_lora(high, rank)
    elif tune != "full":
        high.requires_grad_(False)
        for module in high.modules():
            if tune == "norms" and "norm" in type(module).__name__.lower():
                module.requires_grad_(True)
    return high.eval()
