"""Which part of which global tensor every local tensor of a trainer is.

A parameter has one global name and shape in every layout. What a rank stores of it is one box:
tensor parallelism cuts one dimension evenly, FSDP cuts the first dimension of that cut as
`torch.chunk` does, expert parallelism the first into equal runs of experts, a pipeline leaves whole
parameters to other ranks. Moments of the optimiser lie
like their parameters. A checkpoint holds boxes under global names, so that it can be read into any
other set of boxes.

State whose shape is not its parameter's (quantised moments and their scales) belongs to its box: it
is stored under a name that says which, and fits only where a rank holds just that box again.

Replicas that train apart differ between meetings: each stores parameters and moments under names of
its own, and what they keep in common (`Outer.state`) once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..torch_compat import DTensor, local_box
from ..trainer import Trainer, local

LOSSES = "losses"
PARAMETER, BUFFER, OPTIMIZER, OUTER = "parameter", "buffer", "optimizer", "outer"
APART = "@replica-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A local tensor as a box of a global one: `tensor` is [offset, offset + size) in every dim."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]


def whole(tensor: Tensor) -> Shard:
    """A tensor that every rank holds in full; a number becomes a vector of one."""
    tensor = tensor.detach()
    flat = tensor.reshape(1) if tensor.dim() == 0 else tensor
    return Shard(tensor=flat, shape=tuple(flat.shape), offsets=(0,) * flat.dim())


def box_of(trainer: Trainer, name: str, parameter: Tensor) -> Shard:
    """The box of a parameter, or of anything cut like it."""
    part = local(parameter.detach())
    offsets = [0] * part.dim()
    if isinstance(parameter, DTensor):
        offsets = list(local_box(parameter))
    shape = list(parameter.shape)
    if name in trainer.tp_dims:
        dim = trainer.tp_dims[name]
        offsets[dim] += trainer.coordinates["tp"] * shape[dim]
        shape[dim] *= trainer.mesh.tp
    experts = trainer.experts
    if experts is not None and experts.owns(name):  # in order: `support.check_kept`
        offsets[0] += experts.ep_rank * shape[0]
        shape[0] *= trainer.mesh.ep
    return Shard(tensor=part, shape=tuple(shape), offsets=tuple(offsets))


def named_parameters(trainer: Trainer) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank by global name."""
    for piece in trainer.pieces:
        yield from piece.named_parameters()


def whose(trainer: Trainer) -> str:
    """What names of a rank's tensors end with: its replica, where replicas train apart and each has
    tensors of its own."""
    return "" if trainer.outer is None else f"{APART}{trainer.coordinates['dp_replicate']}"


def model_state(trainer: Trainer) -> dict[str, Shard]:
    """Parameters and persistent buffers."""
    own = whose(trainer)
    state = {
        f"{PARAMETER}.{name}{own}": box_of(trainer, name, parameter)
        for name, parameter in named_parameters(trainer)
    }
    for piece in trainer.pieces:
        kept = piece.state_dict(keep_vars=True)
        for name, buffer in piece.named_buffers():
            if name in kept:
                state[f"{BUFFER}.{name}"] = whole(buffer)
    return state


def optimizer_state(trainer: Trainer) -> dict[str, Shard]:
    """What the optimiser keeps of every parameter; empty before its first step."""
    state: dict[str, Shard] = {}
    own = whose(trainer)
    for name, parameter in named_parameters(trainer):
        box = box_of(trainer, name, parameter)
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                place = f"{OPTIMIZER}.{name}.{key}{own}"
                state |= _optimizer_entry(trainer, place, name, value, box)
    return state


def outer_state(trainer: Trainer) -> dict[str, Shard]:
    """What the meetings of replicas that train apart keep, the same in all of them."""
    state: dict[str, Shard] = {}
    if trainer.outer is None:
        return state
    boxes = {name: box_of(trainer, name, p) for name, p in named_parameters(trainer)}
    for what, name, part in trainer.outer.state():
        box = boxes[name]
        state[f"{OUTER}.{name}.{what}"] = Shard(tensor=part, shape=box.shape, offsets=box.offsets)
    return state


def _optimizer_entry(
    trainer: Trainer, place: str, name: str, value: Tensor, box: Shard
) -> dict[str, Shard]:
    part = local(value.detach())
    if part.dim() == 0:
        return {place: whole(part)}
    if part.shape == box.tensor.shape:
        return {place: box_of(trainer, name, value)}
    where = ",".join(f"{o}+{n}" for o, n in zip(box.offsets, box.tensor.shape, strict=True))
    return {f"{place}[{where}]": whole(part)}


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimiser make its state, as a step without gradients and learning rate does."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
