"""Layers as operator groups: what options of precision cost them, and a choice put into a plan.

A group is some layers that follow one another, an option a setting of precision, `compute-recipe`
as in `int8-halo2` or `bf16`. Time and bytes kept are those of the cost model on the plan's devices,
of all layers of the group: per step of one rank that holds them, and per micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ...choices import COMPUTE_DTYPES, RECIPES
from ...costmodel.simulate import Simulation
from ...errors import InputError, unknown_name
from ...plan import Phase, Plan, Setting
from .problem import Option

Settings = dict[str, Any]
Group = tuple[int, int]
"""First and last layer."""


def parse_option(text: str) -> Settings:
    """The setting of precision that a name stands for.

    >>> parse_option("int8-halo1-hq")
    {'compute': 'int8', 'recipe': 'halo1-hq'}
    """
    compute, _, recipe = text.partition("-")
    if compute not in COMPUTE_DTYPES:
        raise unknown_name("options", compute, COMPUTE_DTYPES)
    if not recipe:
        return {"compute": compute}
    if recipe not in RECIPES:
        raise unknown_name("options", recipe, RECIPES)
    return {"compute": compute, "recipe": recipe}


def groups_of(num_layers: int, layers_each: int) -> tuple[Group, ...]:
    """Groups of so many layers; the last may have fewer.

    >>> groups_of(5, 2)
    ((0, 1), (2, 3), (4, 4))
    """
    if layers_each < 1:
        raise InputError("group-layers", layers_each, "not positive", "give 1 or more")
    return tuple(
        (first, min(first + layers_each, num_layers) - 1)
        for first in range(0, num_layers, layers_each)
    )


def group_name(group: Group) -> str:
    """As CSV files and documents name it."""
    return f"layers {group[0]}-{group[1]}"


def with_precision(plan: Plan, chosen: Mapping[Group, Settings]) -> Plan:
    """The plan with these settings of precision in the layers of each group; other techniques
    stay."""
    phase = plan.phase
    of_layer = {i: own for group, own in chosen.items() for i in range(group[0], group[1] + 1)}
    listed: list[Setting] = []
    for index in range(plan.model.num_layers):
        techniques = _techniques(phase, index)
        if index in of_layer:
            techniques = {**techniques, "precision": dict(of_layer[index])}
        if listed and listed[-1].techniques == techniques:
            first = listed.pop().layers[0]
        else:
            first = index
        listed.append(Setting(layers=(first, index), techniques=techniques))
    changed = msgspec.structs.replace(phase, settings=tuple(listed))
    return msgspec.structs.replace(plan, phases=(changed, *plan.phases[1:]))


def _techniques(phase: Phase, index: int) -> dict[str, Any]:
    for setting in phase.settings:
        if setting.layers[0] <= index <= setting.layers[1]:
            return dict(setting.techniques)
    return {}


def layer_options(
    plan: Plan,
    options: Mapping[str, Settings],
    groups: Sequence[Group],
    errors: Mapping[tuple[Group, str], float],
) -> tuple[Option, ...]:
    """Every option of every group, with its predicted time and bytes and its measured error."""
    found: list[Option] = []
    costs = {name: _costs(plan, own) for name, own in options.items()}
    for group in groups:
        for name in options:
            own = costs[name][group[0] : group[1] + 1]
            found.append(
                Option(
                    group=group_name(group),
                    name=name,
                    time_s=sum(seconds for seconds, _ in own),
                    memory_bytes=sum(kept for _, kept in own),
                    error=errors[group, name],
                )
            )
    return tuple(found)


def _costs(plan: Plan, settings: Settings) -> list[tuple[float, float]]:
    """Of each layer under one setting: seconds per step, bytes kept per micro-batch."""
    same = with_precision(plan, {(0, plan.model.num_layers - 1): settings})
    pieces = Simulation(same, same.phase).costs.layers
    each: list[tuple[float, float]] = []
    for piece, layer in zip(pieces, plan.model.layers, strict=True):
        seconds = float((piece.forward_s + piece.backward_s + piece.recompute_s)[0])
        kept = float(piece.live.saved[0])
        each += [(seconds * plan.phase.num_microbatches, kept)] * layer.repeat
    return each
