"""Data parallelism: replicated fp32 states under DDP or, in a pipeline, `Replicas`; else FSDP2.

Ranks that share a sequence hold the same parameters and see different tokens: they are replicas as
well, and states are sharded over them too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..plan import Phase
from .decoder import Decoder
from .experts.layer import Moe
from .experts.parallel import ExpertParallel
from .experts.sharding import shard_experts, whole_slots
from .techniques import precision
from .torch_compat import (
    CPUOffloadPolicy,
    DeviceMesh,
    FSDPModule,
    flattened,
    fully_shard,
    ignore_in_ddp,
)


def uses_fsdp(phase: Phase) -> bool:
    """Whether FSDP2 holds the parameters: any ZeRO stage, and bf16 for its fp32 master copy."""
    return phase.zero > 0 or phase.compute_dtype != "fp32"


def state_mesh(phase: Phase, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks over which states are replicated, where there are several, and sharded.

    Under ZeRO states are divided over dp_shard and cp; without, no rank has a part only.
    """
    if phase.mesh.cp == 1:
        replicated = phase.synced.dp_replicate > 1
        return mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"]
    shards = ("dp_shard", "cp") if phase.zero else ("dp_shard",)
    replicas = ("dp_replicate",) if phase.zero else ("dp_replicate", "dp_shard", "cp")
    if phase.zero and phase.mesh.dp_replicate == 1:
        return flattened(mesh, shards)
    place = phase.mesh.coordinates(dist.get_rank())
    alike = mesh.mesh[place["pp"], ..., place["tp"]].flatten()
    groups = [flattened(mesh, axes).get_group() for axes in (replicas, shards)]
    ranks = alike.view(groups[0].size(), groups[1].size())
    return DeviceMesh.from_group(
        groups, mesh.device_type, mesh=ranks, mesh_dim_names=("replicas", "shards")
    )


def shard_group(phase: Phase, mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks over which states are sharded."""
    found = state_mesh(phase, mesh)
    return found.get_group(found.ndim - 1) if found.ndim > 1 else found.get_group()


def apply_fsdp(
    piece: Decoder, phase: Phase, mesh: DeviceMesh, experts: ExpertParallel | None = None
) -> None:
    """Shard each block, then what is left of the piece.

    Under a pipeline, and below ZeRO 3, parameters stay gathered from the first forward of a step to
    its last backward. Experts that ep divides are a unit of their own, over the ranks that hold the
    same ones.
    """
    options: dict[str, Any] = {
        "mesh": state_mesh(phase, mesh), "mp_policy": precision.policy(phase)
    }  # fmt: skip
    if any(s.techniques.get("offload", {}).get("states") == "parameters" for s in phase.settings):
        options["offload_policy"] = CPUOffloadPolicy()
    keep = phase.zero < 3 or phase.mesh.pp > 1
    for block in piece.blocks.values():
        moe = getattr(block, "mlp", None)
        placed: dict[str, Any] = {}
        if isinstance(moe, Moe) and experts is not None:
            if experts.mesh is not None:
                shard_experts(moe, experts, precision.policy(phase), reshard=not keep)
            else:
                placed = {"shard_placement_fn": whole_slots(moe, phase.mesh.dp_shard)}
        fully_shard(block, reshard_after_forward=not keep, **placed, **options)
    fully_shard(piece, reshard_after_forward=False, **options)


def replicas(phase: Phase) -> int:
    """Ranks that hold the same parameters in every step and see different tokens."""
    return phase.synced.dp * phase.mesh.cp


def copies(phase: Phase) -> int:
    """Ranks of different data that hold the same part of a gradient."""
    if not uses_fsdp(phase):
        return replicas(phase)
    return phase.synced.dp_replicate if phase.zero else replicas(phase) // phase.mesh.dp_shard


def uses_ddp(phase: Phase) -> bool:
    """Whether DDP averages gradients over replicas."""
    return phase.mesh.pp == 1 and replicas(phase) > 1 and not uses_fsdp(phase)


def uses_replicas(phase: Phase) -> bool:
    """Whether `Replicas` do, of a pipeline's stages."""
    return phase.mesh.pp > 1 and replicas(phase) > 1 and not uses_fsdp(phase)


def together(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks of this replica, where replicas train apart."""
    return flattened(mesh, ("dp_shard", "cp", "tp")).get_group()


def replica_group(phase: Phase, mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that hold the same parameters where nothing is sharded."""
    axes = ("dp_replicate", "dp_shard", "cp") if phase.mesh.cp > 1 else ("dp_replicate",)
    return flattened(mesh, axes).get_group()


def apply_ddp(
    piece: Decoder, phase: Phase, mesh: DeviceMesh, experts: ExpertParallel | None = None
) -> DistributedDataParallel:
    """The piece under DDP; initial parameters are equal already, so nothing is broadcast.

    Gradients of experts that ep divides are none of its business.
    """
    ignore_in_ddp(piece, experts.ignored(piece) if experts is not None else [])
    return DistributedDataParallel(
        piece,
        process_group=replica_group(phase, mesh),
        gradient_as_bucket_view=True,
        init_sync=False,
    )


BUCKET_BYTES = 25 * 2**20
"""As in DDP."""


class Replicas:
    """Gradients of the replicas of one pipeline stage, averaged once all of a step are there.

    DDP reduces from hooks of one backward, which a backward in two halves does not have, and holds
    a second copy of all gradients. Here they move into buckets when the stage is done, which take
    their place; the sums run beside the other stages of the rank until `wait`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.buckets: list[list[nn.Parameter]] = [[]]
        self.group, self.works = group, list[Any]()
        room = BUCKET_BYTES
        for parameter in parameters:
            size = parameter.numel() * parameter.element_size()
            if size > room and self.buckets[-1]:
                self.buckets.append([])
                room = BUCKET_BYTES
            self.buckets[-1].append(parameter)
            room -= size

    def start(self) -> None:
        """Issue the sums."""
        for bucket in self.buckets:
            held = [p for p in bucket if p.grad is not None]
            if not held:
                continue
            flat = torch.cat([p.grad.flatten() for p in held if p.grad is not None])
            for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
                parameter.grad = part.view_as(parameter)
            flat.div_(self.group.size())
            self.works.append(dist.all_reduce(flat, group=self.group, async_op=True))

    def wait(self) -> None:
        """Let the sums end."""
        while self.works:
            self.works.pop().wait()


@contextmanager
def microbatch(module: nn.Module, phase: Phase, last: bool) -> Iterator[None]:
    """The context of one micro-batch's forward and backward (no pipeline).

    Gradients are synchronised on the last one only, or on each for ZeRO 2 and 3; sums over replicas
    of shards (HSDP) always wait for the last.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or phase.zero >= 2)
        module.set_requires_all_reduce(last)
        module.set_reshard_after_backward(last or phase.zero == 3)
        module.set_is_last_backward(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield
