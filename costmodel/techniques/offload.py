"""Offload: a fraction of a layer's saved activations waits on the host between forward and
backward.

No operator changes and no tensor is divided: the layer's forward still makes, and its backward
still needs, all of what it saves. The fraction therefore acts on the ledger of the layer, on what
it keeps while other layers run (`costmodel/kept.py`). Every offloaded byte goes to the host once in
forward and comes back once in backward.
"""

from __future__ import annotations

from ...errors import InputError
from ..graph import Array


def check(fraction: float) -> None:
    """Raise InputError unless the fraction is one."""
    if not 0.0 <= fraction <= 1.0:
        raise InputError("offload.activations", fraction, "not a fraction of the saved activations",
                         "give 0 to 1")  # fmt: skip


def moved_bytes(saved_bytes: Array, fraction: float) -> Array:
    """Bytes that a layer moves to the host per micro-batch, and later back.

    `saved_bytes` is what it would keep without offload (`Liveness.saved`).
    """
    return saved_bytes * fraction
