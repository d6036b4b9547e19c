"""Compute precision: gives every tensor its dtype.

Parameters at rest, gradients at rest and optimiser states stay fp32; matmuls, attention and the
tensors between them use the compute dtype; norms and the loss work in fp32 inside.

Below 16 bits (fp8, mxfp8, nvfp4) only the linears of layers use the compute dtype, and tensors stay
bf16: not the head, attention, the embedding, routers or adapters. The input of those linears is
quantised once, however many of them read it, and the gradient of each output in backward. A plan
may name the linears (`linears`); which are worth it says `costmodel/linears.py`.
"""

from __future__ import annotations

from dataclasses import replace

from ...cluster import Device
from ...errors import InputError, unknown_name
from ..graph import Collective, Graph, Operator, Tensor
from ..options import Options
from . import halo
from .lora import is_adapter

LOW_PRECISION = {
    "fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4", "int8": "int8", "fp6": "bf16", "fp4": "bf16",
}  # fmt: skip
"""Compute dtypes below 16 bits, and the dtype whose matmul rate they run at."""
WIDE = ("fp32", "fp16", "bf16")
BY_SHAPE = ("by-shape",)
"""In place of names: each linear runs in whichever is faster at its shape."""
CAST, WEIGHT_CAST = ".quantize", ".quantize_weight"
"""Ends of the names of casts: of a matmul's input, and of its weight."""
QUANTIZE = {
    "tensorwise": "quantize", "rowwise": "quantize_rowwise", "coat": "quantize",
    **{recipe: halo.cast_kind(recipe) for recipe in halo.LEVELS},
}  # fmt: skip
"""Operator kind of a recipe's casts. coat takes the maximum in the producer's kernel and writes a
transposed copy instead: the same traffic as tensorwise."""


def rewrite(graph: Graph, options: Options) -> Graph:
    """The graph with dtypes in place of the open ones, and casts around low-precision matmuls."""
    if options.compute not in (*WIDE, *LOW_PRECISION):
        raise InputError("precision", options.compute, "unknown dtype of matmuls",
                         f"use {', '.join((*WIDE, *LOW_PRECISION))}")  # fmt: skip
    if options.recipe not in QUANTIZE:
        raise InputError("precision.recipe", options.recipe, "unknown scaling of matmuls",
                         f"use {', '.join(QUANTIZE)}")  # fmt: skip
    halo.check(options.compute, options.recipe)
    settled = _settle(graph, options.tensor_dtype)
    if graph.name != "layer":
        return settled
    _check_linears(graph, options)
    return _lower(settled, options) if options.compute in LOW_PRECISION else settled


def _check_linears(graph: Graph, options: Options) -> None:
    if options.linears is None or options.linears == BY_SHAPE:
        return
    if options.compute not in LOW_PRECISION:
        raise InputError("precision.linears", ", ".join(options.linears),
                         f"all matmuls run in {options.compute}",
                         f"use compute {', '.join(LOW_PRECISION)}, or leave it out")  # fmt: skip
    known = {op.name for op in graph.operators if is_low_precision(op)}
    for name in options.linears:
        if name not in known:
            raise unknown_name("precision.linears", name, known)


def refuse(options: Options, device: Device) -> InputError | None:
    """Why a device cannot have the compute dtype of its matmuls; None where it can.

    CPUs emulate fp8 in fp32 matmuls, with the same numerics and no gain; fp6 and fp4 with one scale
    are emulated everywhere.
    """
    if options.compute not in LOW_PRECISION:
        return None
    rate = LOW_PRECISION[options.compute]
    if options.compute in halo.EMULATED:
        return None
    if device.kind == "cpu":
        if options.compute in ("fp8", "int8"):
            return None
        return InputError("precision", options.compute, "CPUs emulate fp8 alone, and run int8",
                          "use fp8 or int8, or a GPU")  # fmt: skip
    least = {"int8": (8, 0), "fp8": (8, 9)}.get(options.compute, (10, 0))
    if rate in device.peak_flops_per_s and (device.capability or least) >= least:
        return None
    needs = ".".join(map(str, least))
    return InputError("precision", options.compute,
                      f"{device.name} has no {rate} matmuls (compute capability {needs} or later)",
                      "use bf16, or another GPU")  # fmt: skip


def is_low_precision(op: Operator) -> bool:
    """Whether an operator of a layer may run below 16 bits."""
    is_linear = op.kind == "linear" or op.kind.startswith("grouped")
    return is_linear and "router" not in op.name and not is_adapter(op)


def is_chosen(op: Operator, options: Options) -> bool:
    """Whether it does, under the linears that a plan names; `BY_SHAPE` leaves all as candidates."""
    named = options.linears is None or options.linears == BY_SHAPE or op.name in options.linears
    if options.recipe in halo.LEVELS and op.kind != "linear":
        return False
    return is_low_precision(op) and named


