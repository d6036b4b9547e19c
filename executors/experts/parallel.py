"""Expert parallelism of one rank: its groups, its part of every expert's weights, their gradients.

The same ranks carry a second mesh, (pp, expert_replicate, expert_shard, ep, expert_tp), in the same
order: ep lies over neighbours of the axes that hold the same dense weights, and the ranks of
expert_replicate and expert_shard hold the same experts.

    weights     the slots of the rank's place in ep, each cut along its width by expert_tp
    gradients   of one slot: sums over the tokens of all ranks of its ep group, and by FSDP2 or an
                all-reduce over the ranks that hold the same experts; divided by the ranks that see
                sequences of their own (dp * cp), as for dense weights
    replicas    copies of an expert on several ranks of an ep group add their gradients up, at the
                rank of the first of them, which sends the sum back

Without ep the experts are weights like others, whole or cut by tp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ...mesh import Mesh
from ...plan import Phase, Plan
from ..techniques.expert_placement import slots_of
from ..torch_compat import DeviceMesh, DTensor
from .layer import Moe
from .replicas import sum_replicas
from .trip import Ways

WEIGHTS = ("gate", "up", "down")


def has_experts(plan: Plan) -> bool:
    """Whether any layer of a plan's model routes tokens to experts."""
    return any(layer.experts is not None for layer in plan.model.layers)


