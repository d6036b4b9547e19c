"""The trainer: one rank's part of a training step."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import RunFailed
from ..local_sgd import LocalSgd
from ..plan import Plan
from ..schedules import rank_of
from . import clipping, data_parallel
from .arena import StaticArena
from .away import Away
from .context_parallel import Spread
from .data import Rows
from .decoder import Decoder
from .experts.parallel import ExpertParallel
from .halo_gather import CodedGathers
from .local_sgd import Outer
from .marks import Marks, Observer
from .pipeline import Pipeline
from .techniques.lora import is_adapter
from .torch_compat import DeviceMesh, DTensor


class Trainer:
    """This rank's pieces of the model with their optimiser; built by `build.build`."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        device_mesh: DeviceMesh,
        pieces: list[Decoder],
        modules: list[nn.Module],
        pipeline: Pipeline | None,
        optimizer: torch.optim.Optimizer,
        tied_group: dist.ProcessGroup | None,
        tp_dims: dict[str, int],
        marks: Marks,
        away: Away,
        experts: ExpertParallel | None = None,
    ) -> None:
        self.plan, self.phase, self.mesh = plan, plan.phase, plan.phase.mesh
        self.device, self.device_mesh = device, device_mesh
        self.coordinates = self.mesh.coordinates(dist.get_rank())
        self.pieces, self.modules = pieces, modules
        self.pipeline, self.optimizer = pipeline, optimizer
        self.tied_group, self.marks = tied_group, marks
        self.away = away
        """What of this rank waits off the device."""
        self.arena: StaticArena | None = None
        """Where the tensors of a step lie, if their places are solved for."""
        self.tp_dims = tp_dims
        """Dimension along which tp cut a parameter, by name; the others are whole on each rank."""
        self.experts = experts
        self.together: dist.ProcessGroup | None = None
        """The ranks that are one in every step; None = all."""
        self.outer: Outer | None = None
        """Meetings with the other replicas, where they train apart."""
        self.spread = Spread()
        """The ranks that share a sequence."""
        self.gathers: list[CodedGathers] = []
        """Weights that FSDP gathers as codes."""
        self.shared: tuple[str, ...] = ("embedding.weight",)
        """Parameters that `tied_group` sums the gradients of: those of both ends of the model."""

    @property
    def observer(self) -> Observer:
        """Who hears of begin and end of forward, backward, recompute and optimizer."""
        return self.marks.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self.marks.observer = observer

    def forward_backward(self, tokens_BS1: Tensor | Rows) -> Tensor:
        """Mean loss of this replica's sequences, whose gradients now stand on the parameters.

        `tokens_BS1` holds all micro-batches, (micro_batch_seqs * num_microbatches, S + 1) int64, or
        the same as rows; where ranks share sequences the loss is that of this rank's tokens, as
        many as any other's. A 0-dim tensor on ranks of the last stage, NaN elsewhere.
        """
        rows = tokens_BS1 if isinstance(tokens_BS1, Rows) else Rows.of(tokens_BS1)
        part = self.spread.part
        rows = Rows(part(rows.inputs_BS), part(rows.targets_BS), rows.documents_BN)
        if self.experts is not None:
            self.experts.begin_step()
        for gather in self.gathers:
            gather.begin_step()
        with nullcontext() if self.arena is None else self.arena.step():
            if self.pipeline is not None:
                loss = self.pipeline.step(rows)
            else:
                loss = self._accumulate(rows)
        self.reduce_shared_gradients()
        return loss

    def _accumulate(self, rows: Rows) -> Tensor:
        num = self.phase.num_microbatches
        total = torch.zeros((), device=self.device)
        for index, some in enumerate(rows.chunks(num)):
            last = index == num - 1
            with data_parallel.microbatch(self.modules[0], self.phase, last):
                with self.marks.chunk("forward", "F0"):
                    loss = self.modules[0](*[x for x in some if x is not None]) / num
                with self.marks.chunk("backward", "B0"):
                    loss.backward()
            total += loss.detach()
        return total

    def reduce_shared_gradients(self) -> None:
        """Sum gradients that ranks hold in part.

        Under sequence parallelism those of parameters that tp did not cut (one all-reduce of all of
        them), without it those of routers, whose tokens' outputs are partial sums, and of the half
        of an adapter that is whole, whose other half is cut; with tied tables under a pipeline that
        of the table, over first and last stage.
        """
        partial = self._partial_over_tp() if self.mesh.tp > 1 else []
        if partial:
            sum_coalesced(partial, self.device_mesh.get_group("tp"))
        if self.experts is not None:
            self.experts.finish_step()
        if self.tied_group is not None:
            parameters = self._named_parameters()
            for name in self.shared:
                gradient = parameters[name].grad if name in parameters else None
                if gradient is not None:
                    dist.all_reduce(local(gradient), group=self.tied_group)

    def _partial_over_tp(self) -> list[Tensor]:
        """Gradients of which each tp rank holds a part."""
        split, experts = self.phase.sequence_parallel, self.experts
        return [
            local(p.grad)
            for name, p in self._named_parameters().items()
            if p.grad is not None
            and (
                ((split or is_adapter(name)) and name not in self.tp_dims)
                or (experts and experts.routes(name))
            )
            and not (experts is not None and experts.owns(name))
        ]

    def optimizer_step(self) -> None:
        """Gradients clipped where the workload says so, AdamW, then gradients dropped.

        Replicas that train apart meet after it, where a meeting is due.
        """
        self.clip_gradients()
        with self.marks.chunk("optimizer", "U"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.outer is not None:
                self.outer.after_step()

    def clip_gradients(self) -> None:
        """Scale gradients down where their norm is above the workload's (collective)."""
        clip_norm = self.plan.workload.clip_norm
        if clip_norm is None:
            return
        held = {n: p.grad for n, p in self._named_parameters().items() if p.grad is not None}
        copies = {name: self._copies(name) for name in held}
        gradients = {name: local(gradient) for name, gradient in held.items()}
        if self.experts is not None:
            gradients, copies = self.experts.apart(gradients, copies)
        parts = clipping.by_copies(gradients, copies)
        with self.marks.mark("optimizer"):
            clipping.clip(parts, clip_norm, self.device, self.together)

    def meet_as(self, local: LocalSgd) -> None:
        """Have the replicas, which train apart, meet as the settings say."""
        self.together = data_parallel.together(self.device_mesh)
        named = self._named_parameters()
        self.outer = Outer(
            local,
            named,
            {name: self._copies(name) for name in named},
            self.device_mesh.get_group("dp_replicate"),
            self.together if self.together.size() > 1 else None,
            self.device,
            self.marks,
        )

    def _copies(self, name: str) -> int:
        """How many ranks hold the same part of a parameter's gradient."""
        if self.experts is not None and self.experts.owns(name):
            return self.experts.copies
        copies = data_parallel.copies(self.phase)
        if name not in self.tp_dims:
            copies *= self.mesh.tp
        if self.tied_group is not None and name in self.shared:
            copies *= 2
        return copies

    def global_loss(self, local_loss: Tensor) -> float:
        """Mean loss over all replicas, the same on every rank."""
        return self.agree(local_loss)[0]

    def agree(self, local_loss: Tensor, *wishes: bool) -> tuple[float, tuple[bool, ...]]:
        """Mean loss over all replicas, and which wishes any rank has: one small all-reduce."""
        values = torch.zeros(2 + len(wishes), device=self.device)
        if self.has_loss:
            values[0], values[1] = local_loss, 1.0
        for index, wish in enumerate(wishes, start=2):
            if wish:
                values[index] = 1.0
        dist.all_reduce(values)
        total, count, *counts = values.tolist()
        return float(np.float32(total) / np.float32(count)), tuple(n > 0 for n in counts)

    @property
    def has_loss(self) -> bool:
        """Whether this rank holds the last piece, which computes the loss."""
        return any(piece.is_last for piece in self.pieces)

    def diverged_ranks(self, local_loss: Tensor) -> list[int]:
        """Ranks whose own loss is not finite; one small all-reduce."""
        flags = torch.zeros(dist.get_world_size(), device=self.device)
        if self.has_loss and not torch.isfinite(local_loss):
            flags[dist.get_rank()] = 1.0
        dist.all_reduce(flags)
        return [rank for rank, flag in enumerate(flags.tolist()) if flag]

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter for piece in self.pieces for name, parameter in piece.named_parameters()
        }

    def check_gradients(self) -> None:
        """Raise RunFailed when a trainable parameter has no gradient."""
        for name, parameter in self._named_parameters().items():
            if parameter.requires_grad and parameter.grad is None:
                raise RunFailed(f"parameter={name}: has no gradient after backward; "
                                "the layout lost it, please report this plan")  # fmt: skip

    def named_gradients(self) -> dict[str, Tensor]:
        """Whole gradients of the parameters of this rank's pieces, by global name (collective)."""
        self.check_gradients()
        return {
            name: self._full(name, p.grad)
            for name, p in self._named_parameters().items()
            if p.grad is not None
        }

    def named_parameters_full(self) -> dict[str, Tensor]:
        """Whole parameters of this rank's pieces, by global name (collective)."""
        return {name: self._full(name, p.detach()) for name, p in self._named_parameters().items()}

    def _full(self, name: str, tensor: Tensor) -> Tensor:
        """The whole of a parameter or gradient: FSDP's shards gathered, those of tp, of ep."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if name in self.tp_dims:
            parts = [torch.empty_like(whole) for _ in range(self.mesh.tp)]
            dist.all_gather(parts, whole.contiguous(), group=self.device_mesh.get_group("tp"))
            whole = torch.cat(parts, self.tp_dims[name])
        if self.experts is not None and self.experts.owns(name):
            return self.experts.whole(name, whole)
        return whole


def tied_groups(plan: Plan) -> dist.ProcessGroup | None:
    """The group of the first and last stage's ranks at this rank's place, when tables are tied and
    they are two.

    Every rank makes every group, in the same order, as torch demands.
    """
    phase, mesh = plan.phase, plan.phase.mesh
    together = rank_of(phase.schedule, mesh.num_stages - 1, mesh.pp) == 0
    if together or not plan.model.tied_embeddings:
        return None
    mine: dist.ProcessGroup | None = None
    stride = mesh.stride("pp")
    for first in range(stride):
        pair = [first, first + (mesh.pp - 1) * stride]
        group = dist.new_group(pair)
        if isinstance(group, dist.ProcessGroup) and dist.get_rank() in pair:
            mine = group
    return mine


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank stores."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_coalesced(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum each tensor over a group, in place, by one all-reduce of all of them."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
