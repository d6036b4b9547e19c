"""Each layer kind as a graph of operators: the counterpart of `executors/decoder.py`."""

from __future__ import annotations

from .decoder import decoder_layer
from .ends import embedding, head
from .parts import PART, TOKENS, boundary_op, elementwise, enter, leave, linear, norm, part, whole

__all__ = [
    "PART",
    "TOKENS",
    "boundary_op",
    "decoder_layer",
    "elementwise",
    "embedding",
    "enter",
    "head",
    "leave",
    "linear",
    "norm",
    "part",
    "whole",
]
