"""Compute dtypes and optimisers among which a search chooses, where classes of quality allow it.

    compute     as the tensors are; fp8, mxfp8 and nvfp4 where every device multiplies in them
    scaling     of fp8 as in COAT, which may store activations too, or with one scale per tensor
                where a stack gathers what such matmuls read in fp8
    optimiser   AdamW with moments in fp32; in 8 or 4 bits, or in 8-bit floats

Besides, any dtype and scaling that `forerun probe` measured on the user's own task, where that
class is allowed. The default class, exact, leaves the first of each; a pin leaves what is pinned. A
technique that is not exact must gain a little to be chosen (`RISK_WORTH`). Which linears of a layer
run below 16 bits is decided by their shapes (`costmodel/by_shape.py`). Scales per row are taken
where they are pinned: they cost more casts than one per tensor and gain nothing predicted.

Where plans are made to be run here, what executors have no code for is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import msgspec

from ..cluster import Cluster, Pool
from ..costmodel import optimizers
from ..costmodel.moment_bytes import FORMATS
from ..costmodel.options import Options
from ..costmodel.techniques import precision
from ..errors import InputError
from ..model import Model
from ..plan import Plan
from ..schedules import SPLIT_SCHEDULES
from ..workload import Optimizer, Workload
from .pins import Pins, check_pins, check_precision, has_rate
from .quality import LOW_COMPUTE, is_allowed, precisions_here
from .space import everything, routes

FREE_COMPUTE = ("fp8", "mxfp8", "nvfp4")
"""Dtypes that hardware multiplies in by itself. HALO's, whose operands are rotated first, are taken
where they are pinned or were measured: no datacentre GPU of the catalog gains by them."""
RISK_WORTH = 5e-3
"""Part of the step that a technique must gain to be chosen where it is not exact: below that the
evidence for its quality weighs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What the layouts of a grid share."""

    cluster: Cluster
    """Its pools in the order in which pipelines go through them."""
    workload: Workload
    """With the optimiser."""
    pins: Pins
    """With the compute dtype where that was chosen."""
    num_risks: int
    """Techniques of it that the search chose and that are not exact."""

    @property
    def handicap(self) -> float:
        """Times and peaks are compared multiplied by it."""
        return (1.0 + RISK_WORTH) ** self.num_risks


def ways(
    model: Model, cluster: Cluster, workload: Workload, pins: Pins, *, free: bool = True
) -> tuple[Way, ...]:
    """Every order of pools with every compute dtype and optimiser, the plainest first; `free` says
    whether dtypes are the search's to choose."""
    pools = cluster.pools
    dtypes = [pins]
    if free:
        dtypes += _low_precisions(model, pools, workload, pins)
        measured = _measured_here(pools, workload, pins)
        dtypes += [chosen for chosen in measured if chosen not in dtypes]
    names = [pins.optimizer or workload.optimizer]
    if free and pins.optimizer is None:
        names += _low_bit_moments(model, pools, workload, pins)
    return tuple(
        Way(
            cluster=route,
            workload=msgspec.structs.replace(workload, optimizer=name),
            pins=chosen,
            num_risks=(chosen is not dtypes[0]) + (name != names[0]),
        )
        for route, chosen, name in product(routes(cluster), dtypes, names)
    )


def _measured_here(pools: Sequence[Pool], workload: Workload, pins: Pins) -> list[Pins]:
    """The pins with a compute dtype that `forerun probe` found harmless, each that is allowed."""
    if pins.precision is not None or pins.activations is not None:
        return []
    chosen: list[Pins] = []
    for settings in precisions_here(workload):
        one = msgspec.structs.replace(
            pins, precision=settings["compute"], recipe=settings.get("recipe")
        )
        try:
            check_pins(one, [pool.device for pool in pools])
        except InputError:  # with other pins
            continue
        chosen.append(one)
    return chosen


def dtypes_of(plan: Plan) -> dict[str, Any]:
    """The pins that leave a search the compute dtype and the optimiser of a plan alone."""
    used = [setting.techniques.get("precision", {}) for setting in plan.phase.settings]
    low = next((one for one in used if one.get("compute") in LOW_COMPUTE), {})
    compute = low.get("compute", plan.phase.compute_dtype)
    recipe = low.get("recipe", "tensorwise" if compute == "fp8" else None)
    return {"precision": compute, "recipe": recipe, "optimizer": plan.workload.optimizer}


def _low_precisions(
    model: Model, pools: Sequence[Pool], workload: Workload, pins: Pins
) -> list[Pins]:
    """The pins with a compute dtype below 16 bits, each that is allowed."""
    if pins.precision is not None or not is_allowed(workload, "low-precision"):
        return []
    if model.traced is not None or not model.is_decoder:
        return []
    devices = [pool.device for pool in pools]
    if any(device.kind == "cpu" for device in devices):  # they emulate it, and gain nothing
        return []
    runs = not everything(pools, pins)
    if runs and not _runs_in_8_bits(model, pins):
        return []
    scalings = ["coat"]
    if any(pool.stack.low_precision_gather for pool in pools):
        if not runs or _in_sixteens(model, pools, workload):
            scalings.append("tensorwise")
    chosen: list[Pins] = []
    for compute in FREE_COMPUTE[:1] if runs else FREE_COMPUTE:
        own = Options(compute=compute)
        if any(not has_rate(x, compute) or precision.refuse(own, x) for x in devices):
            continue
        for recipe in scalings if compute == "fp8" else [None]:
            one = msgspec.structs.replace(pins, precision=compute, recipe=recipe)
            try:
                check_precision(one)
            except InputError:  # with other pins
                continue
            chosen.append(one)
    return chosen


def _runs_in_8_bits(model: Model, pins: Pins) -> bool:
    """Whether executors have layers of the model in 8 bits beside what is pinned."""
    whole = pins.schedule not in SPLIT_SCHEDULES and pins.runtime != "compiled"
    stays = not pins.offload and pins.offload_rest != "recompute"
    together = pins.recompute in (None, "none", "selective", "full")
    return whole and stays and together and all(layer.is_plain for layer in model.layers)


def _in_sixteens(model: Model, pools: Sequence[Pool], workload: Workload) -> bool:
    """Whether dimensions are multiples of 16 under any tp on a node, as torchao's matmuls want."""
    most = max(pool.devices_per_node for pool in pools)
    widths = [
        width
        for layer in model.layers
        for width in (
            layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim, layer.ffn_hidden
        )
    ]  # fmt: skip
    return not any(width % (16 * most) for width in widths) and not (
        model.hidden % 16 or workload.seq_tokens % 16
    )


def _low_bit_moments(
    model: Model, pools: Sequence[Pool], workload: Workload, pins: Pins
) -> list[Optimizer]:
    """Optimisers that are AdamW with moments of fewer bits, each that is allowed."""
    if workload.optimizer != "adamw" or pins.offload_states is not None:
        return []
    routed = any(layer.experts is not None for layer in model.layers)
    if routed and not everything(pools, pins):
        return []
    return [
        name
        for name in get_args(Optimizer)
        if name in FORMATS
        and FORMATS[name].codes
        and is_allowed(workload, name.replace("_", "-"))
        and all(optimizers.refuse(name, pool) is None for pool in pools)
    ]
