"""Trainable set: low-rank adapters on the linear layers, everything else frozen.

Each linear y = W x of a layer becomes y = W x + B A x with A of (rank, in) and B of (out, rank)
(Hu et al. 2021, LoRA, arXiv 2106.09685). Frozen weights have no gradient: their linears do no
weight-gradient matmul and save nothing, but A has x as its input, so x is saved all the same.
Gradients of activations are needed everywhere but in the embedding, which has nothing trainable
below it.

Under tensor parallelism a split input splits A and a split output splits B. After a split input
B A x is a partial sum, which the collective behind W x sums with it: adapters add none.

The frozen weights of all linears of a layer may be stored in fewer bits, `base`: nf4 (Dettmers et
al. 2023, QLoRA, arXiv 2305.14314) or gptqB_gG, B bits on a grid per G inputs of an output (Frantar
et al. 2022, GPTQ, arXiv 2210.17323). They are converted to the dtype of use before each use, in
forward and in backward.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...cluster import DTYPE_BYTES
from ...errors import InputError
from ..graph import Array, Axes, Graph, Operator, Sizes, Tensor, volume
from ..options import Options
from ..rates import is_matmul

RANK = "lora_rank"
"""Axis label of the rank; `techniques.local_axes` gives its size."""
RANK_AXES: Axes = (RANK,)


BASES = tuple(name for name in DTYPE_BYTES if name.startswith(("nf4", "gptq")))
"""Storages of the frozen weights of linears, where it is not the dtype of use."""
NF4_BLOCK, NF4_GROUP = 64, 256
"""Weights of an 8-bit scale, and 8-bit scales of one in fp32."""
TARGETS: dict[str, tuple[str, ...]] = {"qkv": ("wq", "wk", "wv"), "qv": ("wq", "wv")}
"""Linears by the name of the choice; `all` stands for every linear of a layer."""


def rewrite(graph: Graph, rank: int | None, base_dtype: str | None, targets: str = "all") -> Graph:
    """The graph with adapters on linears of layers and all other weights frozen."""
    _check(rank, base_dtype, targets)
    if rank is None:
        return graph
    operators: list[Operator] = []
    for op in map(_freeze, graph.operators):
        if graph.name != "layer":
            operators.append(op)
            continue
        before, frozen = _stored(op, base_dtype)
        operators += [*before, *(_adapted(frozen) if is_adapted(op, targets) else [frozen])]
    if graph.name == "embedding":
        operators = [replace(op, backward_collectives=()) for op in operators]
    return replace(graph, operators=tuple(operators), weights=())


def is_adapted(op: Operator, targets: str = "all") -> bool:
    """Whether an operator of a layer gets adapters: linears, but no router."""
    if targets in TARGETS and op.name not in TARGETS[targets]:
        return False
    return op.kind == "linear" and "router" not in op.name


def is_stored(op: Operator) -> bool:
    """Whether an operator of a layer has a matrix that `base` stores."""
    return op.kind.startswith(("linear", "grouped_linear")) and "router" not in op.name


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
    if base_dtype not in BASES:
        raise InputError("lora.base", base_dtype, "unknown storage of frozen weights",
                         f"use {', '.join(BASES)} or leave it out")  # fmt: skip


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
    # what a composed norm multiplies its weight with is kept for the weight's gradient alone
    saves = tuple(t for t in op.saves if t.name != f"{op.name}.normalised")
    return replace(op, weights=frozen, saves=saves)


def _stored(op: Operator, base_dtype: str | None) -> tuple[list[Operator], Operator]:
    """What converts the matrix of a frozen operator, and the operator, beside which the converted
    matrix stands while it runs."""
    if base_dtype is None or not is_stored(op):
        return [], op
    matrix, *biases = op.weights
    stored = replace(matrix, dtype=base_dtype)
    before = _dequantize(stored)
    after = replace(op, weights=(stored, *biases), held_forward=before.outputs,
                    held_backward=before.outputs)  # fmt: skip
    return [before], after


def _adapted(op: Operator) -> list[Operator]:
    """A frozen linear, its adapter, and their sum under the names of the linear's outputs."""
    x, name = op.inputs[0], op.name
    tokens, width_out, width_in = op.price_axes
    base = tuple(replace(y, name=f"{y.name}.base") for y in op.outputs)
    middle = Tensor(name=f"{name}.lora_a.out", axes=(*tokens, RANK))
    update = Tensor(name=f"{name}.lora_b.out", axes=(*tokens, *width_out))
    return [
        replace(op, outputs=base),
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


def spared_bytes(graph: Graph, sizes: Sizes, options: Options, *, experts: bool = False) -> Array:
    """Bytes that stored weights take less than in the dtype of use, of experts or of all others.

    The fp32 scales of nf4 are those of the whole matrix on every tensor-parallel rank.
    """
    used, total = DTYPE_BYTES[options.tensor_dtype], np.zeros(1)
    for weight in graph.weights:
        if weight.dtype not in BASES or ("experts" in weight.axes) != experts:
            continue
        count = volume(weight.axes, sizes)
        stored = count * DTYPE_BYTES[weight.dtype]
        if weight.dtype == "nf4":
            parts = sizes["tp"] if len(weight.axes) > 1 else 1.0
            blocks = count / NF4_BLOCK
            stored = count / 2 + blocks + 4 * np.ceil(blocks * parts / NF4_GROUP)
        total = total + count * used - stored
    return total
