"""Plans on changed stacks, links and techniques."""

from __future__ import annotations

from typing import Any

import msgspec

from forerun.plan import Plan


def _with_pool(plan: Plan, **changes: Any) -> Plan:
    pools = (msgspec.structs.replace(plan.cluster.pools[0], **changes),)
    return msgspec.structs.replace(plan, cluster=msgspec.structs.replace(plan.cluster, pools=pools))


def with_stack(plan: Plan, **changes: Any) -> Plan:
    """The plan on a stack with other constants."""
    stack = plan.cluster.pools[0].stack
    return _with_pool(plan, stack=msgspec.structs.replace(stack, **changes))


def with_device(plan: Plan, **changes: Any) -> Plan:
    """The plan on a changed device."""
    device = plan.cluster.pools[0].device
    return _with_pool(plan, device=msgspec.structs.replace(device, **changes))


def with_link(plan: Plan, factor: float) -> Plan:
    """The plan on nodes whose links are that much faster."""
    link = plan.cluster.pools[0].intra_node
    faster = msgspec.structs.replace(link, bytes_per_s=link.bytes_per_s * factor)
    return _with_pool(plan, intra_node=faster)


def with_technique(plan: Plan, name: str, **settings: Any) -> Plan:
    """The plan with one more technique."""
    (setting,) = plan.phase.settings
    techniques = {**setting.techniques, name: settings}
    phase = msgspec.structs.replace(
        plan.phase, settings=(msgspec.structs.replace(setting, techniques=techniques),)
    )
    return msgspec.structs.replace(plan, phases=(phase,))
