"""Pipeline parallelism by torch.distributed.pipelining: stage i runs on pipeline rank i mod pp."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import Model
from ..plan import Phase
from .data import Rows
from .marks import Marks
from .techniques import precision
from .torch_compat import DeviceMesh, ObservedStage, make_schedule


def local_stages(phase: Phase, pp_rank: int) -> list[int]:
    """Indices of the stages that a pipeline rank holds, in order."""
    return list(range(pp_rank, phase.mesh.num_stages, phase.mesh.pp))


def hidden_example(phase: Phase, model: Model) -> Tensor:
    """The form of what stages send: hidden states of one micro-batch, on the meta device."""
    parts = phase.mesh.tp if phase.sequence_parallel else 1
    shape = (phase.micro_batch_seqs, phase.seq_tokens // phase.mesh.cp // parts, model.hidden)
    dtype = precision.compute_dtype(phase)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


class Pipeline:
    """This rank's stages under the plan's schedule."""

    def __init__(
        self,
        modules: list[nn.Module],
        phase: Phase,
        model: Model,
        mesh: DeviceMesh,
        device: torch.device,
        marks: Marks,
    ) -> None:
        group = mesh.get_group("pp")
        indices = local_stages(phase, mesh.get_local_rank("pp"))
        self.has_first = 0 in indices
        self.has_last = phase.mesh.num_stages - 1 in indices
        hidden = hidden_example(phase, model)
        form = (phase.micro_batch_seqs, phase.seq_tokens // phase.mesh.cp)
        tokens = torch.empty(form, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        stages: list[ObservedStage] = []
        for module, index in zip(modules, indices, strict=True):
            stage = ObservedStage(
                module,
                index,
                phase.mesh.num_stages,
                device,
                input_args=tokens if index == 0 else hidden,
                output_args=loss if index == phase.mesh.num_stages - 1 else hidden,
                group=group,
            )
            stage.marks = marks
            stages.append(stage)
        num = phase.num_microbatches
        self.num_microbatches = num
        self.schedule = make_schedule(phase.schedule, stages, num, lambda loss, _: loss / num)

    def step(self, rows: Rows) -> Tensor:
        """Forward and backward of all micro-batches; the mean loss on the last stage, else NaN.

        The last stage computes its loss inside the module, where the logits die; the schedule's
        loss function only scales it, but wants a target of its own to cut into micro-batches.
        """
        inputs = rows.inputs_BS.contiguous()  # torch 2.11 checks strides
        arguments = (inputs,) if self.has_first else ()
        documents = {} if rows.documents_BN is None else {"documents": rows.documents_BN}
        if not self.has_last:
            self.schedule.step(*arguments, return_outputs=False, **documents)
            return torch.full((), float("nan"), device=inputs.device)
        losses: list[Tensor] = []
        targets = rows.targets_BS
        self.schedule.step(
            *arguments,
            targets=targets,
            target=targets,
            losses=losses,
            return_outputs=False,
            **documents,
        )
        return torch.stack([loss.detach() for loss in losses]).sum()
