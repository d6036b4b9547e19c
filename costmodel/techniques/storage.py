"""Storage dtype of saved activations: fp8 where the operators between still work in 16 bits.

As in COAT (Xi et al. 2024, arXiv 2410.19313): what norms and activation functions save is kept in
fp8 with a scale per group of 16 elements, what linears save as the fp8 operand of their
weight-gradient matmul, with one scale; what attention saves stays in 16 bits, its output included,
which the projection behind it reads. A linear whose matmul is fp8 has its operand already; all
other stored tensors take a conversion in forward and another in backward, where one of them at a
time stands beside the gradients that are made of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from ...errors import InputError
from ...model import Mlp, Norm
from ..graph import Graph, Operator, Tensor
from .lora import is_adapter
from .precision import is_low_precision

GROUPED = "fp8_g16"
NORMS: tuple[str, ...] = get_args(Norm)
ACTIVATIONS: tuple[str, ...] = get_args(Mlp)
EXECUTED = ("swiglu", "geglu", "gelu", "squared_relu")
"""MLPs whose executors store what their activation function saves."""


def rewrite(graph: Graph, activations: str | None, recompute: str) -> Graph:
    """The layer with its saved activations in another storage dtype; other graphs as they are."""
    if activations is None:
        return graph
    if activations != "fp8":
        raise InputError("precision.activations", activations, "unknown storage of activations",
                         "use fp8 or leave it out")  # fmt: skip
    if recompute not in ("none", "selective"):
        raise InputError("precision.activations", activations,
                         f"recompute {recompute} does not keep the activations to be stored",
                         "use recompute none or selective")  # fmt: skip
    if graph.name != "layer":
        return graph
    wide = {t.name for op in graph.operators if op.kind.startswith("attention") for t in op.saves}
    linears = [op for op in graph.operators if is_low_precision(op) or is_adapter(op)]
    operands = {t.name for op in linears for t in op.saves} - wide
    there = {_operand(op.inputs[0]).name for op in graph.operators if op.compute is not None}
    operators: list[Operator] = []
    for op in graph.operators:
        pairs = [(t, _stored(op, t, operands)) for t in _needed(op)]
        new = [(t, s) for t, s in pairs if s is not t and s.name not in there]
        there |= {s.name for _, s in new}
        if new:
            operators.append(_convert(op, new))
        unpacks = tuple(t for t, s in pairs if s is not t and op.compute is None)[:1]
        operators.append(replace(op, saves=tuple(s for _, s in pairs), unpacks=unpacks))
    return replace(graph, operators=tuple(operators))


def _needed(op: Operator) -> tuple[Tensor, ...]:
    """What an operator saves; of a norm its input and statistics, no fp32 copies of the input."""
    if op.kind not in NORMS:
        return op.saves
    statistics = tuple(t for t in op.saves if t.axes != op.inputs[0].axes)
    return (op.inputs[0], *statistics)


def _operand(t: Tensor) -> Tensor:
    """The fp8 operand of a weight-gradient matmul."""
    return replace(t, name=f"{t.name}.fp8_operand", dtype="fp8")


def _stored(op: Operator, t: Tensor, operands: set[str]) -> Tensor:
    """The form in which `op` keeps `t`."""
    if t.name in operands:
        return _operand(t)
    if op.kind in (*NORMS, *ACTIVATIONS) and t.axes == op.outputs[0].axes:
        return replace(t, name=f"{t.name}.fp8", dtype=GROUPED)
    return t


def _convert(op: Operator, pairs: list[tuple[Tensor, Tensor]]) -> Operator:
    read = {t.name for t, _ in pairs}
    return Operator(
        name=f"{op.name}.store",
        kind="quantize_store",
        price_axes=tuple(t.axes for t, _ in pairs),
        inputs=tuple(t for t in op.inputs if t.name in read),
        outputs=tuple(s for _, s in pairs),
        grad_inputs=False,
    )
