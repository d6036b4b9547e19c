"""The value of --offload: what waits off the device, how much of it, and where."""

from __future__ import annotations

from typing import Any

from ..choices import OFFLOAD_RESTS, OFFLOAD_STATES, TIERS
from ..errors import InputError, unknown_name

FORM = "write 0.5, activations=0.5,rest=recompute,tier=disk or optimizer"
CHOICES = {"rest": OFFLOAD_RESTS, "tier": TIERS}


def parse_offload(text: str | None) -> dict[str, Any]:
    """The pins that a value of --offload stands for.

    >>> parse_offload("0.25")
    {'offload': 0.25}
    >>> parse_offload("activations=0.5,rest=recompute,optimizer")
    {'offload': 0.5, 'offload_rest': 'recompute', 'offload_states': 'optimizer'}
    """
    if text is None:
        return {}
    found: dict[str, Any] = {}
    for word in text.replace(" ", "").split(","):
        name, has_value, value = word.partition("=")
        if name in OFFLOAD_STATES and not has_value:
            found["offload_states"] = name
        elif name in CHOICES:
            if value not in CHOICES[name]:
                raise InputError(f"offload.{name}", value, "not a choice",
                                 f"use {' or '.join(CHOICES[name])}")  # fmt: skip
            found[f"offload_{name}"] = value
        elif name == "activations":
            found["offload"] = _fraction(value) if has_value else 1.0
        elif word[:1].isdigit() or word[:1] in ".-":
            found["offload"] = _fraction(word)
        else:
            raise unknown_name("offload", name, [*OFFLOAD_STATES, *CHOICES, "activations"])
    if "offload" not in found and found.get("offload_rest") == "recompute":
        raise InputError("offload", text, "rest=recompute needs a fraction of tokens to move", FORM)
    return found


def _fraction(text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        raise InputError("offload.activations", text, "not a number", FORM) from None
    if not 0.0 <= fraction <= 1.0:
        raise InputError("offload.activations", text, "not a fraction", "give 0 to 1")
    return fraction
