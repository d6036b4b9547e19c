"""Initial parameters that depend on the seed and the parameter's name, not on the layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model import Model
from .experts.parallel import ExpertParallel
from .frozen.base import Base
from .frozen.stored import STORED, Stored, checked
from .torch_compat import DTensor

STD = 0.02
MATRICES = 3
"""Dimensions of the weights of several experts."""


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and the parameter's global name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def full_parameter(
    name: str,
    shape: tuple[int, ...],
    model: Model,
    seed: int,
    device: torch.device,
    experts: Sequence[int] | None = None,
) -> Tensor:
    """The whole initial parameter, fp32; of several experts' weights those of `experts` alone.

    Norm weights 1, biases 0, matrices normal with standard deviation 0.02, those that write into
    the residual stream divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3). Each expert
    has a seed of its own, so that a rank makes no other. Adapters begin as nothing: B is 0, and A
    normal with standard deviation 1 / sqrt(in).
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith("lora_b.weight"):
        return torch.zeros(shape, device=device)
    if name.endswith("lora_a.weight"):
        return _normal(name, shape, shape[1] ** -0.5, seed, device)
    residual = name.endswith(("wo.weight", "down.weight"))
    std = STD / math.sqrt(2 * model.num_layers) if residual else STD
    if len(shape) == MATRICES:
        each = range(shape[0]) if experts is None else experts
        names = [f"{name}.{expert}" for expert in each]
        return torch.stack([_normal(own, shape[1:], std, seed, device) for own in names])
    return _normal(name, shape, std, seed, device)


def _normal(
    name: str, shape: tuple[int, ...], std: float, seed: int, device: torch.device
) -> Tensor:
    generator = torch.Generator(device).manual_seed(parameter_seed(seed, name))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def local_part(full: Tensor, parameter: Tensor, tp_dim: int | None, tp: tuple[int, int]) -> Tensor:
    """The part of `full` that this rank stores: cut by tp (rank, size), then as FSDP places it.

    Both cut as `torch.chunk` does; FSDP's last ranks may hold nothing of a small parameter.
    """
    if tp_dim is not None:
        full = full.chunk(tp[1], tp_dim)[tp[0]]
    if not isinstance(parameter, DTensor):
        return full
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard():
            dim, mesh = getattr(placement, "dim", 0), parameter.device_mesh
            parts, index = full.chunk(mesh.size(axis), dim), mesh.get_local_rank(axis)
            full = parts[index] if index < len(parts) else full.narrow(dim, 0, 0)
    return full


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a piece lies over the ranks of tensor parallelism."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of parameters before any sharding."""
    tp_dims: Mapping[str, int]
    tp: tuple[int, int]
    """(rank, ranks)."""


@torch.no_grad()
def initialise(
    piece: nn.Module,
    model: Model,
    seed: int,
    cut: Cut,
    device: torch.device,
    experts: ExpertParallel | None = None,
    base: Base | None = None,
) -> None:
    """Fill a piece that has been allocated; frozen parameters come from `base`, if there is one."""

    def full(name: str, trains: bool, own: Sequence[int] | None = None) -> Tensor:
        shape = cut.shapes[name]
        if base is not None and not trains:
            return base.parameter(name, shape).to(device)
        return full_parameter(name, shape, model, seed, device, own)

    for path, module in piece.named_modules():
        if isinstance(module, Stored):
            weight = f"{path.removesuffix('.stored')}.weight"
            parts = None if base is None else base.stored(path, module)
            if parts is None:
                parts = module.bytes_of(checked(weight, full(weight, False)))
            for name, parameter in module.named_parameters():
                _fill(parameter, parts[name].to(device), None, cut.tp)
    for name, parameter in piece.named_parameters():
        if STORED not in name:
            own = experts.experts_of(name) if experts is not None else None
            whole = full(name, parameter.requires_grad, own)
            _fill(parameter, whole, cut.tp_dims.get(name), cut.tp)


def _fill(parameter: Tensor, full: Tensor, tp_dim: int | None, tp: tuple[int, int]) -> None:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(local_part(full, parameter, tp_dim, tp))
