"""What concerns the experts of a plan, written into it: a placement, how uneven loads are, and
moments that wait on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import msgspec
import numpy as np

from ...errors import InputError
from ...measurement import ExpertLoad, Measurement
from ...plan import Phase, Plan, Setting

Chosen = Mapping[str, Any]
TECHNIQUE = "expert-placement"


def expect_loads(plan: Plan, measurement: Measurement) -> Plan:
    """The plan with the imbalance that a run of the same model measured, layer by layer.

    That of the run itself where it had as many expert-parallel ranks and the plan no placement of
    its own; else that of all its choices together, over the plan's ranks.
    """
    if not measurement.experts:
        raise InputError("expert-loads", measurement.label, "measured no experts",
                         "give the measurement of a model that has some")  # fmt: skip
    by_layer = {load.layer: load for load in measurement.experts}

    def choose(layer: int, before: Chosen) -> Chosen:
        if layer not in by_layer:
            raise InputError("expert-loads", measurement.label, f"has no loads of layer {layer}",
                             "give a measurement of this model")  # fmt: skip
        return {**before, "imbalance": _imbalance(plan, layer, by_layer[layer], before)}

    return _with_settings(plan, choose)


def _imbalance(plan: Plan, layer: int, load: ExpertLoad, before: Chosen) -> float:
    experts, ep = plan.model.layer_at(layer).experts, plan.phase.mesh.ep
    assert experts is not None
    if len(load.tokens) != experts.num_experts:
        raise InputError("expert-loads", len(load.tokens), f"experts measured in layer {layer}, "
                         f"{plan.model.name} has {experts.num_experts}",
                         "give a measurement of this model")  # fmt: skip
    if "slots" not in before and load.ep == ep:
        return min(load.imbalance, float(ep))
    slots = before.get("slots") or np.arange(experts.num_experts).reshape(ep, -1).tolist()
    counts = np.bincount(np.concatenate([np.asarray(rank) for rank in slots]))
    share = np.asarray(load.tokens, dtype=float) / counts
    of_rank = np.array([share[rank].sum() for rank in slots])
    return float(of_rank.max() / of_rank.mean()) if of_rank.sum() else 1.0


def place_experts_in(plan: Plan, document: Any, source: str) -> Plan:
    """The plan with the placement that `forerun solve experts` wrote, of one layer or of several.

    A document of one layer holds for all. Experts are named by their numbers, layers too. Raises
    InputError naming what does not fit the plan.
    """
    if not isinstance(document, Mapping):
        raise InputError("expert-placement", source, "not a document of forerun solve experts",
                         "write one with -o")  # fmt: skip
    layers = document.get("layers")
    if layers is None:
        table = _slots(document, source)
        return _with_settings(plan, lambda layer, before: {**before, **table})
    by_layer = {str(layer.get("layer")): layer for layer in layers if isinstance(layer, Mapping)}

    def choose(layer: int, before: Chosen) -> Chosen:
        if str(layer) not in by_layer:
            raise InputError("expert-placement", source, f"does not place layer {layer}",
                             f"it has {', '.join(list(by_layer)[:8])}")  # fmt: skip
        return {**before, **_slots(by_layer[str(layer)], source)}

    return _with_settings(plan, choose)


def _slots(layer: Chosen, source: str) -> dict[str, Any]:
    """The setting of one layer of the document."""
    ranks = layer.get("placement")
    if not isinstance(ranks, list) or not all(isinstance(rank, list) for rank in ranks):
        raise InputError("expert-placement", source, "has no placement",
                         "write one with forerun solve experts -o")  # fmt: skip
    try:
        slots = [[int(name) for name in rank] for rank in ranks]
    except (TypeError, ValueError) as error:
        raise InputError("expert-placement", source, f"experts are not numbers ({error})",
                         "solve the loads that a run measured") from error  # fmt: skip
    setting: dict[str, Any] = {"slots": slots}
    imbalance = layer.get("imbalance")
    if isinstance(imbalance, (int, float)):
        setting["imbalance"] = min(max(float(imbalance), 1.0), float(len(slots)))
    return setting


def _with_settings(plan: Plan, choose: Callable[[int, Chosen], Chosen]) -> Plan:
    """The plan with a setting of its own for the experts of every layer; checked."""
    if all(layer.experts is None for layer in plan.model.layers):
        raise InputError("experts", plan.model.name, "has no routed experts",
                         "drop --expert-loads and --expert-placement")  # fmt: skip
    phases = tuple(_phase_with(plan, phase, choose) for phase in plan.phases)
    changed = msgspec.structs.replace(plan, phases=phases)
    changed.check()
    return changed


def _phase_with(plan: Plan, phase: Phase, choose: Callable[[int, Chosen], Chosen]) -> Phase:
    each: list[dict[str, dict[str, Any]]] = []
    for layer in range(plan.model.num_layers):
        names = {n for s in phase.settings for n in s.techniques}
        own = {n: dict(found) for n in sorted(names) if (found := phase.technique(n, layer))}
        if plan.model.layer_at(layer).experts is not None:
            own[TECHNIQUE] = dict(choose(layer, own.get(TECHNIQUE, {})))
        each.append(own)
    settings: list[Setting] = []
    for _, group in groupby(range(len(each)), key=lambda layer: repr(each[layer])):
        layers = list(group)
        settings.append(Setting(layers=(layers[0], layers[-1]), techniques=each[layers[0]]))
    return msgspec.structs.replace(phase, settings=tuple(settings))
