"""A text encoder from a local folder, split at a layer: `low` is frozen, unless a model trains it; `high` is trained.

`low` turns the tokens of one short text into states, `pooled` these into vectors, and `high` reads a *sequence* of such
vectors (BAHE: Geng et al., 2403.19347). Layers are called one by one, since a whole model would add positions, types
and an embedding norm to the vectors a second time.

Any architecture of `transformers` will do whose parts, called in order, compute what the whole model computes; that
is tried out on a few tokens when a folder is opened.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmeta.core.errors import require
from gmeta.text.folder import TextTokenizer, digest_of, require_encoder, require_sound_weights

TextPooling = Literal["mean", "last", "cls"]
POOLINGS: tuple[TextPooling, ...] = ("mean", "last", "cls")
MAX_VECTORS = 4

_PROBE_LENGTHS = (16, 11)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""What the parts may differ from the whole, of the largest state: both add up the same numbers, in another order."""
_LAYERS = ("layers", "encoder.layer", "transformer.layer", "h")
_OF_LAYER = re.compile(r"\b(layers?|h)\.\d+\.")
_NORMS = ("norm", "final_norm", "final_layer_norm", "ln_f")


class LayerStack(nn.Module):
    """Consecutive layers, with the rotary positions and the final norm where the architecture has them."""

    def __init__(self, layers: Sequence[nn.Module], rotary: nn.Module | None, norm: nn.Module | None, span: Span):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rotary = rotary
        self.norm = norm
        self.span = span

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run the layers: states [n, M, d] and the mask bool [n, M] of those that count -> [n, M, d].

        Positions are 0 … M-1. States that do not count are neither looked at nor kept: they become zeros, and so does
        a row without any. Raises ValueError where M is beyond what the architecture can look at.
        """
        length = x.shape[1]
        self.span.require(length)
        if not len(x):  # heads are cut by a view that has no answer for nothing
            return x
        arguments: dict[str, Any] = {"attention_mask": _attention_mask(mask, causal=self.span.causal)}
        if self.rotary is not None:
            positions = torch.arange(length, device=x.device)[None]
            arguments["position_ids"] = positions
            arguments["position_embeddings"] = self.rotary(x, positions)
        for layer in self.layers:
            found = layer(x, **arguments)
            # transformers 4 returns a tuple; indexing the tensor of transformers 5 would drop the batch.
            x = found[0] if isinstance(found, tuple) else found
        if self.norm is not None:
            x = self.norm(x)
        return x.masked_fill(~mask[..., None], 0.0)


@dataclass(frozen=True)
class Span:
    """How far layers look: whether only back, and over how many positions at most (None: any number)."""

    causal: bool
    window: int | None

    def require(self, length: int) -> None:
        """Raise ValueError where `length` positions are more than the layers look at."""
        if self.window is not None and length > self.window:
            raise ValueError(f"a sequence has {length} positions: this encoder looks at {self.window}; cut it")


def _attention_mask(mask: Tensor, *, causal: bool) -> Tensor:
    """Return which positions each position looks at, bool [n, 1, M, M], or [n, 1, 1, M] where it is the same for all.

    A position that could look at nothing looks at itself: a softmax over nothing is not a number, and zero times that
    is none either.
    """
    if not causal:
        alone = ~mask.any(-1, keepdim=True)
        return (mask | alone)[:, None, None, :]
    length = mask.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    back = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return ((mask[:, None, :] & back) | itself)[:, None]


class LowLayers(nn.Module):
    """The embeddings and the first layers of an encoder. They stay in evaluation mode, and begin frozen."""

    def __init__(self, embed: nn.ModuleList, stack: LayerStack, positions: int | None) -> None:
        super().__init__()
        self.embed = embed
        self.stack = stack
        self.positions = positions
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LowLayers:
        """Stay in evaluation mode: without dropout each text has one vector."""
        return super().train(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states of tokens: ids int64 [n, K] and mask bool [n, K] -> [n, K, d], zeros where masked.

        Tokens come first in each row. Raises ValueError for more tokens than the encoder has positions.
        """
        if self.positions is not None and ids.shape[1] > self.positions:
            raise ValueError(f"a text has {ids.shape[1]} tokens: this encoder has {self.positions} positions; cut it")
        x: Tensor = self.embed[0](ids)
        for part in self.embed[1:]:
            x = part(x)
        found: Tensor = self.stack(x, mask)
        return found


