"""Operator groups, their options, and what is asked of a choice among them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ...errors import InputError, unknown_name
from ...workload import Quality
from ..csv_rows import amount, check_header, read_rows

COLUMNS = ("group", "option", "time_s", "memory_bytes", "error")
TOLERANCE = 1e-9
"""Share by which a sum may exceed its limit: what adding decimal fractions in binary costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to compute and store an operator group."""

    group: str
    name: str
    time_s: float
    memory_bytes: float
    error: float
    """Contribution to the error, in the unit of the budget."""
    quality: Quality | None = None
    """Evidence class of the option; None = not stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the sums over all groups may not exceed."""

    error: float
    memory_bytes: float | None = None
    """None = no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The objective: time_s + memory_bytes in the proportion of the two weights."""

    time: float = 1.0
    memory: float = 0.0

    def cost(self, option: Option) -> float:
        """The option's share of the objective."""
        return self.time * option.time_s + self.memory * option.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the chosen options."""

    time_s: float
    memory_bytes: float
    error: float

    def objective(self, weights: Weights) -> float:
        """The weighted sum of time and memory."""
        return weights.time * self.time_s + weights.memory * self.memory_bytes


Groups = Mapping[str, Sequence[Option]]


def read_options(path: str | Path) -> tuple[Option, ...]:
    """The options of a CSV file with the columns `group,option,time_s,memory_bytes,error`.

    A column `quality` may follow. Raises InputError naming the row and the column.
    """
    table = read_rows(path)
    check_header(table, COLUMNS, ("quality",))
    options: list[Option] = []
    for number, line in enumerate(table.rows, start=1):
        cells = dict(zip(table.header, line, strict=True))
        for column in ("group", "option"):
            if not cells[column]:
                raise InputError(f"row {number} {column}", "(empty)", "not given", "fill the cell")
        options.append(
            Option(
                group=cells["group"],
                name=cells["option"],
                time_s=amount(cells["time_s"], "time_s", number),
                memory_bytes=amount(cells["memory_bytes"], "memory_bytes", number),
                error=amount(cells["error"], "error", number),
                quality=_quality(cells.get("quality", "")),
            )
        )
    return tuple(options)


def _quality(text: str) -> Quality | None:
    for known in get_args(Quality):
        if text == known:
            return known
    if text:
        raise unknown_name("quality", text, get_args(Quality))
    return None


def by_group(options: Sequence[Option]) -> dict[str, tuple[Option, ...]]:
    """Options by group, groups in the order of their first option; refuses what cannot be meant.

    Raises InputError for no options at all, an option named twice in its group, and a number that
    is negative or not finite.
    """
    if not options:
        raise InputError("options", "(none)", "nothing to choose from", "give one group or more")
    groups: dict[str, dict[str, Option]] = {}
    for option in options:
        named = groups.setdefault(option.group, {})
        if option.name in named:
            raise InputError("option", option.name, f"stands twice in group {option.group}",
                             "give every option of a group a name of its own")  # fmt: skip
        for field in ("time_s", "memory_bytes", "error"):
            value = getattr(option, field)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(field, value, f"not a number of zero or more (group "
                                 f"{option.group}, option {option.name})",
                                 "correct it")  # fmt: skip
        named[option.name] = option
    return {group: tuple(named.values()) for group, named in groups.items()}


def allowed(options: Sequence[Option], quality: Collection[Quality]) -> tuple[Option, ...]:
    """The options of these evidence classes; raises InputError when a group is left without any."""
    kept = tuple(option for option in options if option.quality in quality)
    lost = {option.group: None for option in options}.keys() - {option.group for option in kept}
    for option in options:
        if option.group in lost:
            raise InputError("quality", ",".join(sorted(quality)), f"group {option.group} has no "
                             "option of these classes", "allow one more class")  # fmt: skip
    return kept


def total(groups: Groups, choice: Mapping[str, str]) -> Totals:
    """Time, memory and error of a choice (option name by group), correctly rounded sums.

    Raises ValueError unless every group has exactly one of its own options.
    """
    if choice.keys() != groups.keys():
        raise ValueError("the choice does not name every group once")
    chosen: list[Option] = []
    for group, options in groups.items():
        found = [option for option in options if option.name == choice[group]]
        if len(found) != 1:
            raise ValueError(f"group {group} has no option {choice[group]}")
        chosen += found
    return Totals(
        time_s=math.fsum(option.time_s for option in chosen),
        memory_bytes=math.fsum(option.memory_bytes for option in chosen),
        error=math.fsum(option.error for option in chosen),
    )


def violations(totals: Totals, limits: Limits) -> tuple[str, ...]:
    """Which limits the sums exceed by more than `TOLERANCE`, in words."""
    found: list[str] = []
    if totals.error > limits.error * (1 + TOLERANCE):
        found.append(f"error {totals.error} > {limits.error}")
    most = limits.memory_bytes
    if most is not None and totals.memory_bytes > most * (1 + TOLERANCE):
        found.append(f"memory {totals.memory_bytes} > {most}")
    return tuple(found)
