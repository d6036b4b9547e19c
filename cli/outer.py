"""The values of --local-sgd and --outer: how replicas that train apart meet."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, unknown_name
from ..local_sgd import OUTERS, LocalSgd

FORM = "write diloco, co2 or average, then settings: diloco,fragments=4,delay=2,bits=4"
WHOLE = ("fragments", "delay", "bits")
REAL = ("learning_rate", "momentum", "alpha", "penalty", "clip")


def parse_outer(period: int | None, text: str | None) -> LocalSgd | None:
    """The settings that --local-sgd PERIOD and --outer stand for; None without them.

    >>> parse_outer(50, "diloco,fragments=2,bits=4")
    LocalSgd(period=50, outer='diloco', fragments=2, delay=None, bits=4, learning_rate=None, \
momentum=None, alpha=None, penalty=None, clip=1.0)
    """
    if period is None:
        if text is not None:
            raise InputError("outer", text, "replicas do not train apart",
                             "add --local-sgd and the steps between meetings")  # fmt: skip
        return None
    found: dict[str, Any] = {}
    for word in (text or OUTERS[1]).replace(" ", "").split(","):
        name, has_value, value = word.partition("=")
        if name in OUTERS and not has_value:
            found["outer"] = name
        elif name in (*WHOLE, *REAL) and has_value:
            found[name] = _number(name, value)
        else:
            raise unknown_name("outer", name, [*OUTERS, *WHOLE, *REAL])
    return LocalSgd(period=period, **found)


def _number(name: str, text: str) -> float:
    try:
        return int(text) if name in WHOLE else float(text)
    except ValueError:
        kind = "whole number" if name in WHOLE else "number"
        raise InputError(f"outer.{name}", text, f"not a {kind}", FORM) from None
