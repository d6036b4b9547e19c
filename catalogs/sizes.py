"""A standard decoder for a parameter count: `7b`, `350m`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..errors import InputError
from ..model import Layer, Model

VOCAB = 32000
TOLERANCE = 0.03
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kmbt])", re.IGNORECASE)
_SCALE = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_count(text: str) -> float | None:
    """Parameters asked for, or None when the text is not a count.

    >>> parse_count("7b"), parse_count("350M"), parse_count("llama")
    (7000000000.0, 350000000.0, None)
    """
    match = _COUNT.fullmatch(text.strip())
    return None if match is None else float(match.group(1)) * _SCALE[match.group(2).lower()]


def standard_decoder(text: str) -> Model:
    """A Llama-style decoder within 3 % of a parameter count such as `7b`.

    Among all hidden sizes (multiples of 128) the one whose shape is closest to the family's habit
    wins: about 128 hidden units per layer from 1b on and 64 below, and sizes that many degrees
    divide. SwiGLU of 8/3 hidden rounded to 256, head size 128 (64 below 1b), eight key-value heads
    where they divide the heads, vocabulary 32000, untied. The same text gives the same model.
    """
    asked = parse_count(text)
    if asked is None or asked <= 0:
        raise InputError("model", text, "not a parameter count", "write 350m, 7b or 1.5b")
    shapes = sorted(_near(text, asked), key=lambda model: (_oddness(model, asked), model.hidden))
    if not shapes:
        raise InputError("model", text, f"no decoder with vocabulary {VOCAB} has about this size",
                         "ask for 10m to 10t, or use tiny-1m")  # fmt: skip
    return shapes[0]


def _near(text: str, asked: float) -> Iterator[Model]:
    for hidden in range(128, 65536 + 128, 128):
        per_layer = _layer(hidden, asked).num_params(hidden)
        fitting = round((asked - 2 * VOCAB * hidden) / per_layer)
        for layers in range(max(1, fitting - 3), fitting + 4):
            if not 8 <= hidden / layers <= 512:
                continue
            total = layers * per_layer + (2 * VOCAB + 1) * hidden
            if abs(total / asked - 1) <= TOLERANCE:
                yield _decoder(text, asked, hidden, layers)


def _layer(hidden: int, asked: float, repeat: int = 1) -> Layer:
    head_dim = 128 if asked >= 1e9 else 64
    heads = hidden // head_dim
    return Layer(
        repeat=repeat,
        heads=heads,
        kv_heads=8 if heads % 8 == 0 else heads,
        head_dim=head_dim,
        ffn_hidden=256 * max(1, round(8 / 3 * hidden / 256)),
    )


def _decoder(text: str, asked: float, hidden: int, layers: int) -> Model:
    return Model(
        name=f"standard-{text.strip().lower()}",
        hidden=hidden,
        vocab=VOCAB,
        layers=(_layer(hidden, asked, layers),),
        source=f"standard decoder of about {text.strip().lower()} parameters, made by forerun",
    )


def _oddness(model: Model, asked: float) -> float:
    """How far a shape is from the habit: aspect ratio, divisibility, distance from the count."""
    habit = 128 if asked >= 1e9 else 64
    aspect = abs(math.log2(model.hidden / model.num_layers / habit))
    heads, layers = model.layers[0].heads, model.num_layers
    uneven = 0.5 * ((heads % 8 != 0) + (heads % 4 != 0))
    uneven += 0.3 * ((layers % 4 != 0) + (layers % 2 != 0))
    return aspect + uneven + 5 * abs(model.num_params / asked - 1)
