"""Loads of experts by layer, the machine that holds them, and a placement with its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...document import read
from ...errors import InputError, NoFeasiblePlan
from ...measurement import Measurement
from ..csv_rows import Table, amount, check_header, read_rows

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """Tokens that each expert of each layer receives."""

    experts: tuple[str, ...]
    layers: tuple[str, ...]
    tokens: Floats
    """(L, E)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks with slots for experts; nodes hold equally many neighbouring ranks."""

    ranks: int
    slots: int
    """Per rank."""
    nodes: int | None = None
    """None = not stated: traffic between nodes is not counted."""
    groups: int | None = None
    """Groups of neighbouring experts of which each stays within a node; None = no such rule."""

    @property
    def total_slots(self) -> int:
        """Replicas in all: every slot is filled."""
        return self.ranks * self.slots

    def copies_per_rank(self, num_experts: int) -> int:
        """How often a rank may hold an expert: once, unless it has more slots than there are
        experts for it to hold (those of its node where groups stay within one)."""
        within = self.nodes if self.groups is not None and self.nodes is not None else 1
        return -(-self.slots * within // num_experts)


def read_loads(path: str | Path) -> Loads:
    """The loads of a CSV file, `expert,load` for one layer or `layer,NAME,NAME,...` for several, or
    those that a run measured (the JSON of `forerun run`), by the numbers of layers and experts.

    Raises InputError naming the row and the column.
    """
    if Path(path).suffix == ".json":
        return _measured(read(Measurement, path), path)
    table = read_rows(path)
    if table.header[0] == "layer":
        return _by_layer(table)
    check_header(table, ("expert", "load"))
    name_at, load_at = table.header.index("expert"), table.header.index("load")
    names = [line[name_at] for line in table.rows]
    _refuse_repeated("expert", names)
    tokens = [amount(line[load_at], "load", row) for row, line in enumerate(table.rows, start=1)]
    return Loads(experts=tuple(names), layers=("0",), tokens=np.array([tokens]))


def _measured(measurement: Measurement, path: str | Path) -> Loads:
    """The loads of a run; its layers have equally many experts."""
    found = measurement.experts
    if not found:
        raise InputError("loads", path, "measured no experts",
                         "run a model that has some, or give a CSV file")  # fmt: skip
    sizes = {len(load.tokens) for load in found}
    if len(sizes) > 1:
        raise InputError("loads", sorted(sizes), "layers of unequally many experts",
                         "give the loads of one kind of layer as a CSV file")  # fmt: skip
    return Loads(
        experts=tuple(map(str, range(sizes.pop()))),
        layers=tuple(str(load.layer) for load in found),
        tokens=np.array([load.tokens for load in found], dtype=np.float64),
    )


def _by_layer(table: Table) -> Loads:
    experts = table.header[1:]
    if not experts:
        raise InputError("header", "layer", "names no expert",
                         "write layer and one column per expert")  # fmt: skip
    layers = [line[0] for line in table.rows]
    _refuse_repeated("layer", layers)
    tokens = [
        [amount(cell, name, row) for name, cell in zip(experts, line[1:], strict=True)]
        for row, line in enumerate(table.rows, start=1)
    ]
    return Loads(experts=experts, layers=tuple(layers), tokens=np.array(tokens))


def _refuse_repeated(kind: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for row, name in enumerate(names, start=1):
        if not name:
            raise InputError(f"row {row} {kind}", "(empty)", "not given", "fill the cell")
        if name in seen:
            raise InputError(kind, name, "stands twice", f"give every {kind} a name of its own")
        seen.add(name)


def check_problem(loads: Loads, layout: Layout) -> None:
    """Raise InputError for numbers that cannot be meant, NoFeasiblePlan for too few slots."""
    tokens, num_experts = loads.tokens, len(loads.experts)
    for field in ("ranks", "slots", "nodes", "groups"):
        value = getattr(layout, field)
        if value is not None and value < 1:
            raise InputError(field, value, "not a positive number", f"give --{field} 1 or more")
    if tokens.shape != (len(loads.layers), num_experts) or not tokens.size:
        raise InputError("loads", tokens.shape, "not layers x experts", "give a load per expert")
    _refuse_repeated("expert", loads.experts)
    if not np.all(np.isfinite(tokens)) or np.any(tokens < 0):
        layer, expert = (int(i[0]) for i in np.nonzero(~(np.isfinite(tokens) & (tokens >= 0))))
        raise InputError("load", tokens[layer, expert], f"not a number of zero or more (expert "
                         f"{loads.experts[expert]})", "correct it")  # fmt: skip
    if layout.nodes is not None and layout.ranks % layout.nodes:
        raise InputError("nodes", layout.nodes, f"does not divide {layout.ranks} ranks",
                         "give equally many ranks to every node")  # fmt: skip
    if layout.groups is not None:
        _check_groups(layout.groups, layout.nodes, num_experts)
    if layout.total_slots < num_experts:
        raise NoFeasiblePlan(
            f"{layout.ranks} ranks x {layout.slots} slots hold {layout.total_slots} experts, "
            f"there are {num_experts}",
            f"raise --slots to {-(-num_experts // layout.ranks)}",
        )


def _check_groups(groups: int, nodes: int | None, num_experts: int) -> None:
    if nodes is None:
        raise InputError("groups", groups, "need nodes to stay within", "give --nodes")
    if num_experts % groups:
        raise InputError("groups", groups, f"does not divide {num_experts} experts",
                         "give groups of equal size")  # fmt: skip
    if groups % nodes:
        raise InputError("groups", groups, f"not a multiple of {nodes} nodes",
                         "give every node equally many groups")  # fmt: skip


def count_replicas(slots: Whole, num_experts: int) -> Whole:
    """Replicas (L, E) of each expert in slots (L, R, S)."""
    num_layers = len(slots)
    flat = slots.reshape(num_layers, -1) + num_experts * np.arange(num_layers)[:, None]
    counted = np.bincount(flat.reshape(-1), minlength=num_layers * num_experts)
    return counted.reshape(num_layers, num_experts).astype(np.int64)


def rank_loads(tokens: Floats, slots: Whole) -> Floats:
    """Load (L, R) of each rank when every expert's tokens are split evenly over its replicas."""
    counts = count_replicas(slots, tokens.shape[1])
    share = tokens / np.maximum(counts, 1)
    rows = np.arange(len(slots))[:, None, None]
    return share[rows, slots].sum(axis=2)


def check_placement(loads: Loads, layout: Layout, slots: Whole) -> None:
    """Raise ValueError unless `slots` (L, R, S), indices of experts, keep every rule.

    Every expert has a replica, ranks hold no expert more often than they must, and groups stay
    within a node. No solver is involved.
    """
    num_experts = len(loads.experts)
    if slots.shape != (len(loads.layers), layout.ranks, layout.slots):
        raise ValueError(f"slots have the shape {slots.shape}")
    most = layout.copies_per_rank(num_experts)
    for layer in slots.tolist():
        held = [{expert: rank.count(expert) for expert in rank} for rank in layer]
        if set().union(*held) != set(range(num_experts)):
            raise ValueError("an expert has no replica, or there is one more than experts")
        if any(count > most for rank in held for count in rank.values()):
            raise ValueError("a rank holds an expert twice")
        if layout.groups is not None and layout.nodes is not None:
            size, per_node = num_experts // layout.groups, layout.ranks // layout.nodes
            homes = {(e // size, rank // per_node) for rank, own in enumerate(held) for e in own}
            if len(homes) != layout.groups:
                raise ValueError("a group of experts lies on two nodes")
