"""A standard decoder for a parameter count: `7b`, `350m`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import InputError
from ..model import Layer, Model

VOCAB = 32000
TOLERANCE = 0.03
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmbt])", re.IGNORECASE)
_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


class _Shape(NamedTuple):
    """Sizes of a candidate and how far they are from the habit of the family."""

    oddness: float
    hidden: int
    layers: int
    ffn_hidden: int


def parse_count(text: str) -> float | None:
    """Parameters asked for, or None when the text is not a count.

    >>> parse_count("7b"), parse_count("350M"), parse_count("llama")
    (7000000000.0, 350000000.0, None)
    """
    match = _COUNT.fullmatch(text.strip())
    return None if match is None else float(match.group(1)) * _SCALE[match.group(2).lower()]


def standard_decoder(text: str) -> Model:
    """A Llama-style decoder within 3 % of a parameter count such as `7b`.

    Hidden size a multiple of 128, head size 128 (64 below 1b), eight key-value heads where they
    divide the heads, SwiGLU about 8/3 as wide as the hidden size, vocabulary 32000, untied. Among
    all such shapes the least odd one wins: about 128 hidden units per layer from 1b on and 64
    below, and counts of heads and layers that many degrees divide. The same text gives the same
    model.
    """
    asked = parse_count(text)
    if asked is None or asked <= 0:
        raise InputError("model", text, "not a parameter count", "write 350m, 7b or 1.5b")
    shape = min(_shapes(asked), default=None)
    if shape is None:
        raise InputError("model", text, f"no decoder with vocabulary {VOCAB} has about this size",
                         "ask for 20m to 10t, or use tiny-1m")  # fmt: skip
    return Model(
        name=f"standard-{text.strip().lower()}",
        hidden=shape.hidden,
        vocab=VOCAB,
        layers=(_layer(asked, shape.hidden, shape.ffn_hidden, shape.layers),),
        source=f"standard decoder of about {text.strip().lower()} parameters, made by forerun",
    )


def _layer(asked: float, hidden: int, ffn_hidden: int, repeat: int = 1) -> Layer:
    head_dim = 128 if asked >= 1e9 else 64
    heads = hidden // head_dim
    return Layer(
        repeat=repeat,
        heads=heads,
        kv_heads=8 if heads % 8 == 0 else heads,
        head_dim=head_dim,
        ffn_hidden=ffn_hidden,
    )


def _shapes(asked: float) -> Iterator[_Shape]:
    """Every shape whose count is within the tolerance; the MLP's width takes up what is left."""
    for hidden in range(128, 65536 + 128, 128):
        outside = (2 * VOCAB + 1) * hidden  # embedding, head, final norm
        step = 256 if hidden >= 1024 else 64
        attention = _layer(asked, hidden, step).attention_params(hidden) + 2 * hidden
        usual = 8 / 3 * hidden
        fewest = (asked - outside) / (attention + 3 * hidden * 1.3 * usual)
        most = (asked - outside) / (attention + 3 * hidden * 0.8 * usual)
        first, last = max(1, fewest, hidden / 512), min(most, hidden / 8)
        for layers in range(math.floor(first), math.floor(last) + 1):
            width = ((asked - outside) / layers - attention) / (3 * hidden)
            ffn_hidden = step * max(1, round(width / step))
            total = outside + layers * (attention + 3 * hidden * ffn_hidden)
            if ffn_hidden <= 1.3 * usual and abs(total / asked - 1) <= TOLERANCE:
                yield _Shape(
                    _oddness(asked, hidden, layers, ffn_hidden), hidden, layers, ffn_hidden
                )


def _oddness(asked: float, hidden: int, layers: int, ffn_hidden: int) -> float:
    """Distance from the habit: aspect ratio, width of the MLP, divisibility."""
    habit, head_dim = (128, 128) if asked >= 1e9 else (64, 64)
    aspect = abs(math.log2(hidden / layers / habit))
    width = abs(math.log2(ffn_hidden / (8 / 3 * hidden)))
    heads = hidden // head_dim
    uneven = 0.5 * ((heads % 8 != 0) + (heads % 4 != 0))
    uneven += 0.3 * ((layers % 4 != 0) + (layers % 2 != 0))
    return aspect + 2 * width + uneven
