"""The value of --lora: the rank of adapters, where they are, and how the rest is stored."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, unknown_name

FORM = "write RANK[,targets=all|qkv|qv][,base=nf4|gptq4_g128]: 16, or 16,base=nf4"


def parse_lora(text: str | None) -> dict[str, Any]:
    """The pins that a value of --lora stands for.

    >>> parse_lora("16,base=nf4")
    {'lora': 16, 'lora_base': 'nf4'}
    >>> parse_lora("rank=8,targets=qv")
    {'lora': 8, 'lora_targets': 'qv'}
    """
    found: dict[str, Any] = {}
    for word in (text or "").split(",") if text is not None else ():
        name, has_value, value = word.strip().partition("=")
        if not has_value:
            name, value = "rank", name
        if name == "rank":
            found["lora"] = _rank(value)
        elif name in ("targets", "base"):
            found[f"lora_{name}"] = value
        else:
            raise unknown_name("lora", name, ["rank", "targets", "base"])
    if text is not None and "lora" not in found:
        raise InputError("lora", text, "has no rank", FORM)
    return found


def _rank(value: str) -> int:
    try:
        rank = int(value)
    except ValueError:
        raise InputError("lora.rank", value, "not a whole number", FORM) from None
    if rank < 1:
        raise InputError("lora.rank", rank, "not positive", FORM)
    return rank