class TextEncoder(nn.Module):
    """An encoder split in two, `low` and `high`, with its tokenizer. `open_encoder` makes one.

    `digest` stands for its weights, config and tokenizer; `name` is that of its folder; `dim` is the width d of a
    state; `layers` the number k of layers in `low`, of `num_layers`; `max_tokens` the most tokens of a text.
    """

    def __init__(self, low: LowLayers, high: LayerStack, tokenizer: TextTokenizer, about: EncoderFacts) -> None:
        super().__init__()
        self.low = low
        self.high = high
        self.tokenizer = tokenizer
        self.digest = about.digest
        self.name = about.name
        self.dim = about.dim
        self.layers = about.layers
        self.num_layers = about.num_layers
        self.max_tokens = about.max_tokens

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states of the whole encoder: int64 [n, K], bool [n, K] -> [n, K, d]. What is not split is this."""
        found: Tensor = self.high(self.low(ids, mask), mask)
        return found

    def pooled(self, states: Tensor, mask: Tensor, pooling: TextPooling = "mean", vectors: int = 1) -> Tensor:
        """Return `vectors` vectors a text, [n, vectors, d], as `pool_states` explains."""
        return pool_states(states, mask, pooling, vectors)

    def batch(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the ids int64 [n, K] and the mask bool [n, K] of texts of up to K tokens, on the encoder's device."""
        width = max(1, max(map(len, tokens), default=1))
        ids = torch.full((len(tokens), width), self.tokenizer.pad, dtype=torch.int64)
        lengths = torch.tensor([len(text) for text in tokens], dtype=torch.int64)
        mask = torch.arange(width)[None] < lengths[:, None]
        ids[mask] = torch.tensor([token for text in tokens for token in text], dtype=torch.int64)
        device = next(self.parameters()).device
        return ids.to(device), mask.to(device)


def pool_states(states: Tensor, mask: Tensor, pooling: TextPooling = "mean", vectors: int = 1) -> Tensor:
    """Return `vectors` vectors a text: states [n, K, d] and mask bool [n, K] -> [n, vectors, d].

    `mean` is over the tokens that count, `last` and `cls` are the last and the first of these. With several vectors
    these are pooled from equal segments of the text; a segment of a text shorter than that, and a text without
    tokens, give zeros. Raises ValueError for another pooling or number of vectors.
    """
    require(pooling in POOLINGS, "pooling", pooling, f"must be one of {', '.join(POOLINGS)}")
    require(1 <= vectors <= MAX_VECTORS, "vectors", vectors, f"must be in [1, {MAX_VECTORS}]")
    rank = mask.cumsum(-1) - 1  # of a token among those that count
    length = mask.sum(-1, keepdim=True)
    segment = torch.div(rank * vectors, length.clamp(min=1), rounding_mode="floor")
    inside = mask[:, None] & (segment[:, None] == torch.arange(vectors, device=mask.device)[None, :, None])
    if pooling != "mean":
        order = rank[:, None].masked_fill(~inside, -1 if pooling == "last" else mask.shape[1])
        best = order.argmax(-1, keepdim=True) if pooling == "last" else order.argmin(-1, keepdim=True)
        inside = inside & torch.zeros_like(inside).scatter(-1, best, True)
    wide = torch.promote_types(states.dtype, torch.float32)  # a weight of 1/n has two digits in bf16
    weights = inside.to(wide) / inside.sum(-1, keepdim=True).clamp(min=1)
    return (weights @ states.to(wide)).to(states.dtype)


@dataclass(frozen=True)
class EncoderFacts:
    """What an encoder is told of itself; `TextEncoder` explains the fields."""

    digest: str
    name: str
    dim: int
    layers: int
    num_layers: int
    max_tokens: int


def open_encoder(
    folder: str | Path,
    layers: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    max_tokens: int | None = None,
) -> TextEncoder:
    """Open an encoder of `transformers` in a local folder, and split it after its first `layers` layers; 0 leaves the
    embeddings of tokens alone below the split.

    It is in evaluation mode; `high.train()` turns dropout on. `max_tokens` bounds the tokens of a text; None takes all
    positions that the encoder has. Raises ValueError where the folder holds no encoder that can be split, where it
    would run code, where weights are missing or the tokenizer is another's, and for `layers` or `max_tokens` out of
    range.
    """
    require(bool(str(folder)), "encoder", folder, "name the folder of a text encoder")
    path = Path(folder)
    require_encoder(path)
    require(type(layers) is int, "layers", layers, "must be a whole number")
    require(dtype in _TOLERANCE, "dtype", dtype, "must be float32, bfloat16 or float64")
    model, _ = load_model(path, dtype)
    config = model.config
    parts = _Parts(model, path)
    total = len(parts.layers)
    require(0 <= layers < total, "layers", layers, f"{path} has {total}: must be in [0, {total - 1}]")
    tokenizer = TextTokenizer(path, getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None))
    if tokenizer.vocabulary > parts.vocabulary:
        raise ValueError(
            f"encoder {path} has {parts.vocabulary} token embeddings, its tokenizer.json {tokenizer.vocabulary} "
            "tokens: it is the tokenizer of another encoder; put the own one there"
        )
    positions = _positions(model, config)
    window = getattr(config, "sliding_window", None)
    bounds = [bound for bound in (positions, window) if bound is not None]
    most = min(bounds) if bounds else 512
    require(max_tokens is None or 1 <= max_tokens <= most, "max_tokens", max_tokens, f"must be in [1, {most}]")
    encoder = parts.split(layers, _causal(model, config), window, positions)
    facts = EncoderFacts(
        digest_of(path), path.resolve().name, int(config.hidden_size), layers, total, max_tokens or most
    )
    made = TextEncoder(*encoder, tokenizer, facts)
    _try_out(made, model, path, parts.vocabulary, dtype)
    return made.to(device)


