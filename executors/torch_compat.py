"""Private and recent torch names, but for those of its pipelines (`torch_pipelining.py`); written
for torch 2.11 to 2.13."""

from __future__ import annotations

import functools
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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw as adamw_update

from ..kernels.fp8_cast import chunks

if TYPE_CHECKING:  # which is built on this module
    pass

__all__ = [
    "CPUOffloadPolicy",
    "DTensor",
    "DeviceMesh",
    "FSDPModule",
    "MixedPrecisionPolicy",
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
