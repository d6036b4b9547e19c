"""Trainable set: low-rank adapters on the linear layers, everything else frozen.

Each linear y = W x of a layer becomes y = W x + B A x with A of (rank, in) and B of (out, rank)
(Hu et al. 2021, LoRA, arXiv 2106.09685). Frozen weights have no gradient: their linears do no
weight-gradient matmul and save nothing, but A has x as its input, so x is saved all the same.
Gradients of activations are needed everywhere but in the embedding, which has nothing trainable
below it.

Under tensor parallelism a split input splits A and a split output splits B. After a split input
B A x is a partial sum, which the collective behind W x sums with it: adapters add none.

With a 4-bit base (Dettmers et al. 2023, QLoRA, arXiv 2305.14314) the linears' frozen weights are
stored as nf4 and converted to 16 bits before each use, in forward and in backward.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import InputError
from ..graph import Axes, Graph, Operator, Tensor
from ..rates import is_matmul

RANK = "lora_rank"
"""Axis label of the rank; `techniques.local_axes` gives its size."""
RANK_AXES: Axes = (RANK,)


TARGETS: dict[str, tuple[str, ...]] = {"qkv": ("wq", "wk", "wv"), "qv": ("wq", "wv")}
"""Linears by the name of the choice; `all` stands for every linear of a layer."""


def rewrite(graph: Graph, rank: int | None, base_dtype: str | None, targets: str = "all") -> Graph:
    """The graph with adapters on linears of layers and all other weights frozen."""
    _check(rank, base_dtype, targets)
    if rank is None:
        return graph
    operators: list[Operator] = []
    for op in map(_freeze, graph.operators):
        if graph.name == "layer" and is_adapted(op, targets):
            operators += _adapted(op, base_dtype)
        else:
            operators.append(op)
    if graph.name == "embedding":
        operators = [replace(op, backward_collectives=()) for op in operators]
    return replace(graph, operators=tuple(operators), weights=())


def is_adapted(op: Operator, targets: str = "all") -> bool:
    """Whether an operator of a layer gets adapters: linears, but no router."""
    if targets in TARGETS and op.name not in TARGETS[targets]:
        return False
    return op.kind == "linear" and "router" not in op.name


def is_adapter(op: Operator) -> bool:
    """Whether an operator is one of the two matmuls of an adapter."""
    return op.kind == "linear" and any(RANK in weight.axes for weight in op.weights)


def _check(rank: int | None, base_dtype: str | None, targets: str) -> None:
    if targets not in ("all", *TARGETS):
        raise InputError("lora.targets", targets, "unknown choice",
                         f"use all, {', '.join(TARGETS)}")  # fmt: skip
    if rank is not None and rank < 1:
        raise InputError("lora.rank", rank, "not positive", "give 1 or more")
    if base_dtype is None:
        return
    if rank is None:
        raise InputError("lora.base", base_dtype, "only frozen weights can be stored so",
                         "give lora.rank too")  # fmt: skip
    if base_dtype != "nf4":
        raise InputError("lora.base", base_dtype, "unknown storage of frozen weights",
                         "use nf4 or leave it out")  # fmt: skip


def _freeze(op: Operator) -> Operator:
    """The operator with weights that do not train: matmuls save no input for their gradient."""
    if not op.weights:
        return op
    frozen = tuple(replace(weight, trainable=False) for weight in op.weights)
    if op.kind == "embedding":
        return replace(op, kind="embedding_frozen", weights=frozen, saves=())
    if op.kind == "grouped_linear":
        return replace(op, kind="grouped_linear_frozen", weights=frozen, saves=())
    if is_matmul(op.kind):
        return replace(op, weights=frozen, saves=())
    return replace(op, weights=frozen)


def _adapted(op: Operator, base_dtype: str | None) -> list[Operator]:
    """A frozen linear, its adapter, and their sum under the names of the linear's outputs."""
    x, name = op.inputs[0], op.name
    tokens, width_out, width_in = op.price_axes
    base = tuple(replace(y, name=f"{y.name}.base") for y in op.outputs)
    middle = Tensor(name=f"{name}.lora_a.out", axes=(*tokens, RANK))
    update = Tensor(name=f"{name}.lora_b.out", axes=(*tokens, *width_out))
    operators: list[Operator] = []
    frozen = replace(op, outputs=base)
    if base_dtype is not None:
        matrix, *biases = op.weights
        stored = replace(matrix, dtype=base_dtype)
        frozen = replace(frozen, weights=(stored, *biases))
        operators.append(_dequantize(stored))
    return [
        *operators,
        frozen,
        _linear(f"{name}.lora_a", x, middle, (tokens, RANK_AXES, width_in)),
        _linear(f"{name}.lora_b", middle, update, (tokens, width_out, RANK_AXES)),
        Operator(
            name=f"{name}.lora_add",
            kind="add",
            price_axes=(update.axes,),
            inputs=(*base, update),
            outputs=op.outputs,
        ),
    ]


def _linear(name: str, x: Tensor, out: Tensor, price_axes: tuple[Axes, Axes, Axes]) -> Operator:
    _, width_out, width_in = price_axes
    weight = Tensor(name=f"{name}.weight", axes=(*width_out, *width_in), dtype="param")
    return Operator(
        name=name,
        kind="linear",
        price_axes=price_axes,
        inputs=(x,),
        outputs=(out,),
        saves=(x,),
        weights=(weight,),
    )


def _dequantize(stored: Tensor) -> Operator:
    return Operator(
        name=f"{stored.name}.dequantize",
        kind="dequantize",
        price_axes=(stored.axes,),
        inputs=(stored,),
        outputs=(Tensor(name=f"{stored.name}.dequantized", axes=stored.axes),),
        grad_inputs=False,
    )
