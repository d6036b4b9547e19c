"""Replicas that train apart and meet every so many steps: what a plan's `local-sgd` settings mean.

R replicas (the mesh axis `dp_replicate`) take `period` optimiser steps each on their own data; then
what they learned is averaged, and an outer optimiser takes a step with it. With x the parameters of
the last meeting, y those of a replica now, and d = mean over replicas of (x - y), at a meeting

    average   x := mean of y
    diloco    v := momentum v + d;  x := x - lr (d + momentum v)             Nesterov
    co2       u := clamp(momentum u + d' / penalty, +-clip);  x := x - lr u   d' of the round before

and y := x. Fragments (groups of layers) meet in turn, period / fragments steps apart, so that a
link is never asked for the whole model at once. What is sent at step s is used at step s + delay,
and the steps between hide the transfer; then y := alpha y + (1 - alpha) x, which keeps a part of
what the replica learned meanwhile.

Sources: Douillard et al. 2023, DiLoCo (arXiv 2311.08105); Douillard et al. 2025, Streaming DiLoCo
(arXiv 2501.18512); Sun et al. 2024, CO2 (arXiv 2401.16265).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, Literal

import msgspec

from .document import Value
from .errors import InputError

Outer = Literal["average", "diloco", "co2"]
OUTERS: tuple[Outer, ...] = ("average", "diloco", "co2")
BITS = (4, 8, 32)

TECHNIQUE = "local-sgd"
RECORDS: dict[str, str] = {"average": "local-sgd", "diloco": "diloco", "co2": "co2"}
"""The catalog's record of the evidence for each kind of outer step."""

BLOCK = 256
"""Elements of a quantised buffer that share a scale."""
SCALE_BYTES = 4


