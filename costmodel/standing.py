"""What stands in a layer's backward beside gradients: tensors kept, and tensors made again.

Two ways to bring back what was not kept. *At once*: everything that a consumer's backward needs is
there when the backward of the layer starts, and goes after that of its producer (one checkpoint
around the layer). *On demand*: an operator runs again when a backward asks for something that it
makes, the operators before it as far as they must, and what they made goes with the last backward,
or the last operator run again, that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from .graph import Array, Axes, Graph, Operator, Sizes, Tensor, volume
from .operators import transients

NO_INPUT_NEEDED = ("add", "copy", "edge", "rope", "permute")
"""Kinds whose backward reads none of their inputs; nor does that of casts."""
INSIDE: dict[str, tuple[Axes, float]] = {
    "attention_unfused": (("batch", "heads", "seq", "seq_whole"), 5.0),
    "attention_unfused_eager": (("batch", "heads", "seq", "seq_whole"), 5.0),
}
"""What kinds keep that is neither input nor output: axes, and bytes per element. Unfused attention:
softmax and dropout in 16 bits and the mask (Korthikanti et al. 2022, arXiv 2205.05198, section
4.1)."""


class Standing(Protocol):
    """Bytes by moment; `before` and `after` are called around each operator's backward, in reverse
    order."""

    held: Array
    """Now, without gradients."""

    def before(self, op: Operator) -> Array:
        """The most that stands while what `op` needs comes back; from then on it is in `held`."""
        ...

    def inside(self, op: Operator) -> Array:
        """What `op` has inside of it during its own backward alone."""
        ...

    def after(self, op: Operator) -> None:
        """What nobody reads any more goes."""
        ...


def standing(graph: Graph, sizes: Sizes, *, lands: bool = False) -> Standing:
    """How a graph's tensors come back; with `lands` what was saved does not go before the end."""
    on_demand = any(op.needs for op in graph.operators)
    there = OnDemand(graph, sizes) if on_demand else AtOnce(graph, sizes)
    there.lands = lands
    return there


def moves(op: Operator, sizes: Sizes) -> Array:
    """Whether an edge makes a new tensor: where the group that it copies over, or one of its
    collectives, has several ranks."""
    ranks = np.ones(1) if op.copies_over is None else sizes[op.copies_over]
    for c in (*op.forward_collectives, *op.backward_collectives):
        ranks = np.maximum(ranks, sizes[c.axis])
    return ranks > 1


def main_tensor(op: Operator) -> Tensor:
    """The tensor that transients are multiples of: the logits for the loss, else the output."""
    return op.saves[0] if op.kind == "cross_entropy" else op.outputs[-1]


def total_bytes(tensors: Iterable[Tensor], sizes: Sizes) -> Array:
    """Of all of them."""
    return sum((t.num_bytes(sizes) for t in tensors), np.zeros(1))


class AtOnce:
    """Everything is back when the backward starts."""

    lands = False

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        self.sizes = sizes
        self.holders: dict[str, int] = {}
        self.saved: dict[str, Array] = {}
        for op in graph.operators:
            for tensor in op.saves:
                self.holders[tensor.name] = self.holders.get(tensor.name, 0) + 1
                self.saved[tensor.name] = tensor.num_bytes(sizes)
        self.again = _remade(graph, sizes)
        self.held = sum((*self.saved.values(), *self.again.values()), np.zeros(1))

    def before(self, op: Operator) -> Array:
        return self.held

    def inside(self, op: Operator) -> Array:
        """Bytes that an operator which runs again keeps inside of it until its backward is done."""
        if not op.recomputed or op.kind not in INSIDE:
            return np.zeros(1)
        axes, element_bytes = INSIDE[op.kind]
        return volume(axes, self.sizes) * element_bytes

    def after(self, op: Operator) -> None:
        for tensor in op.outputs:
            self.held = self.held - self.again.pop(tensor.name, 0.0)
        for tensor in op.saves:
            self.holders[tensor.name] -= 1
            if self.holders[tensor.name] == 0 and not self.lands:
                self.held = self.held - self.saved.pop(tensor.name)


def _remade(graph: Graph, sizes: Sizes) -> dict[str, Array]:
    """Outputs of operators that run again and that a consumer's backward needs, by name.

    Through an edge within one rank a tensor stays the same.
    """
    kept = {t.name for op in graph.operators for t in op.saves}
    again = {t.name: t for op in graph.operators if op.recomputed for t in op.outputs}
    needed: dict[str, Array] = {}
    for op in reversed(graph.operators):
        for tensor in op.inputs:
            if tensor.name not in again or tensor.name in kept:
                continue
            if op.kind == "edge":  # its output stands for both where it moves nothing
                out, moved = op.outputs[0].name, moves(op, sizes)
                if out in needed and tensor.name not in needed:
                    needed[tensor.name] = np.where(moved, 0.0, needed[out])
                    needed[out] = np.where(moved, needed[out], 0.0)
            elif op.kind not in NO_INPUT_NEEDED and not _casts(op):
                needed[tensor.name] = tensor.num_bytes(sizes)
    return needed


def _casts(op: Operator) -> bool:
    """Whether an operator casts matmuls' operands; `quantize_store` reads what it stores."""
    return op.kind.startswith("quantize") and op.kind != "quantize_store"


class OnDemand:
    """Operators run again when a backward asks for what they make."""

    lands = False

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        self.sizes = sizes
        self.makers = {t.name: op for op in graph.operators for t in _makes(op) if op.recomputed}
        self.reads: dict[str, int] = {}
        """How often each tensor is still read, by backwards and by operators that run again."""
        for op in graph.operators:
            again = op.inputs if op.recomputed else ()
            for name in [t.name for t in (*_wanted(op), *again)]:
                self.reads[name] = self.reads.get(name, 0) + 1
        kept = {t.name: t for op in graph.operators for t in op.saves}
        self.live = {name: t.num_bytes(sizes) for name, t in kept.items()}
        self.kept = frozenset(kept)
        self.same: dict[str, tuple[str, Array]] = {}
        """The output of an edge that ran again: its input, and whether it is another tensor."""
        self.held = sum(self.live.values(), np.zeros(1))
        self.peak = self.held

    def before(self, op: Operator) -> Array:
        self.peak = self.held
        for tensor in _wanted(op):
            self._need(tensor)
        return np.maximum(self.peak, self.held)

    def inside(self, op: Operator) -> Array:
        return np.zeros(1)

    def after(self, op: Operator) -> None:
        for tensor in _wanted(op):
            self._read(tensor.name)

    def _need(self, tensor: Tensor) -> None:
        if tensor.name in self.live or tensor.name not in self.makers:
            return
        op = self.makers[tensor.name]
        for read in op.inputs:
            self._need(read)
        made = {t.name: t.num_bytes(self.sizes) for t in _makes(op)}
        moved = moves(op, self.sizes) if op.kind == "edge" else np.ones(1, dtype=bool)
        extra = np.zeros(1)
        if op.kind != "edge":
            out = main_tensor(op)
            extra = transients(op.kind, out.dtype)[0] * out.num_bytes(self.sizes)
            extra = extra + total_bytes(op.held_forward, self.sizes)
        added = np.where(moved, sum(made.values(), np.zeros(1)), 0.0)
        self.peak = np.maximum(self.peak, self.held + added + extra)
        for name, size in made.items():
            if name not in self.live and self.reads.get(name, 0):
                self.live[name] = np.where(moved, size, 0.0)
                self.held = self.held + self.live[name]
                if op.kind == "edge":
                    self.same[name] = (op.inputs[0].name, moved)
        for read in op.inputs:
            self._read(read.name)

    def _read(self, name: str) -> None:
        """One reader less; after the last one the tensor goes, or lives on as the edge's output."""
        self.reads[name] -= 1
        if self.reads[name] or name not in self.live or (self.lands and name in self.kept):
            return
        size = self.live.pop(name)
        self.held = self.held - size
        for out, (own, moved) in list(self.same.items()):
            if own == name and out in self.live:
                rest = np.where(moved, 0.0, size)
                self.live[out] = self.live[out] + rest
                self.held = self.held + rest
        self.same.pop(name, None)


def _wanted(op: Operator) -> tuple[Tensor, ...]:
    """What the backward of an operator reads."""
    return op.needs or op.saves


def _makes(op: Operator) -> tuple[Tensor, ...]:
    """What an operator makes when it runs: its outputs and what it alone keeps."""
    known = {t.name for t in (*op.inputs, *op.outputs)}
    return (*op.outputs, *(t for t in op.needs if t.name not in known))