class ExpertParallel:
    """What a rank's mixtures of experts share: groups, and what becomes of their gradients."""

    def __init__(self, plan: Plan, mesh: DeviceMesh, device: torch.device) -> None:
        """Every rank makes every group, in the same order, as torch demands."""
        self.plan, self.phase, self.dense_mesh = plan, plan.phase, mesh
        self.degrees: Mesh = plan.phase.mesh
        self.mesh: DeviceMesh | None = None
        if self.degrees.ep > 1:
            shape = self.degrees.expert_shape()
            self.mesh = init_device_mesh(
                device.type, tuple(shape.values()), mesh_dim_names=tuple(shape)
            )
        self.ep_group = self._ep_group()
        self.counting = self._counting_group()
        self.layers: dict[str, Moe] = {}
        """By the prefix of their parameters' names."""
        self.sync: GradientSync | None = None
        self.sharded: list[nn.Parameter] = []
        """Divided experts whose gradients FSDP2 has taken the mean of."""

    def _ep_group(self) -> dist.ProcessGroup | None:
        """The ranks that this one's rows go to; a group of its own, so that what it carries is told
        from what others over the same ranks do."""
        if self.mesh is None:
            return None
        inner = self.degrees.expert_tp
        return _own_group(
            self.degrees.world,
            lambda rank: (rank // (self.degrees.ep * inner), rank % inner),
            "ep",
        )

    def _counting_group(self) -> dist.ProcessGroup | None:
        """The ranks over which choices are counted for the balance loss; None for one."""
        kind, mesh = self.plan.workload.balance_loss, self.degrees
        if kind == "none":
            return None
        axes = ["cp"] if kind == "micro-batch" else ["dp_replicate", "dp_shard", "cp"]
        axes += ["tp"] if self.phase.sequence_parallel else []
        if all(getattr(mesh, axis) == 1 for axis in axes):
            return None
        fixed = [axis for axis in Mesh.AXES if axis not in axes]
        return _own_group(
            mesh.world,
            lambda rank: tuple(mesh.coordinates(rank)[axis] for axis in fixed),
            "expert_counts",
        )

    @property
    def ep_rank(self) -> int:
        """This rank's place in its ep group."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("ep")

    def apply(self, piece: nn.Module) -> None:
        """Give a piece (on the meta device) its experts alone, and the ways to the others'."""
        gathers = self.phase.sequence_parallel and self.degrees.expert_tp > 1
        ways = Ways(
            self.ep_group, self.dense_mesh.get_group("tp") if gathers else None, self.ep_rank
        )
        workload = self.plan.workload
        for name, moe in piece.named_modules():
            if not isinstance(moe, Moe):
                continue
            self.layers[f"{name}.experts."] = moe
            index = int(name.split(".")[1])
            moe.slots, moe.ways = slots_of(self.phase, index, moe.spec.num_experts), ways
            if self.mesh is not None:
                for weight in _weights(moe):
                    _keep_slots(weight, moe.slots.per_rank)
            training = moe.training_of_router
            share = 1.0 / (self.phase.num_microbatches * self.degrees.tp)
            training.balance = workload.balance_loss
            training.balance_scale = workload.balance_loss_coef * share
            training.z_scale = workload.router_z_loss_coef * share
            training.group = self.counting

    def owns(self, name: str) -> bool:
        """Whether a parameter is that of experts which ep divides."""
        return self.mesh is not None and any(name.startswith(prefix) for prefix in self.layers)

    def routes(self, name: str) -> bool:
        """Whether a parameter is that of a router."""
        return name.endswith(".router.weight")

    def experts_of(self, name: str) -> list[int] | None:
        """The experts in the slots of a parameter on this rank; None for other parameters."""
        for prefix, moe in self.layers.items():
            if name.startswith(prefix):
                return moe.slots.of_rank(self.ep_rank)
        return None

    def ignored(self, piece: nn.Module) -> list[str]:
        """Parameters of a piece whose gradients DDP and its like must leave alone."""
        return [name for name, _ in piece.named_parameters() if self.owns(name)]

    @property
    def holders(self) -> int:
        """Ranks that hold the same slots, whole or in parts."""
        return self.degrees.world // self.degrees.pp // self.degrees.ep // self.degrees.expert_tp

    @property
    def copies(self) -> int:
        """Ranks that hold the same part of a divided expert's gradient."""
        return self.holders // (self.degrees.expert_shards if self.sync is None else 1)

    def apart(
        self, gradients: Mapping[str, Tensor], copies: Mapping[str, int]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Gradients by name and how many ranks hold each, those of replicated experts slot by slot:
        as many more times as the expert has replicas."""
        parts, counts = dict(gradients), dict(copies)
        for name in gradients:
            moe = next((m for prefix, m in self.layers.items() if name.startswith(prefix)), None)
            if moe is None or not moe.slots.replicated:
                continue
            whole, count = parts.pop(name), counts.pop(name)
            for slot, expert in enumerate(moe.slots.of_rank(self.ep_rank)):
                parts[f"{name}[{slot}]"] = whole[slot]
                counts[f"{name}[{slot}]"] = count * len(moe.slots.holders[expert])
        return parts, counts

    def watch(self, pieces: Sequence[nn.Module], sharded: bool) -> None:
        """Have the gradients of divided experts summed, once the pieces are as they will train."""
        if self.mesh is None:
            return
        every = (pair for piece in pieces for pair in piece.named_parameters())
        parameters = [parameter for name, parameter in every if self.owns(name)]
        if sharded:
            self.sharded = parameters
        else:
            group = self.mesh.get_group("expert_replicate")
            self.sync = GradientSync(parameters, group, self.phase)

    def begin_step(self) -> None:
        """Before the first micro-batch of a step."""
        for moe in self.layers.values():
            moe.training_of_router.begin_step()

    def forget(self) -> None:
        """Start the counts of loads anew."""
        for moe in self.layers.values():
            moe.forget()

    def broken_routers(self) -> list[int]:
        """Layers of this rank whose router gave weights that are not numbers."""
        return [
            int(prefix.split(".")[1])
            for prefix, moe in self.layers.items()
            if moe.training_of_router.gave_nan
        ]

    def finish_step(self) -> None:
        """After the last: sums that span ranks, of divided experts and of replicas."""
        if self.ep_group is None:
            return
        if self.sync is not None:
            self.sync.finish()
        for gradient in _gradients(self.sharded):
            # FSDP2's mean is over the holders; its own divisor is not the same in all its cases
            gradient.mul_(self.holders / (self.degrees.dp * self.degrees.cp))
        for moe in self.layers.values():
            if moe.slots.replicated:
                own = [weight.get_parameter("weight") for weight in _weights(moe)]
                sum_replicas(_gradients(own), moe.slots, self.ep_group)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All experts of a parameter (or gradient) of which `tensor` is what this rank's ep place
        holds (collective over ep)."""
        moe = next(moe for prefix, moe in self.layers.items() if name.startswith(prefix))
        parts = [torch.empty_like(tensor) for _ in range(self.degrees.ep)]
        dist.all_gather(parts, tensor.contiguous(), group=self.ep_group)
        slots = torch.cat(parts)
        return slots[[holders[0] for holders in moe.slots.holders]]


class GradientSync:
    """Means of experts' gradients over the ranks that hold the same ones, without FSDP2.

    A gradient is complete when as many backward passes as micro-batches have added to it: its sum
    over ranks then starts beside the rest of the backward. Under a pipeline it starts after the
    step's last: where a backward is split, a pass may end before it has added what it owes.
    """

    def __init__(
        self, parameters: list[nn.Parameter], group: dist.ProcessGroup, phase: Phase
    ) -> None:
        self.parameters, self.group = parameters, group
        self.ranks_with_tokens = phase.mesh.dp * phase.mesh.cp
        self.num_microbatches = phase.num_microbatches
        self.passes: dict[int, int] = {}
        self.pending: dict[int, Any] = {}
        for index, parameter in enumerate(parameters if phase.mesh.pp == 1 else ()):
            parameter.register_post_accumulate_grad_hook(lambda p, i=index: self._added(i))

    def _added(self, index: int) -> None:
        self.passes[index] = self.passes.get(index, 0) + 1
        if self.passes[index] == self.num_microbatches:
            self._start(index)

    def _start(self, index: int) -> None:
        gradient = self.parameters[index].grad
        if gradient is None:
            return
        gradient.div_(self.ranks_with_tokens)
        several = self.group.size() > 1
        work = dist.all_reduce(gradient, group=self.group, async_op=True) if several else None
        self.pending[index] = work

    def finish(self) -> None:
        """Wait for all sums; start those of gradients that no pass announced."""
        for index in range(len(self.parameters)):
            if index not in self.pending:
                self._start(index)
        for work in self.pending.values():
            if work is not None:
                work.wait()
        self.passes.clear()
        self.pending.clear()


def _own_group(
    world: int, place: Callable[[int], tuple[int, ...]], name: str
) -> dist.ProcessGroup | None:
    """This rank's group of the ranks that agree in `place`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        groups.setdefault(place(rank), []).append(rank)
    mine: dist.ProcessGroup | None = None
    for ranks in groups.values():
        group = dist.new_group(ranks, group_desc=name)
        if isinstance(group, dist.ProcessGroup) and dist.get_rank() in ranks:
            mine = group
    return mine


def _weights(moe: Moe) -> list[nn.Module]:
    return [getattr(moe.experts, name) for name in WEIGHTS if hasattr(moe.experts, name)]


def _keep_slots(linear: nn.Module, per_rank: int) -> None:
    shape = linear.get_parameter("weight").shape
    linear.weight = nn.Parameter(torch.empty(per_rank, *shape[1:], device="meta"))


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients there are, as this rank stores them."""
    found = [p.grad for p in parameters if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in found]