class _Parts:
    """The parts of a model, found by the names that `transformers` gives them. ValueError where there are none."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.layers = next((found for name in _LAYERS if (found := _child(model, name)) is not None), None) or []
        self.norm = next((found for name in _NORMS if (found := _child(model, name)) is not None), None)
        self.rotary = _child(model, "rotary_emb")
        own = (_child(model, "embeddings"), _child(model, "embeddings_project"), _child(model, "embed_tokens"))
        self.embed = [part for part in own if part is not None]
        if not self.layers or not self.embed:
            raise ValueError(_unknown(folder, model, "has no embeddings and layers under names that are known"))
        words = model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(words.num_embeddings)

    def split(
        self, layers: int, causal: bool, window: int | None, positions: int | None
    ) -> tuple[LowLayers, LayerStack]:
        """Return both halves; they share nothing, so that either can be moved and trained alone."""
        span = Span(causal, window)
        low = LayerStack(self.layers[:layers], self.rotary, None, span)
        high = LayerStack(self.layers[layers:], copy.deepcopy(self.rotary), self.norm, span)
        return LowLayers(nn.ModuleList(self.embed), low, positions), high


def _child(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _causal(model: nn.Module, config: Any) -> bool:
    """Return whether a token sees only those before it: so in decoders, which embed tokens without more."""
    return bool(getattr(config, "is_decoder", False)) or _child(model, "embed_tokens") is not None


def _positions(model: nn.Module, config: Any) -> int | None:
    """Return the most tokens that a model has positions for. RoBERTa keeps those up to the padding id for itself."""
    most = getattr(config, "max_position_embeddings", None)
    absolute = _child(model, "embeddings.position_embeddings")
    if most is not None and isinstance(absolute, nn.Embedding) and absolute.padding_idx is not None:
        most -= absolute.padding_idx + 1
    return most


def _unknown(folder: Path, model: nn.Module, why: str) -> str:
    return (
        f"encoder {folder} is a {type(model).__name__}, which {why}: it cannot be split; take one like BERT, RoBERTa, "
        "DistilBERT, Llama, Mistral or Qwen"
    )


@torch.no_grad()
def _try_out(encoder: TextEncoder, model: nn.Module, folder: Path, vocabulary: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless both halves, one after the other, compute what the whole model does."""
    longest = min(_PROBE_LENGTHS[0], encoder.max_tokens)
    lengths = [min(length, longest) for length in _PROBE_LENGTHS]
    pad = encoder.tokenizer.pad
    stride = vocabulary // (2 * longest) + 1
    usable = [token for token in range(0, vocabulary, stride) if token != pad] or [0]
    ids, mask = encoder.batch([[usable[(row + at) % len(usable)] for at in range(n)] for row, n in enumerate(lengths)])
    try:
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        found = encoder(ids, mask)
    except Exception as error:  # a signature that the layers lack, a part that has other arguments: all say the same
        raise ValueError(_unknown(folder, model, f"does not run in parts ({type(error).__name__}: {error})")) from None
    if not bool(expected[mask].isfinite().all()):
        raise ValueError(f"encoder {folder} gives numbers that are not finite: its weights are broken; restore them")
    scale = expected[mask].abs().max().clamp(min=1e-6)
    gap = float((found - expected)[mask].abs().max() / scale)
    if not gap <= _TOLERANCE[dtype]:
        raise ValueError(_unknown(folder, model, f"computes something else than its parts (by {gap:.1g})"))


def load_model(folder: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """Load the base model of a folder, without its heads; return it with the weights of its pooler that are missing.
    Raises ValueError where it cannot be loaded, or other weights are missing.
    """
    try:
        from transformers import AutoModel
    except ModuleNotFoundError:
        raise ValueError("encoders need the package transformers: pip install 'gmeta[text]'") from None
    with _silence():
        try:
            model, told = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises of all classes for what a folder lacks
            require_sound_weights(folder)
            reason = textwrap.shorten(str(error), 300, placeholder=" …")
            raise ValueError(f"encoder {folder} cannot be opened by transformers ({reason}): name another") from error
    missing = sorted(key for key in told["missing_keys"] if not key.startswith("pooler."))
    if missing or told["mismatched_keys"]:
        which = missing or sorted(str(key) for key in told["mismatched_keys"])
        raise ValueError(
            f"encoder {folder} lacks weights, or has them in another shape ({which[0]}, {len(which)} in all): "
            "its config is not that of its weights; restore both"
        )
    if more := sorted(key for key in told["unexpected_keys"] if _OF_LAYER.search(key)):
        raise ValueError(
            f"encoder {folder} has weights of layers that its config does not name ({more[0]}, {len(more)} in all): "
            "restore config.json"
        )
    return model.eval(), sorted(told["missing_keys"])


@contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers from drawing a bar and a table while it loads; what matters of these is checked."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
