"""What a paced run emulates: the cluster whose prices hold its chunks, and whether it can run here.

The executed model is the plan's own, on CPU processes, one per device of the plan.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from .. import document
from ..catalogs import resolve_gpus
from ..cluster import Cluster, Profile
from ..costmodel import estimate
from ..costmodel.chunk_times import chunk_times, with_own_cores
from ..errors import InputError
from ..estimate import Estimate
from ..plan import Plan
from ..units import format_bytes
from . import failures
from .pacing import Pace

OWN = "plan"
"""`--pace plan`: the plan's own cluster."""
PROCESS_BYTES = 300 * 2**20
"""Of a process before the first tensor."""
NOT_LIVE = ("fragmentation", "context")

replace = msgspec.structs.replace


def emulated(plan: Plan, pace: str) -> Plan:
    """The plan on the devices that are emulated, each with cores of its own.

    `pace` is `plan` (the plan's own cluster), a catalog name of a device such as H100, or the path
    of a profile of the plan's device.
    """
    cluster = plan.cluster
    if pace.lower().endswith(".json"):
        profile = document.read(Profile, Path(pace))
        name = cluster.pools[0].device.name
        if profile.device != name:
            raise InputError("pace", pace, f"is a profile of {profile.device}, the plan is for "
                             f"{name}", "give a profile of the same device")  # fmt: skip
        cluster = replace(cluster, profile=profile)
    elif pace != OWN:
        cluster = _cluster_of(pace, plan)
    return with_own_cores(replace(plan, cluster=cluster))


def _cluster_of(device: str, plan: Plan) -> Cluster:
    """As many devices of another kind, in the plan's words."""
    found = resolve_gpus(f"{plan.cluster.num_devices}x{device}").cluster
    pool = replace(found.pools[0], name=plan.cluster.pools[0].name)
    return replace(found, pools=(pool,))


def pace_of(plan: Plan, scale: float | None) -> Pace:
    """The predicted times of an emulated plan's chunks."""
    if scale is not None and not scale > 0:
        raise InputError("pace-scale", scale, "not positive", "give 1 or more")
    times = chunk_times(plan)
    return Pace(
        device=plan.cluster.pools[0].device.name,
        chunks=times.by_rank,
        hop_s=times.hop_s,
        step_s=times.step_s,
        scale=scale,
    )


def prepare(plan: Plan, pace: str, scale: float | None) -> Pace:
    """What the ranks of a paced run are held to; raises InputError where it cannot run here."""
    on_device = emulated(plan, pace)
    check_fits_here(on_device)
    return pace_of(on_device, scale)


def check_fits_here(plan: Plan, predicted: Estimate | None = None) -> None:
    """Raise InputError for a plan whose processes do not fit into this machine's memory."""
    terms = (predicted or estimate(plan)).memory_terms_bytes
    live_bytes = sum(size for name, size in terms.items() if name not in NOT_LIVE)
    needed_bytes = int(plan.phase.mesh.world * (live_bytes + PROCESS_BYTES))
    available_bytes = failures.available_bytes()
    if needed_bytes > available_bytes:
        raise InputError("pace", plan.model.name,
                         f"{plan.phase.mesh.world} processes with the whole model need "
                         f"{format_bytes(needed_bytes)}, {format_bytes(available_bytes)} are free",
                         "plan a small model with as many layers for the same cluster")  # fmt: skip
