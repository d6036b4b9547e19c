"""Experts under FSDP2: over which ranks, and along which dimension.

A rank's slots are cut along the slots themselves where these divide evenly, and along the next
dimension (the width, or the hidden size of the last matmul) where they do not or where replicas
must stay whole on the ranks that add them up: FSDP2 pads uneven parts of the first dimension, which
moves bytes for nothing, and refuses those of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard

from ..torch_compat import MixedPrecisionPolicy, fully_shard
from .layer import Moe
from .parallel import ExpertParallel

Placement = Callable[[nn.Parameter], Shard | None]


def whole_slots(moe: Moe, shards: int) -> Placement:
    """Where FSDP2 cuts the weights of a layer's experts; others as it does by itself."""
    weights = {id(p) for p in moe.experts.parameters()}

    def place(parameter: nn.Parameter) -> Shard | None:
        if id(parameter) not in weights:
            return None
        slots, width = parameter.shape[:2]
        if slots % shards == 0 and not moe.slots.replicated:
            return Shard(0)
        assert width % shards == 0, "refused before it is built (support.py)"
        return Shard(1)

    return place


def shard_experts(
    moe: Moe, experts: ExpertParallel, policy: MixedPrecisionPolicy, *, reshard: bool
) -> None:
    """Make the experts of a layer an FSDP unit over the ranks that hold the same ones."""
    assert experts.mesh is not None
    degrees = experts.degrees
    shape = degrees.expert_shape()
    dims = ("expert_shard",)
    if shape["expert_replicate"] > 1:
        dims = ("expert_replicate", "expert_shard")
    mesh: Any = experts.mesh[dims]
    placement: Any = whole_slots(moe, degrees.expert_shards)
    fully_shard(
        moe.experts,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=reshard,
        shard_placement_fn=placement,
    )
