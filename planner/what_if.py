"""What more would buy: the winner's step on a cluster with more of one thing.

A link that is twice as fast leaves the plan as it is. More memory or more devices open the search
again, with the winner's tp, pp, cp and ep, its compute dtype and its optimiser pinned, so that the
answer comes at once: it is what the change buys at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from ..cluster import Cluster, Link, Pool
from ..document import Value
from ..errors import InputError
from ..plan import Plan
from ..units import GIB
from .candidates import OwnCost, Ranked
from .pins import Pins
from .search import search
from .variants import dtypes_of

MORE_MEMORY_BYTES = 8 * GIB


class WhatIf(Value, frozen=True, kw_only=True):
    """One change and what it buys at least."""

    change: str
    step_s: float
    gain: float
    """How much shorter the step is: old over new, minus one."""


Fit = Literal["yes", "marginal"]


def what_if(best: Ranked, pins: Pins, fit: Fit = "yes") -> tuple[WhatIf, ...]:
    """What faster links, more memory and more devices buy at least, the most valuable first.

    `pins` are those of the search, which bind here, too.
    """
    plan, step_s = best.plan, best.estimate.step_s.median
    found: list[WhatIf] = []
    for change, cluster in _faster_links(plan.cluster):
        faster = OwnCost().estimate(msgspec.structs.replace(plan, cluster=cluster)).step_s.median
        found.append(WhatIf(change=change, step_s=faster, gain=step_s / faster - 1))
    for change, cluster in _more(plan.cluster):
        faster = min(step_s, _again(plan, cluster, pins, fit))
        found.append(WhatIf(change=change, step_s=faster, gain=step_s / faster - 1))
    return tuple(sorted(found, key=lambda x: (-x.gain, x.change)))


def _again(plan: Plan, cluster: Cluster, pins: Pins, fit: Fit) -> float:
    """The best step with the degrees of a plan on another cluster; infinite without one."""
    mesh = plan.phase.mesh
    kept = {"tp": mesh.tp, "pp": mesh.pp, "cp": mesh.cp, "ep": mesh.ep}
    again = msgspec.structs.replace(pins, dp=None, dp_shard=None, **kept, **dtypes_of(plan))
    try:
        result = search(plan.model, cluster, plan.workload, again, keep=1, fit=fit)
    except InputError:  # no layout divides more devices
        return float("inf")
    return result.plans[0].estimate.step_s.median if result.plans else float("inf")


def _faster_links(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    if cluster.profile is not None and cluster.profile.collectives:
        return  # measured curves do not say what another link would do
    names = {"inter_node": "network between nodes twice as fast",
             "intra_node": "links within a node twice as fast"}  # fmt: skip
    for pool in cluster.pools:
        for field, text in names.items():
            link: Link | None = getattr(pool, field)
            alone = pool.num_nodes == 1 if field == "inter_node" else pool.devices_per_node == 1
            if link is not None and not alone:
                change = msgspec.structs.replace(pool, **{field: _doubled(link)})
                yield _named(text, cluster, pool), _with_pool(cluster, pool, change)
    if cluster.between_pools is not None and len(cluster.pools) > 1:
        faster = _doubled(cluster.between_pools)
        yield (
            "network between pools twice as fast",
            msgspec.structs.replace(cluster, between_pools=faster),
        )


def _doubled(link: Link) -> Link:
    return msgspec.structs.replace(link, bytes_per_s=2 * link.bytes_per_s)


def _more(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    for pool in cluster.pools:
        if pool.device.kind == "cpu":  # processes share what there is
            continue
        memory_bytes = pool.device.memory_bytes + int(MORE_MEMORY_BYTES)
        device = msgspec.structs.replace(pool.device, memory_bytes=memory_bytes)
        change = msgspec.structs.replace(pool, device=device)
        text = f"{MORE_MEMORY_BYTES / GIB:.0f} GiB more per device"
        yield _named(text, cluster, pool), _with_pool(cluster, pool, change)
    if all(pool.inter_node is not None for pool in cluster.pools):
        pools = [msgspec.structs.replace(p, num_nodes=2 * p.num_nodes) for p in cluster.pools]
        more = msgspec.structs.replace(cluster, pools=tuple(pools))
        yield f"{more.num_devices} devices", more


def _named(change: str, cluster: Cluster, pool: Pool) -> str:
    """A change in words; of several pools with the name of the pool."""
    return change if len(cluster.pools) == 1 else f"{pool.name}: {change}"


def _with_pool(cluster: Cluster, old: Pool, new: Pool) -> Cluster:
    pools = tuple(new if pool is old else pool for pool in cluster.pools)
    return msgspec.structs.replace(cluster, pools=pools)
