"""Attention without fused kernels, for what is differentiated twice: these have one derivative."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

from torch.nn.attention import SDPBackend, sdpa_kernel

_lock = Lock()
_choice = ExitStack()
_inside = 0


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Have attention compute in parts, in this thread at least.

    torch keeps the choice for the whole process. Threads that each set it and put back what they found would leave it
    set for good where they overlap, so the first one to come sets it, and the last one to go puts it back.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _choice.enter_context(sdpa_kernel(SDPBackend.MATH))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _choice.close()