class LocalSgd(Value, frozen=True, kw_only=True):
    """The settings, each None where it is left to the kind of outer step."""

    period: int
    """Inner steps between two meetings of a fragment."""
    outer: Outer = "diloco"
    fragments: int = 1
    delay: int | None = None
    """Inner steps from sending to use; co2: 0, or the whole period (None)."""
    bits: int = 32
    """Of a number on the wire; below 32 with a scale per `BLOCK`."""
    learning_rate: float | None = None
    """Of the outer step."""
    momentum: float | None = None
    alpha: float | None = None
    """What a replica keeps of its own steps during the delay."""
    penalty: float | None = None
    """co2: what a stale average is divided by; None = by its measured gap
    (`executors/local_sgd/outer.py`)."""
    clip: float = 1.0
    """co2: the largest magnitude of an element of the momentum."""

    @property
    def steps_late(self) -> int:
        """The delay that is meant."""
        if self.delay is None:
            return self.period if self.outer == "co2" else 0
        return self.delay

    @property
    def outer_rate(self) -> float:
        """Learning rate of the outer step; DiLoCo's is the paper's."""
        default = 0.7 if self.outer == "diloco" else 1.0
        return default if self.learning_rate is None else self.learning_rate

    @property
    def outer_momentum(self) -> float:
        """Momentum of the outer step: 0.9 in the paper of DiLoCo, 0.2 in CO2's own example."""
        default = {"average": 0.0, "diloco": 0.9, "co2": 0.2}[self.outer]
        return default if self.momentum is None else self.momentum

    @property
    def mixing(self) -> float:
        """The alpha that is meant: half of the steps during a delay are kept (assumed)."""
        if self.alpha is not None:
            return self.alpha
        return 0.5 if self.outer == "diloco" and self.steps_late else 0.0

    @property
    def keeps_outer(self) -> bool:
        """Whether parameters of the last meeting and momentum are kept; averaging has neither."""
        return self.outer != "average"

    def starts(self, fragment: int) -> int:
        """The step, 1 to period, after which a fragment is sent; the last one at the period's end.

        >>> LocalSgd(period=6, fragments=3).starts(0), LocalSgd(period=6, fragments=3).starts(2)
        (2, 6)
        """
        return (fragment + 1) * self.period // self.fragments

    @property
    def half_way(self) -> int:
        """Inner steps after which a quantised exchange goes on from its first half, the all-to-all
        of parts, to its second, the all-gather of their sums."""
        return (self.steps_late + 1) // 2

    def settings(self) -> dict[str, Any]:
        """What a plan holds of it: all that is not the default."""
        plain = LocalSgd(period=self.period)
        found: dict[str, Any] = {"period": self.period, "outer": self.outer}
        for name in self.__struct_fields__:
            if name not in found and getattr(self, name) != getattr(plain, name):
                found[name] = getattr(self, name)
        return found

    @staticmethod
    def of(settings: Mapping[str, Any]) -> LocalSgd | None:
        """The settings of a plan's technique; None where there are none."""
        if not settings:
            return None
        try:
            return msgspec.convert(dict(settings), LocalSgd)
        except msgspec.ValidationError as error:
            raise InputError("local-sgd", dict(settings), " ".join(str(error).split()),
                             "see forerun catalog techniques local-sgd") from error  # fmt: skip

    @property
    def label(self) -> str:
        """In short: `diloco50x4-d5-4bit`; a hash stands for an outer optimiser of one's own."""
        parts = [f"{RECORDS[self.outer]}-{self.period}"]
        parts[0] += f"x{self.fragments}" if self.fragments > 1 else ""
        if self.delay is not None and (self.delay > 0 or self.outer == "co2"):
            parts.append(f"d{self.delay}")
        parts += [f"{self.bits}bit"] if self.bits != 32 else []
        own = (self.learning_rate, self.momentum, self.alpha, self.penalty, self.clip)
        if own != (None, None, None, None, 1.0):
            parts.append(f"own~{sha256(msgspec.json.encode(own)).hexdigest()[:4]}")
        return "-".join(parts)

    def problems(self, num_layers: int) -> Iterator[InputError]:
        """Every rule that the settings break by themselves."""
        yield from self._wrong_numbers(num_layers)
        if self.outer not in OUTERS:
            yield _refuse("outer", self.outer, "unknown outer step", f"use {', '.join(OUTERS)}")
            return
        if self.bits not in BITS:
            yield _refuse("bits", self.bits, "no width that can be sent", "use 4, 8 or 32")
        elif self.bits != 32 and self.outer != "diloco":
            yield _refuse("bits", self.bits, f"{self.outer} sends fp32",
                          "use diloco, or bits 32")  # fmt: skip
        yield from self._wrong_kind()

    def _wrong_numbers(self, num_layers: int) -> Iterator[InputError]:
        if self.period < 1:
            yield _refuse("period", self.period, "not positive", "give 1 or more inner steps")
            return
        if self.fragments < 1 or self.fragments > num_layers:
            yield _refuse("fragments", self.fragments,
                          f"are groups of the {num_layers} layers",
                          f"give 1 to {num_layers}")  # fmt: skip
        elif self.period % self.fragments:
            yield _refuse("fragments", self.fragments, f"do not divide period={self.period}",
                          "give a divisor, so that they meet evenly spaced")  # fmt: skip
        for name, value, low, high in (
            ("learning_rate", self.outer_rate, 0.0, float("inf")),
            ("momentum", self.outer_momentum, 0.0, 1.0),
            ("alpha", self.mixing, 0.0, 1.0),
            ("penalty", self.penalty or 1.0, 0.0, float("inf")),
            ("clip", self.clip, 0.0, float("inf")),
        ):
            if not low <= value <= high:
                yield _refuse(name, value, "out of range", f"give {low:g} to {high:g}")

    def _wrong_kind(self) -> Iterator[InputError]:
        """What one kind of outer step has and another has not."""
        late, apart = self.steps_late, self.period // max(1, self.fragments)
        if self.outer == "average" and late:
            yield _refuse("delay", late, "an average of parameters is used at once",
                          "use diloco or co2, or delay 0")  # fmt: skip
        if self.outer == "diloco" and not 0 <= late < max(apart, 1):
            yield _refuse("delay", late, f"the next fragment is sent after {apart} steps",
                          f"give 0 to {apart - 1}, a longer period or fewer fragments")  # fmt: skip
        if self.outer == "co2" and late not in (0, self.period):
            yield _refuse("delay", late, "co2 uses an average at once or a whole round late",
                          f"give 0 or {self.period}, or leave it out")  # fmt: skip
        if self.outer == "co2" and self.fragments > 1:
            yield _refuse("fragments", self.fragments, "co2 sends the whole model at once",
                          "use 1, or diloco")  # fmt: skip
        given = {"learning_rate": self.learning_rate, "momentum": self.momentum}
        for name, value in given.items():
            if self.outer == "average" and value is not None:
                yield _refuse(name, value, "averaging has no outer optimiser", "leave it out")
        if self.outer != "diloco" and self.alpha is not None:
            yield _refuse("alpha", self.alpha, f"{self.outer} starts every round from the average",
                          "leave it out")  # fmt: skip
        if self.outer != "co2" and self.penalty is not None:
            yield _refuse("penalty", self.penalty, f"{self.outer} has none", "leave it out")


def _refuse(name: str, value: object, problem: str, remedy: str) -> InputError:
    return InputError(f"local-sgd.{name}", value, problem, remedy)


def fragment_of(layer: int, fragments: int) -> int:
    """The fragment that a layer meets with: strided, so that early and late layers mix.

    >>> [fragment_of(layer, 2) for layer in range(4)]
    [0, 1, 0, 1]
    """
    return layer % fragments


ENDS_FRAGMENT = -1
"""Embedding, final norm and head meet with the last fragment."""


def message_bytes(elements: int, ranks: int, bits: int) -> int:
    """Bytes of a quantised buffer of `elements` numbers that `ranks` ranks exchange by parts.

    Each rank's part is rounded up to whole blocks; a block has a code per element and a scale.

    >>> message_bytes(1000, 2, 4)
    528
    """
    blocks = -(-elements // (ranks * BLOCK)) * ranks
    return blocks * (BLOCK * bits // 8 + SCALE_BYTES)
