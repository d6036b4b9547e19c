"""FSDP gathers of weights as codes with one scale (HALO's HQ-FSDP), by its extension points.

Each rank rotates and casts its rows of a weight and sends one byte per element in place of two. The
scale is that of the whole weight: once per step, the largest values of all shards go through one
maximum over the ranks. Rows are whole on a rank, so that the codes are those of the whole weight,
bit for bit.

What a module then has for a parameter is `GatheredCodes`: it stands where the 16-bit copy would,
has its shape and dtype and gets its gradient, but holds codes alone. Only linears of
`halo_linear.py` know what to do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.hadamard import FORMATS, cast_low, scale_of, top
from .torch_compat import extend_gather, local_tensor


class GatheredCodes(Tensor):
    """A rotated weight (N, K) of which there are codes and a scale."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> GatheredCodes:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        found: GatheredCodes = make(cls, codes.shape, dtype=dtype, device=codes.device)
        found.codes, found.scale = codes, scale
        return found

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None: ...

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GatheredCodes({tuple(self.shape)}, {self.codes.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The same codes under another name; there are no values to compute with."""
        own = args[0]
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return cls(own.codes, own.scale, own.dtype)
        if func is aten.as_strided.default and tuple(args[1]) == tuple(own.shape):
            return cls(own.codes, own.scale, own.dtype)
        raise NotImplementedError(f"{func} of a weight that was gathered as codes")


class CodedGathers:
    """The weights of a rank that are gathered as codes of a format.

    `begin_step` comes before the first gather of a step.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, device: torch.device) -> None:
        self.name, self.group, self.device = name, group, device
        self.parameters: list[Tensor] = []
        self.scales = torch.ones(0, device=device)

    def add(self, root: nn.Module, linears: Sequence[nn.Linear]) -> None:
        """Have FSDP under `root` gather the weights of these linears as codes."""
        first = len(self.parameters)
        self.scales = torch.ones(first + len(linears), device=self.device)
        for index, linear in enumerate(linears, start=first):
            self.parameters.append(linear.weight)
            extend_gather(root, linear, _Hooks(self, index))

    def begin_step(self) -> None:
        """The scales of the weights as they are now: one maximum over the shards."""
        with torch.no_grad():
            shards = [local_tensor(parameter) for parameter in self.parameters]
            tops = torch.stack([top(shard, rotated=True) for shard in shards])
            tops = tops.nan_to_num_(nan=torch.inf)  # a maximum keeps it
            if self.group.size() > 1:
                dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=self.group)
            tops = torch.where(tops.isfinite(), tops, torch.nan)
            self.scales.copy_(scale_of(tops, self.name))


class _Hooks:
    """What FSDP calls around the gather of one weight."""

    def __init__(self, gathers: CodedGathers, index: int) -> None:
        self.gathers, self.index = gathers, index

    @property
    def scale(self) -> Tensor:
        """Of the step at hand."""
        return self.gathers.scales[self.index]

    def before(self, shard: Tensor) -> Tensor:
        """What a rank sends of its shard: bytes."""
        found = cast_low(shard, self.gathers.name, self.scale, rotated=True)
        assert found.codes_MK is not None
        return found.codes_MK.view(torch.uint8)

    def after(self, gathered: Tensor, dtype: torch.dtype) -> GatheredCodes:
        """The parameter that the bytes of all ranks are; later gathers fill the same bytes."""
        codes = gathered.view(FORMATS[self.gathers.name].codes)
        return GatheredCodes(codes, self.scale, dtype)
