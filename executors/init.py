"""Initial parameters that depend on the seed and the parameter's name, not on the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ..model import Model
from .torch_compat import DTensor

STD = 0.02


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and the parameter's global name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def full_parameter(
    name: str, shape: tuple[int, ...], model: Model, seed: int, device: torch.device
) -> Tensor:
    """The whole initial parameter, fp32.

    Norm weights 1, biases 0, matrices normal with standard deviation 0.02, those that write into
    the residual stream divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3).
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(parameter_seed(seed, name))
    residual = name.endswith(("wo.weight", "down.weight"))
    std = STD / math.sqrt(2 * model.num_layers) if residual else STD
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def local_part(full: Tensor, parameter: Tensor, tp_dim: int | None, tp: tuple[int, int]) -> Tensor:
    """The part of `full` that this rank stores: cut by tp (rank, size), then by FSDP along dim 0.

    Both cut as `torch.chunk` does; FSDP's last ranks may hold nothing of a small parameter.
    """
    if tp_dim is not None:
        full = full.chunk(tp[1], tp_dim)[tp[0]]
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh  # replicas, where there are any, and shards
    parts, index = full.chunk(mesh.shape[-1]), mesh.get_local_rank(mesh.ndim - 1)
    return parts[index] if index < len(parts) else full[:0]


@torch.no_grad()
def initialise(
    piece: nn.Module,
    model: Model,
    seed: int,
    shapes: dict[str, tuple[int, ...]],
    tp_dims: dict[str, int],
    tp: tuple[int, int],
    device: torch.device,
) -> None:
    """Fill a piece that has been allocated; `shapes` are those before any sharding."""
    for name, parameter in piece.named_parameters():
        full = full_parameter(name, shapes[name], model, seed, device)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(local_part(full, parameter, tp_dims.get(name), tp))
