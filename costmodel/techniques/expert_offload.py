"""Expert offload: moments of the experts' optimiser wait on the host between updates.

No operator changes. A rank's states at rest lack the moments of its experts; an update brings them
in and sends them back by pieces, of which one stands on the device at a time:

    host bytes   8 per trained expert parameter that the rank owns
    copies       8 bytes in and 8 bytes out per such parameter and step, not hidden

An owned parameter is one of the rank's part after ep, tp and ZeRO.
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import InputError
from ...model import GATED, Layer
from ...plan import Phase, Plan
from ...units import format_bytes
from ..graph import Array
from ..prices import Prices

NAME = "expert-offload"
PIECE_ELEMENTS = 2**22
"""Parameters whose moments are on the device at a time: 32 MiB of them."""
MOMENT_BYTES = 8.0


def copies_s(owned: Array, prices: Prices) -> Array:
    """Seconds to bring the moments of `owned` parameters in and send them back.

    Over the link between host and device; on a CPU, whose host tier is a mapped file, by copies in
    memory.
    """
    link = prices.pool.host
    if link is not None:
        return np.where(
            owned > 0, 2 * (link.latency_s + MOMENT_BYTES * owned / link.bytes_per_s), 0
        )
    one = prices.operator("copy", [MOMENT_BYTES / 4 * owned], "fp32")[0]
    return np.where(owned > 0, 2 * one, 0.0)


def piece_bytes(largest: Array) -> Array:
    """Moments on the device during an update, of a largest tensor of so many parameters."""
    return MOMENT_BYTES * np.minimum(largest, float(PIECE_ELEMENTS))


def host_bytes(plan: Plan) -> int:
    """Moments that the fullest rank keeps on the host under a plan."""
    phase, mesh = plan.phase, plan.phase.mesh
    shards = mesh.expert_shards if phase.zero > 0 else 1
    owned: dict[int, float] = {}
    for index, stage in enumerate(phase.stages):
        for layer in range(stage.layers[0], stage.layers[1] + 1):
            params = _rank_params(plan.model.layer_at(layer), plan.model.hidden, phase, layer)
            rank = index % mesh.pp
            owned[rank] = owned.get(rank, 0.0) + params / shards
    return math.ceil(MOMENT_BYTES * max(owned.values(), default=0.0))


def _rank_params(layer: Layer, hidden: int, phase: Phase, index: int) -> float:
    """Parameters of experts on a rank, before ZeRO divides them."""
    if layer.experts is None:
        return 0.0
    mesh = phase.mesh
    slots = phase.technique("expert-placement", index).get("slots")
    held = len(slots[0]) if slots else layer.experts.num_experts / mesh.ep
    matrices = 3 if layer.mlp in GATED else 2
    return held * matrices * hidden * layer.experts.ffn_hidden / mesh.expert_tp


def refuse(plan: Plan) -> InputError | None:
    """Why the setting cannot be meant, or that its budget is too small; None where all is well."""
    setting = plan.phase.technique(NAME)
    if not setting:
        return None
    own = (one.techniques.get("offload", {}).get("states") for one in plan.phase.settings)
    states = next(filter(None, own), None)
    if states is not None and setting.get("moments", False):
        return InputError(NAME, True, f"beside offload.states={states}, which moves optimiser "
                          "states by itself", "use one of the two")  # fmt: skip
    unknown = sorted(setting.keys() - {"moments", "host_bytes"})
    if unknown:
        return InputError(NAME, unknown[0], "unknown setting", "give moments and host_bytes")
    if all(layer.experts is None for layer in plan.model.layers):
        return InputError(NAME, plan.model.name, "has no routed experts", "leave it out")
    if plan.workload.optimizer != "adamw":
        return InputError("optimizer", plan.workload.optimizer, f"{NAME} keeps moments of adamw "
                          "on the host", "use adamw, or leave it out")  # fmt: skip
    budget, needed = setting.get("host_bytes"), host_bytes(plan)
    if budget is not None and (not isinstance(budget, int) or needed > budget):
        return InputError(f"{NAME}.host_bytes", budget, f"the experts' moments take {needed} bytes "
                          f"({format_bytes(needed)}) of a rank's host memory",
                          "raise the budget, or raise ep or dp_shard")  # fmt: skip
    return None
