"""Private and recent torch names, all in one place; written for torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw as adamw_update

from .marks import Marks

__all__ = [
    "DTensor",
    "DeviceMesh",
    "FSDPModule",
    "MixedPrecisionPolicy",
    "ObservedStage",
    "adamw_update",
    "all_gather_single",
    "fully_shard",
    "grouped_matmul",
    "ignore_in_ddp",
    "is_fake",
    "make_schedule",
    "operator_name",
    "reduce_scatter_single",
    "resolve_group",
    "storage_key",
]

# Torch 2.13 gave these two new names and warns on the old ones.
if hasattr(dist, "all_gather_single"):
    all_gather_single: Callable[..., Any] = dist.all_gather_single
    reduce_scatter_single: Callable[..., Any] = dist.reduce_scatter_single
else:
    all_gather_single = dist.all_gather_into_tensor
    reduce_scatter_single = dist.reduce_scatter_tensor

grouped_matmul: Callable[..., Tensor] | None = getattr(
    F, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
"""(rows, weights (X, in, out), offs): one kernel for the matmuls of all experts."""


class ObservedStage(PipelineStage):
    """A pipeline stage that marks its work and holds receive buffers only while they are in use.

    Torch allocates the receive buffers of all micro-batches before the first one and keeps them;
    here a buffer is made when its receive is posted and let go when its chunk has been computed, so
    that 1F1B keeps as many inputs as it has micro-batches in flight.
    """

    marks: Marks

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_forward_infra(*args, **kwargs)
        _release(self.args_recv_info.values())
        return result

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_backward_infra(*args, **kwargs)
        _release(self.grad_recv_info.values())
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device, needs_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device, needs_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.marks.mark("forward"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release([self.args_recv_info[fwd_chunk_id]])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.marks.mark("backward"):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _release([self.grad_recv_info[bwd_chunk_id]])

    def perform_reduce_grad(self, *args: Any, **kwargs: Any) -> None:
        with self.marks.mark("backward"):
            super().perform_reduce_grad(*args, **kwargs)


def _release(groups: Any) -> None:
    """Let go of receive buffers, after noting their form; an empty tensor takes their place."""
    for infos in groups:
        for info in infos:
            buffer = getattr(info, "buffer", None)
            if buffer is not None and buffer.numel() > 0:
                info.form = (buffer.shape, buffer.dtype)
                info.buffer = buffer.new_empty(0)


def _allocate(infos: Any, device: torch.device, *, needs_grad: bool) -> None:
    """Make receive buffers again; received activations need a gradient."""
    for info in infos:
        if hasattr(info, "form") and info.buffer.numel() == 0:
            shape, dtype = info.form
            buffer = torch.empty(shape, dtype=dtype, device=device)
            info.buffer = buffer.requires_grad_(needs_grad and dtype.is_floating_point)


SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


def make_schedule(
    name: str,
    stages: list[ObservedStage],
    num_microbatches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A pipeline schedule over this rank's stages; gradients are left as the loss scales them."""
    if name != "interleaved":
        return SCHEDULES[name](stages[0], num_microbatches, loss_fn=loss_fn, scale_grads=False)
    schedule = SCHEDULES[name](stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
    orders = schedule.pipeline_order_with_comms
    orders[schedule.rank] = gathered_once(orders[schedule.rank])
    return schedule


def gathered_once(order: list[Any]) -> list[Any]:
    """An order of actions in which each stage is gathered at its first use and freed at its last.

    Torch keeps three stages gathered at a time and would gather again with more chunks per rank.
    """
    kept = _first_of_each(order, "UNSHARD")
    return _first_of_each(kept[::-1], "RESHARD")[::-1]


def _first_of_each(order: list[Any], kind: str) -> list[Any]:
    seen: set[int] = set()
    kept: list[Any] = []
    for action in order:
        if action.computation_type.name == kind:
            if action.stage_index in seen:
                continue
            seen.add(action.stage_index)
        kept.append(action)
    return kept


def ignore_in_ddp(module: Any, names: list[str]) -> None:
    """Have DDP leave these parameters of a module alone."""
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def operator_name(operator: Any) -> str:
    """The name of an operator without its namespace and overload, such as `allreduce_`."""
    return operator._schema.name.partition("::")[2]


def resolve_group(name: str) -> Any:
    """The process group that functional collectives know by this name."""
    from torch.distributed import distributed_c10d

    names: Any = distributed_c10d
    return names._resolve_process_group(name)


def storage_key(storage: torch.UntypedStorage) -> int:
    """What identifies a storage while it lives."""
    return storage._cdata


def is_fake(kind: type) -> bool:
    """Whether a tensor type has no memory: those that DTensor works shapes out with."""
    from torch._subclasses.fake_tensor import FakeTensor

    return issubclass(kind, FakeTensor)


def sequence_number() -> int:
    """The number that the next autograd node of this thread will get."""
    names: Any = torch.autograd
    return names._get_sequence_nr()


def backward_node() -> Any:
    """The autograd node whose backward runs now; None outside of a backward."""
    return torch._C._current_autograd_node()


def fake_mode() -> Any:
    """A mode in which tensors have shapes and no memory; real ones may meet them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
