"""Pipeline parallelism by torch.distributed.pipelining: any orders, stages in rounds or in a V."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..costmodel.schedule import orders as orders_of
from ..model import Model
from ..orders import Orders
from ..plan import Phase
from ..schedules import SPLIT_SCHEDULES, rank_of
from . import data_parallel, split_backward
from .data import Rows
from .decoder import Decoder
from .experts.parallel import ExpertParallel
from .marks import Marks
from .techniques import offload, precision
from .torch_compat import DeviceMesh
from .torch_pipelining import ObservedStage, Runtime


def local_stages(phase: Phase, pp_rank: int) -> list[int]:
    """Indices of the stages that a pipeline rank holds, in order."""
    stages = range(phase.mesh.num_stages)
    return [i for i in stages if rank_of(phase.schedule, i, phase.mesh.pp) == pp_rank]


def phase_orders(phase: Phase) -> Orders:
    """The orders that a phase runs: its own, or those of its schedule, as they are predicted."""
    mesh = phase.mesh
    return phase.own_orders() or orders_of(
        phase.schedule, mesh.pp, mesh.vpp, phase.num_microbatches
    )


def hidden_example(phase: Phase, model: Model) -> Tensor:
    """The form of what stages send: hidden states of one micro-batch, on the meta device."""
    parts = phase.mesh.tp if phase.sequence_parallel else 1
    num_tokens = phase.seq_tokens // phase.mesh.cp
    shape: tuple[int, ...] = (phase.micro_batch_seqs, num_tokens // parts, model.hidden)
    if model.traced is not None:
        shape = (phase.micro_batch_seqs, *model.traced.hidden)
    dtype = precision.compute_dtype(phase)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _moved(piece: Decoder, phase: Phase) -> list[nn.Module]:
    """The blocks whose activations leave the device and come back."""
    blocks = ((int(index), block) for index, block in piece.blocks.items())
    return [block for index, block in blocks if offload.Setting.of(phase, index) is not None]


class Pipeline:
    """This rank's stages under the plan's orders."""

    def __init__(
        self,
        pieces: list[Decoder],
        phase: Phase,
        model: Model,
        mesh: DeviceMesh,
        device: torch.device,
        marks: Marks,
        experts: ExpertParallel | None = None,
        first: tuple[Tensor, ...] = (),
    ) -> None:
        """`first` is the form of what the first stage takes, where that is not tokens."""
        indices = local_stages(phase, mesh.get_local_rank("pp"))
        last = phase.mesh.num_stages - 1
        self.has_first, self.has_last = 0 in indices, last in indices
        hidden = hidden_example(phase, model)
        self.group, self.hidden, self.device = mesh.get_group("pp"), hidden, device
        form = (hidden.shape[0], phase.seq_tokens // phase.mesh.cp)
        taken = first or (torch.empty(form, dtype=torch.int64, device="meta"),)
        loss = torch.empty((), device="meta", requires_grad=True)
        self.stages: list[ObservedStage] = []
        for piece, index in zip(pieces, indices, strict=True):
            later = None
            if phase.schedule in SPLIT_SCHEDULES:
                later = split_backward.apply(piece, _moved(piece, phase))
            stage = ObservedStage(
                piece,
                index,
                phase.mesh.num_stages,
                device,
                input_args=taken if index == 0 else hidden,
                output_args=loss if index == last else hidden,
                group=self.group,
                dw_builder=later.take if later is not None else None,
            )
            stage.marks, stage.later = marks, later
            if data_parallel.uses_replicas(phase):
                apart = set(experts.ignored(piece) if experts is not None else ())
                same = [p for name, p in piece.named_parameters() if name not in apart]
                stage.replicas = data_parallel.Replicas(
                    same, data_parallel.replica_group(phase, mesh)
                )
            self.stages.append(stage)
        if self.has_first and self.has_last and model.tied_embeddings:
            self.stages[-1].table_stage = self.stages[0]
        num = phase.num_microbatches
        self.schedule = Runtime(self.stages, num, lambda loss, _: loss / num, phase_orders(phase))

    def message_s(self, repeats: int = 5) -> float:
        """Seconds in which neighbours hand on hidden states of one micro-batch (collective).

        Median of exchanges in which every rank sends to the next and receives from the one before.
        """
        size, rank = self.group.size(), self.group.rank()
        there = torch.zeros(self.hidden.shape, dtype=self.hidden.dtype, device=self.device)
        here = torch.empty_like(there)
        next_rank, before = (rank + 1) % size, (rank - 1) % size
        taken_s: list[float] = []
        for _ in range(repeats):
            start_s = time.perf_counter()
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, there, group=self.group, group_peer=next_rank),
                    dist.P2POp(dist.irecv, here, group=self.group, group_peer=before),
                ]
            )
            for work in works:
                work.wait()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken_s.append(time.perf_counter() - start_s)
        return statistics.median(taken_s)

    def step(self, rows: Rows) -> Tensor:
        """Forward and backward of all micro-batches; the mean loss on the last stage, else NaN."""
        every = {} if rows.documents_BN is None else {"documents": rows.documents_BN}
        behind = {"targets": rows.targets_BS}
        return self.run((rows.inputs_BS,), behind, rows.targets_BS, every)

    def run(
        self,
        inputs: tuple[Tensor, ...],
        behind: Mapping[str, Any],
        target: Tensor,
        every: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tensor:
        """The same with what the first stage takes, and what the last one and every one take by
        name.

        The last stage computes its loss inside the module, where the logits die; the schedule's
        loss function only scales it, but wants a target of its own to cut into micro-batches.
        """
        # torch 2.11 checks strides
        arguments = tuple(x.contiguous() for x in inputs) if self.has_first else ()
        losses: list[Tensor] = []
        if self.has_last:
            self.schedule.step(
                *arguments,
                **behind,
                **every,
                target=target,
                losses=losses,
                return_outputs=False,
            )
        else:
            self.schedule.step(*arguments, return_outputs=False, **every)
        for stage in self.stages:
            if stage.replicas is not None:
                stage.replicas.wait()
        if not self.has_last:
            return torch.full((), float("nan"), device=target.device)
        return torch.stack([loss.detach() for loss in losses]).sum()
