"""Tensor parallelism: matrices cut by heads, ffn width and vocabulary; all tensors are local.

Each rank holds its cut of a matrix as a plain parameter, so that DDP, FSDP2 and the fused optimiser
treat it like any other, and no operator pays DTensor's host time. What DTensor's styles would
communicate is said here by two conjugate pairs (Shoeybi et al. 2019, section
3; Korthikanti et al. 2022, section 4.2), once around attention and once around the MLP, here as
forward / backward:

    without sequence parallelism   enter  identity   / all-reduce
                                   leave  all-reduce / identity
    with sequence parallelism      enter  all-gather / reduce-scatter
                                   leave  reduce-scatter / all-gather

Latent attention enters with its low-rank tensors instead, whose projections are whole. A mixture of
experts enters and leaves once, without sequence parallelism; with it only the expert that every
token passes does, and the routed ones exchange rows (`experts/trip.py`).

With it, hidden states between modules hold a part of the sequence, and the
gradients of uncut parameters (norms, positions, biases after a reduction) are sums over the group
that the trainer makes once per step.

Shape suffixes as in `decoder.py`; a part of the sequence is S/t.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import Block, Decoder, Mlp
from .experts.layer import Moe
from .linear import Linear
from .torch_compat import DeviceMesh, all_gather_single, reduce_scatter_single
from .vocab_loss import vocab_loss

COLUMNS = (
    "attention.wq", "attention.wk", "attention.wv", "attention.q_b", "attention.kv_b",
    "mlp.gate", "mlp.up", "mlp.shared.gate", "mlp.shared.up",
)  # fmt: skip
ROWS = ("attention.wo", "mlp.down", "mlp.shared.down")
EXPERTS = {"mlp.experts.gate": 1, "mlp.experts.up": 1, "mlp.experts.down": 2}
"""Dimension along which tp cuts the weights of routed experts."""
Group = dist.ProcessGroup


def gather_sequence(part_BSE: Tensor, group: Group) -> Tensor:
    """The whole sequence (B, S, E) from the parts of all ranks: one all-gather."""
    size = group.size()
    batch, length, width = part_BSE.shape
    stacked = part_BSE.new_empty(size * batch, length, width)
    all_gather_single(stacked, part_BSE.contiguous(), group=group)
    parts = stacked.view(size, batch, length, width).transpose(0, 1)
    return parts.reshape(batch, size * length, width)


def scatter_sequence(x_BSE: Tensor, group: Group) -> Tensor:
    """This rank's part (B, S/t, E) of the sum over ranks: one reduce-scatter."""
    size = group.size()
    batch, length, width = x_BSE.shape
    parts = x_BSE.view(batch, size, length // size, width).transpose(0, 1).contiguous()
    out = x_BSE.new_empty(batch, length // size, width)
    reduce_scatter_single(out, parts.view(-1, length // size, width), group=group)
    return out


def sum_in_place(x: Tensor, group: Group) -> Tensor:
    """`x`, now the sum over ranks: one all-reduce."""
    dist.all_reduce(x, group=group)
    return x


class Enter(torch.autograd.Function):
    """What a cut matrix reads: the whole input; in backward the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        return gather_sequence(x_BSE, group) if sequence_parallel else x_BSE.view_as(x_BSE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_BSE = grads[0].contiguous()
        if ctx.sequence_parallel:
            return scatter_sequence(grad_BSE, ctx.group), None, None
        return sum_in_place(grad_BSE, ctx.group), None, None


class Leave(torch.autograd.Function):
    """What follows a cut matrix: the sum of the ranks' outputs; in backward the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, group: Group, sequence_parallel: bool) -> Tensor:
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        if sequence_parallel:
            return scatter_sequence(x_BSE, group)
        ctx.mark_dirty(x_BSE)
        return sum_in_place(x_BSE, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.sequence_parallel:
            return gather_sequence(grads[0], ctx.group), None, None
        return grads[0], None, None


def row_leave(linear: Linear, leave: Callable[[Tensor], Tensor], partial_BSE: Tensor) -> Tensor:
    """Partial products summed, then the bias, which is whole."""
    out = leave(partial_BSE)
    return out if linear.bias is None else out.add_(linear.bias)


def embedding_forward(
    embedding: nn.Embedding, rank: int, leave: Callable[[Tensor], Tensor], tokens_BS: Tensor
) -> Tensor:
    """Rows of a table cut along the vocabulary: zeros where another rank has the row, summed."""
    rows = embedding.weight.shape[0]
    local_BS = tokens_BS - rank * rows
    elsewhere_BS = (local_BS < 0) | (local_BS >= rows)
    x_BSE = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), embedding.weight)
    return leave(x_BSE.masked_fill_(elsewhere_BS[..., None], 0.0))


def enter_first(enter: Callable[[Tensor], Tensor], _: nn.Module, args: tuple[Any, ...]) -> Any:
    """A forward pre-hook: the first argument enters."""
    return (enter(args[0]), *args[1:])


def apply(
    piece: Decoder, mesh: DeviceMesh, sequence_parallel: bool, expert_tp: int = 1
) -> dict[str, int]:
    """Cut a piece (on the meta device) over the tp mesh, in place; experts by `expert_tp`.

    Returns the dimension along which each cut parameter was cut, by name.
    """
    rank, group = mesh.get_local_rank(), mesh.get_group()
    cut: dict[str, int] = {}

    def enter(x: Tensor) -> Any:
        return Enter.apply(x, group, sequence_parallel)

    def leave(x: Tensor) -> Any:
        return Leave.apply(x, group, sequence_parallel)

    for index, block in piece.blocks.items():
        for name in COLUMNS + ROWS:
            for parameter in _cut_linear(block, name, mesh.size()):
                cut[f"blocks.{index}.{parameter}"] = 1 if name in ROWS else 0
        if expert_tp > 1:
            for parameter, dim in _cut_experts(block, expert_tp):
                cut[f"blocks.{index}.{parameter}"] = dim
        assert isinstance(block, Block)
        _edges(block, enter, leave, sequence_parallel)
    if hasattr(piece, "embedding"):
        _cut_parameter(piece.embedding, "weight", 0, mesh.size())
        cut["embedding.weight"] = 0
        _replace_forward(piece.embedding, partial(embedding_forward, piece.embedding, rank, leave))
    if piece.is_last:
        head = piece.tied_head if piece.model.tied_embeddings else piece.head
        if isinstance(head, nn.Linear):
            _cut_parameter(head, "weight", 0, mesh.size())
            cut["head.weight"] = 0
        head.register_forward_pre_hook(partial(enter_first, enter))
        piece.loss = partial(vocab_loss, group, rank)
    if sequence_parallel:
        piece.sequence_shard = (rank, mesh.size())
    return cut


def _edges(
    block: Block,
    enter: Callable[[Tensor], Tensor],
    leave: Callable[[Tensor], Tensor],
    sequence_parallel: bool,
) -> None:
    """Let a block's tensors enter its cut matrices, and their outputs leave."""
    for name in ROWS:
        if name in dict(block.named_modules()):
            linear = block.get_submodule(name)
            assert isinstance(linear, Linear)
            linear.bias_waits = True
    attention, mlp = block.attention, block.mlp
    attention.enter, attention.leave = enter, partial(row_leave, attention.wo, leave)
    if isinstance(mlp, Moe) and not sequence_parallel:  # shared and routed experts, summed at once
        mlp.enter, mlp.leave = enter, leave
        return
    dense = mlp.shared if isinstance(mlp, Moe) else mlp
    if isinstance(dense, Mlp):
        dense.enter, dense.leave = enter, partial(row_leave, dense.down, leave)


def _cut_experts(block: nn.Module, size: int) -> list[tuple[str, int]]:
    """Cut the weights of a block's routed experts, if it has any; their names and dimensions."""
    modules = dict(block.named_modules())
    found = [(name, dim) for name, dim in EXPERTS.items() if name in modules]
    for name, dim in found:
        _cut_parameter(modules[name], "weight", dim, size)
    return [(f"{name}.weight", dim) for name, dim in found]


def _replace_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


def _cut_linear(block: nn.Module, name: str, size: int) -> list[str]:
    """Cut a linear of a block, if there is one of that name; the names of what was cut.

    Of an adapter that half is cut which has the cut dimension: B of cut outputs, A of cut inputs.
    """
    if name not in dict(block.named_modules()):
        return []
    linear = block.get_submodule(name)
    assert isinstance(linear, Linear)
    dim = 1 if name in ROWS else 0
    _cut_parameter(linear, "weight", dim, size)
    cut = [f"{name}.weight"]
    half = "lora_a" if name in ROWS else "lora_b"
    if linear.lora_a is not None:
        _cut_parameter(linear.get_submodule(half), "weight", dim, size)
        cut.append(f"{name}.{half}.weight")
    if name in ROWS or linear.bias is None:
        return cut
    _cut_parameter(linear, "bias", 0, size)
    return [*cut, f"{name}.bias"]


def _cut_parameter(module: nn.Module, name: str, dim: int, size: int) -> None:
    whole = module.get_parameter(name)
    shape = list(whole.shape)
    shape[dim] //= size
    part = torch.empty(shape, dtype=whole.dtype, device="meta")
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