def cast_weights(graph: Graph) -> Graph:
    """The graph with weights of matmuls below 16 bits cast at every use, as our executors do.

    Others cast them once per step.
    """
    operators: list[Operator] = []
    for op in graph.operators:
        if op.compute is not None and is_low_precision(op):
            weight = op.weights[0]
            low = replace(weight, name=f"{weight.name}.quantized", dtype=op.compute)
            operators.append(
                Operator(
                    name=f"{op.name}{WEIGHT_CAST}",
                    kind="quantize_weight",
                    price_axes=(weight.axes,),
                    inputs=(weight,),
                    outputs=(low,),
                    grad_inputs=False,
                )
            )
        operators.append(op)
    return replace(graph, operators=tuple(operators), weights=graph.weights)


def keep_operands(graph: Graph, dtype: str) -> Graph:
    """The graph with matmuls below 16 bits keeping their quantised input for the weight gradient.

    As Transformer Engine does; others keep the 16-bit input and quantise it again.
    """

    def operator(op: Operator) -> Operator:
        if op.compute is None or op.kind.startswith("quantize"):
            return op
        inputs = {t.name for t in op.inputs}
        saves = tuple(
            replace(t, name=f"{t.name}.quantized", dtype=dtype) if t.name in inputs else t
            for t in op.saves
        )
        return replace(op, saves=saves)

    return replace(graph, operators=tuple(map(operator, graph.operators)))


def _settle(graph: Graph, dtype: str) -> Graph:
    """The graph with `dtype` (fp32, bf16, fp16) in place of the open ones."""

    def tensor(t: Tensor) -> Tensor:
        return replace(t, dtype=dtype) if t.dtype in ("compute", "param") else t

    def collective(c: Collective) -> Collective:
        return replace(c, buffer=tensor(c.buffer))

    def held(some: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        there = [t for t in some if t.dtype != "upcast" or dtype != "fp32"]
        return tuple(tensor(replace(t, dtype="fp32") if t.dtype == "upcast" else t) for t in there)

    def operator(op: Operator) -> Operator:
        return replace(
            op,
            inputs=tuple(map(tensor, op.inputs)),
            outputs=tuple(map(tensor, op.outputs)),
            saves=_saves(op, dtype, tuple(map(tensor, op.saves))),
            weights=tuple(map(tensor, op.weights)),
            forward_collectives=tuple(map(collective, op.forward_collectives)),
            backward_collectives=tuple(map(collective, op.backward_collectives)),
            held_forward=held(op.held_forward),
            held_backward=held(op.held_backward),
        )

    return replace(
        graph,
        operators=tuple(map(operator, graph.operators)),
        boundary=tensor(graph.boundary),
        weights=tuple(map(tensor, graph.weights)),
    )


def _saves(op: Operator, dtype: str, saves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Composed norms keep an fp32 copy of a 16-bit input instead of the input itself."""
    upcast = [t for t in saves if t.dtype == "upcast"]
    if not upcast:
        return saves
    kept = [t for t in saves if t.dtype != "upcast"]
    if dtype == "fp32":
        return tuple(kept)
    copies = [replace(t, dtype="fp32") for t in upcast]
    return tuple(copies + [t for t in kept if t.name != op.inputs[0].name])


def _lower(graph: Graph, options: Options) -> Graph:
    """Linears in low precision, with one cast before the first reader of each distinct input."""
    readers: dict[str, list[Operator]] = {}
    for op in graph.operators:
        if is_chosen(op, options):
            readers.setdefault(op.inputs[0].name, []).append(op)
    operators: list[Operator] = []
    for op in graph.operators:
        if not is_chosen(op, options):
            operators.append(op)
            continue
        group = readers[op.inputs[0].name]
        if group[0] is op:
            operators.append(_quantize(op.inputs[0], group, options))
        if options.recipe in halo.LEVELS:
            operators += halo.lower(op, options.recipe, LOW_PRECISION[options.compute])
        else:
            operators.append(replace(op, compute=LOW_PRECISION[options.compute]))
    return replace(graph, operators=tuple(operators), weights=())  # some in another dtype


def _quantize(x: Tensor, readers: list[Operator], options: Options) -> Operator:
    """The cast of `x` in forward and of its readers' output gradients in backward."""
    dtype = halo.CODES if options.recipe in halo.LEVELS else options.compute
    return Operator(
        name=f"{x.name}{CAST}",
        kind=QUANTIZE[options.recipe],
        price_axes=(x.axes, *(op.outputs[0].axes for op in readers)),
        inputs=(x,),
        outputs=(replace(x, name=f"{x.name}.quantized", dtype=dtype),),
        grad_inputs=False,
    )
