"""Private and recent torch names, all in one place; written for torch 2.11 to 2.13."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action,
    _batch_p2p,
    _ComputationType,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw as adamw_update

from ..kernels.fp8_cast import chunks
from ..orders import Orders, action_text
from .marks import Marks, Message
from .split_backward import Later

if TYPE_CHECKING:  # which is built on this module
    from .data_parallel import Replicas

__all__ = [
    "CPUOffloadPolicy",
    "DTensor",
    "DeviceMesh",
    "FSDPModule",
    "MixedPrecisionPolicy",
    "ObservedStage",
    "Runtime",
    "adamw_update",
    "all_gather_single",
    "coded_matmul",
    "destroy_process_groups",
    "extend_gather",
    "flattened",
    "fully_shard",
    "fused_rms_norm",
    "fused_rms_norm_backward",
    "grouped_matmul",
    "ignore_in_ddp",
    "is_fake",
    "local_tensor",
    "operator_name",
    "reduce_scatter_single",
    "resolve_group",
    "scale_all",
    "scaled_matmul",
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


def flattened(mesh: DeviceMesh, axes: tuple[str, ...]) -> DeviceMesh:
    """One axis over neighbouring axes of a mesh; sliced from it by their names joined with _."""
    return mesh[axes]._flatten("_".join(axes)) if len(axes) > 1 else mesh[axes]


class ObservedStage(PipelineStage):
    """A pipeline stage that marks its work and holds receive buffers only while they are in use.

    Torch allocates the receive buffers of all micro-batches before the first one and keeps them;
    here a buffer is made when its receive is posted and let go when its chunk has been computed, so
    that a schedule keeps as many inputs as it has micro-batches in flight.
    """

    marks: Marks
    later: Later | None = None
    """Where a backward is split: products whose weights wait for their gradients."""
    replicas: Replicas | None = None
    """Who averages gradients over replicas, where FSDP does not."""
    table_stage: ObservedStage | None = None
    """The stage of the same rank whose embedding this one's head uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sent_forward: dict[int, list[Any]] = {}
        """Works of sent activations by micro-batch, until the gradient is back."""

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
        key = f"F{self.stage_index}"
        with self.marks.chunk("forward", key, f"{key}.{fwd_chunk_id}"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _release([self.args_recv_info[fwd_chunk_id]])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        whole = kwargs.get("full_backward", True)
        _wait_batch_p2p(self.sent_forward.pop(bwd_chunk_id, []))
        if self.later is not None:
            self.later.putting_off = not whole
        key = f"{'B' if whole else 'I'}{self.stage_index}"
        with self.marks.chunk("backward", key, f"B{self.stage_index}.{bwd_chunk_id}"):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            if self.table_stage is not None:
                _accumulate(self.table_stage.submod)
        _release([self.grad_recv_info[bwd_chunk_id]])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.marks.chunk("backward", f"W{self.stage_index}"):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
            _accumulate(self.submod)
            if self.table_stage is not None:
                _accumulate(self.table_stage.submod)

    def perform_reduce_grad(self, *args: Any, **kwargs: Any) -> None:
        with self.marks.mark("backward"):
            super().perform_reduce_grad(*args, **kwargs)
            if self.replicas is not None:
                self.replicas.start()


def _accumulate(module: nn.Module) -> None:
    """Add gradients of FSDP's 16-bit copies, which came without its hooks, to those in fp32."""
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        state: Any = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one or none
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in group.fsdp_params if group is not None else ():
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


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


class Runtime(_PipelineScheduleRuntime):
    """Torch's runtime for the orders of a plan, which holds what it sends no longer than needed.

    Torch keeps every message until the end of the step. Here a sent gradient is waited for when the
    same stage sends its next but one (the rank before has asked for it by then), a sent activation
    when its gradient is back.
    """

    def __init__(
        self,
        stages: list[ObservedStage],
        num_microbatches: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        orders: Orders,
    ) -> None:
        super().__init__(stages, num_microbatches, loss_fn=loss_fn, scale_grads=False)
        self.own = {stage.stage_index: stage for stage in stages}
        self.sent_backward: dict[int, deque[list[Any]]] = {}
        """Works of gradients that were sent and not waited for, oldest first, by stage."""
        actions = {
            rank: [_Action.from_str(action_text(action)) for action in order]
            for rank, order in enumerate(orders)
        }
        self._prepare_schedule_with_comms(actions)
        own_order = gathered_once(self.pipeline_order_with_comms[self.rank])
        if any(stage.table_stage is not None for stage in stages):
            own_order = reduced_last(own_order, 0)
        self.pipeline_order_with_comms[self.rank] = own_order
        for kind, function in (
            ("SEND_F", self._send),
            ("SEND_B", self._send),
            ("RECV_F", self._receive),
            ("RECV_B", self._receive),
        ):
            self._comp_type_to_function_map[_ComputationType[kind]] = function

    def _send(self, action: Any, _: Any) -> None:
        stage, micro = self.own[action.stage_index], action.microbatch_index
        if action.computation_type.name == "SEND_F":
            stage.sent_forward[micro] = _batch_p2p(stage.get_fwd_send_ops(micro))
            return
        waiting = self.sent_backward.setdefault(action.stage_index, deque())
        waiting.append(_batch_p2p(stage.get_bwd_send_ops(micro)))
        if len(waiting) > GRADIENTS_ON_WIRE:
            _wait_batch_p2p(waiting.popleft())

    def _receive(self, action: Any, _: Any) -> None:
        stage, micro = self.own[action.stage_index], action.microbatch_index
        posted: Any
        if action.computation_type.name == "RECV_F":
            posted, operations = self.fwd_recv_ops, stage.get_fwd_recv_ops(micro)
            after = f"F{action.stage_index - 1}.{micro}"
        else:
            posted, operations = self.bwd_recv_ops, stage.get_bwd_recv_ops(micro)
            after = f"B{action.stage_index + 1}.{micro}"
        posted[action.stage_index, micro] = [Message(stage.marks, _batch_p2p(operations), after)]

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> None:
        self.loss_order: list[int] = []
        super()._step_microbatches(*args, **kwargs)
        for waiting in self.sent_backward.values():
            while waiting:
                _wait_batch_p2p(waiting.popleft())

    def _maybe_compute_loss(
        self, stage: Any, output: Any, targets: Any, micro: int, *more: Any
    ) -> None:
        before = len(self._internal_losses)
        super()._maybe_compute_loss(stage, output, targets, micro, *more)
        if len(self._internal_losses) > before:
            self.loss_order.append(micro)

    def _maybe_get_loss(self, stage: Any, micro: int) -> Any:
        """A loss for its backward; what is kept of it holds no graph, whose leaves are inputs.

        Torch takes the last stage's forwards to be in the order of micro-batches.
        """
        if not stage.is_last:
            return None
        place = self.loss_order.index(micro)
        loss: Any = super()._maybe_get_loss(stage, place)
        self._internal_losses[place] = loss.detach()
        return loss


GRADIENTS_ON_WIRE = 1
"""Sent gradients that a stage holds besides the newest."""


def reduced_last(order: list[Any], stage: int) -> list[Any]:
    """An order in which a stage's gradients are reduced, and its parameters freed, at the end: when
    another stage of the rank uses one of its parameters."""
    closing = ("REDUCE_GRAD", "RESHARD")

    def closes(action: Any) -> bool:
        return action.stage_index == stage and action.computation_type.name in closing

    return [a for a in order if not closes(a)] + [a for a in order if closes(a)]


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


def scale_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors by a number on their device, in place and in few kernels."""
    names: Any = torch
    names._foreach_mul_(tensors, factor)


def scaled_matmul(
    a_MK: Tensor, b_NK: Tensor, scale: Tensor, dtype: torch.dtype, *, fast: bool
) -> Tensor:
    """a b^T of 8-bit floats, (M, N), times a scale: accumulated in fp32, rounded to `dtype` once.

    On CUDA by the tensor cores, whose operands have both dimensions in multiples of 16: missing
    codes are zeros. `fast` lets them accumulate in fewer bits. Elsewhere emulated in fp32 matmuls:
    products of two codes are exact in fp32.
    """
    if not a_MK.is_cuda:
        b_KN = b_NK.float().t()
        out = torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)
        for rows in chunks(*a_MK.shape):
            out[rows] = (a_MK[rows].float() @ b_KN).mul_(scale).to(dtype)
        return out
    (rows, inner), columns = a_MK.shape, b_NK.shape[0]
    a_MK, b_NK = _padded(a_MK, inner), _padded(b_NK, inner, columns)
    one = torch.ones_like(scale)
    names: Any = torch
    out = names._scaled_mm(
        a_MK, b_NK.t(), scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast
    )
    return out[:rows, :columns] if out.shape[1] != columns else out


def coded_matmul(a_MK: Tensor, b_NK: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a b^T of codes, (M, N), times a scale: int8 in int32, small floats emulated.

    On CUDA int8 by the tensor cores, which want 17 rows or more and the other dimensions in
    multiples of 8: missing codes are zeros. Small floats in bf16 there and in fp32 elsewhere, which
    hold products of two codes exactly.
    """
    names: Any = torch
    if a_MK.dtype == torch.int8:
        rows, columns = a_MK.shape[0], b_NK.shape[0]
        if a_MK.is_cuda:
            inner = -a_MK.shape[1] % 8
            fill = torch.nn.functional.pad
            a_MK = fill(a_MK, (0, inner, 0, max(0, 17 - rows)))
            b_NK = fill(b_NK, (0, inner, 0, -columns % 8))
        whole = names._int_mm(a_MK, b_NK.t())[:rows, :columns]
    elif a_MK.is_cuda:
        whole = a_MK.to(torch.bfloat16) @ b_NK.to(torch.bfloat16).t()
    else:
        whole = a_MK.float() @ b_NK.float().t()
    if whole.is_cuda:
        return (whole * scale).to(dtype)
    out = torch.empty(whole.shape, dtype=dtype)
    for some in chunks(*whole.shape):
        out[some] = (whole[some] * scale).to(dtype)
    return out


def _padded(codes: Tensor, inner: int, rows: int = 0) -> Tensor:
    """Codes with zeros up to multiples of 16 columns, and rows where their number is given."""
    missing = -inner % 16, -rows % 16
    if not any(missing):
        return codes
    grown = torch.nn.functional.pad(codes.view(torch.uint8), (0, missing[0], 0, missing[1]))
    return grown.view(codes.dtype)


class GatherHooks(Protocol):
    """What is called around FSDP's gather of one parameter."""

    def before(self, shard: Tensor) -> Tensor:
        """What a rank sends of its shard, as many rows."""
        ...

    def after(self, gathered: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter that all rows together are, called once."""
        ...


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def extend_gather(root: nn.Module, module: nn.Module, hooks: GatherHooks) -> None:
    """Have FSDP under `root` gather `module.weight` through hooks.

    Its extension points are looked up as attributes of the sharded parameter's local tensor, once
    when the module is sharded and again at each gather: here they stand on the tensor itself, which
    stays a plain one for optimisers and checkpoints.
    """
    held = [
        held
        for unit in root.modules()
        if isinstance(unit, FSDPModule)
        for group in _param_groups(unit)
        for held in group.fsdp_params
        if held._module_info.module is module and held._module_info.param_name == "weight"
    ]
    if len(held) != 1:
        raise RuntimeError("FSDP holds its parameters in another way: cannot extend its gathers")
    local: Any = held[0]._sharded_local_tensor

    def pre(mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[Any, Any]:
        return (hooks.before(local),), None

    def post(
        outputs: tuple[Tensor, ...], metadata: Any, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        return None if out is not None else (hooks.after(outputs[0], dtype), ())

    local.fsdp_pre_all_gather, local.fsdp_post_all_gather = pre, post
    held[0]._init_extensions()


def _param_groups(unit: FSDPModule) -> list[Any]:
    """Groups of parameters of one FSDP unit: newer versions have several."""
    state: Any = unit._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    one = getattr(state, "_fsdp_param_group", None)
    return list(several) if several is not None else [one] if one is not None else []


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, and the reciprocal root mean square of each row, fp32."""
    return torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, eps)


def fused_rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight; on a CPU, which has no kernel for it, in fp32 operators."""
    if x.is_cuda:
        return torch.ops.aten._fused_rms_norm_backward(
            grad, x, list(weight.shape), rstd, weight, [True, True]
        )
    normed, wide = x.float() * rstd, grad.float()
    of_weight = (wide * normed).flatten(0, -2).sum(0)
    scaled = wide.mul_(weight.float())
    mean = (scaled * normed).mean(-1, keepdim=True)
    of_x = scaled.sub_(normed.mul_(mean)).mul_(rstd)
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


def operator_name(operator: Any) -> str:
    """The name of an operator without its namespace and overload, such as `allreduce_`."""
    return operator._schema.name.partition("::")[2]


def resolve_group(name: str) -> Any:
    """The process group that functional collectives know by this name."""
    from torch.distributed import distributed_c10d

    names: Any = distributed_c10d
    return names._resolve_process_group(name)


@functools.cache
def out_form(operator: Any) -> tuple[Any, str] | None:
    """The form of an operator that writes its one result into a given tensor, and the name of that
    argument; None where it has none, or only one that computes elsewhere and copies."""
    schema = operator._schema
    if len(schema.returns) != 1:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in schema.arguments]
    for name in operator.overloadpacket.overloads():
        form = getattr(operator.overloadpacket, name)
        outs = [argument.name for argument in form._schema.arguments if argument.is_out]
        rest = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        if len(outs) == 1 and rest == wanted:
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(form.name(), "CPU")
            return (form, outs[0]) if has_kernel else None
    return None


def tensor_at(
    memory: Tensor, start: int, dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    """A tensor with a storage of its own that lies in other memory (uint8, flat)."""
    num_bytes = size.numel() * dtype.itemsize
    own = torch.from_dlpack(memory[start : start + num_bytes])
    return own.view(dtype).as_strided(size, stride)


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


def local_box(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's part of a distributed tensor begins, in every dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offsets)


def destroy_process_groups() -> None:
    """End all process groups, and forget the meshes that DTensor knows over them.

    A mesh that is made anew equals the old one, and results that DTensor keeps by mesh would bring
    back names of groups that are gone.
    """
    dist.destroy_process_group()
    kept: Any = DTensor
    kept._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:
        clear()
