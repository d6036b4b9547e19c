"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): a matrix on grids, its outputs little changed.

Of a matrix W (R, K) whose inputs x have second moments H = 2/N sum x x^T, columns are put on their
grid one after the other, and what each of them loses is made up for by those still to come:

    H := H + damping mean(diag H) I
    U  = upper Cholesky factor of H^-1
    for columns j:   q_j = nearest codes of w_j,   e = (w_j - value(q_j)) / U_jj
                     w_k := w_k - e U_jk           for k > j

in blocks: inside a block at once, for the columns behind it when the block is done. The grid of a
group is made when its first column comes, of the weights as they then are; with `static_groups` all
grids are made before, of neighbouring columns. `act_order` takes columns with large H_jj first;
groups are then those of the order taken, or with static groups still the neighbours'.

An input that is always 0 (H_jj = 0) has weights of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from .grid import Grids

BLOCK = 128
"""Columns; the largest number up to it that groups fit into, or that fits into groups."""
DAMPING = 0.01
MOST_DAMPING = 1.0


class Moments:
    """H of the inputs of a linear, as a running mean over batches."""

    def __init__(self, num_inputs: int, device: torch.device) -> None:
        self.matrix = torch.zeros(num_inputs, num_inputs, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs (..., K)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        total = self.count + len(rows)
        self.matrix.mul_(self.count / total).addmm_(rows.T, rows, alpha=2.0 / total)
        self.count = total


@dataclass(frozen=True, slots=True)
class Result:
    """Codes (R, K) and what they stand for, with the grids (R, groups) and each column's group."""

    codes: Tensor
    values: Tensor
    grids: Grids
    group_of: Tensor


def quantize(
    name: str,
    weight: Tensor,
    moments: Tensor,
    bits: int,
    group: int | None = None,
    *,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Result:
    """The matrix `weight` (R, K), `name` in errors, in `bits` bits; without a size in one group.

    Raises InputError where groups do not divide the columns, or numbers are not finite.
    """
    columns = weight.shape[1]
    size = columns if group is None else group
    _check(name, weight, moments, size)
    w, h = weight.float().clone(), moments.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    order = torch.arange(columns, device=w.device)
    if act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    static = Grids.of(w.unflatten(1, (-1, size)), bits) if static_groups else None
    w, h = w[:, order], h[order][:, order]
    place = order if static is not None else torch.arange(columns, device=w.device)
    group_of = place // size
    factor = _factor(name, h, damping)
    codes, values, grids = _sweep(w, factor, bits, size, group_of, static, _fitting(block, size))
    back = torch.argsort(order)
    return Result(codes[:, back], values[:, back], grids, group_of[back])


def _check(name: str, weight: Tensor, moments: Tensor, size: int) -> None:
    rows, columns = weight.shape
    if columns % size:
        raise InputError("group", size, f"does not divide the {columns} inputs of {name} "
                         f"({rows} x {columns})", "give a divisor")  # fmt: skip
    for what, tensor in (("base", weight), ("data", moments)):
        if not bool(torch.isfinite(tensor).all()):
            told = "weights" if what == "base" else "inputs on the calibration text"
            raise InputError(what, name, f"has {told} that are not finite",
                             "give the weights of a training that did not diverge")  # fmt: skip


def _fitting(block: int, size: int) -> int:
    """Columns of a block: whole groups, or a whole part of one.

    >>> _fitting(128, 32), _fitting(128, 96), _fitting(128, 352), _fitting(1, 64)
    (128, 96, 88, 1)
    """
    if size <= block:
        return block // size * size
    return max(n for n in range(1, block + 1) if size % n == 0)


def _factor(name: str, moments: Tensor, damping: float) -> Tensor:
    """U, in fp64 until it is there; more damping where H is nearly singular."""
    h = moments.double()
    mean = h.diagonal().mean()
    while damping <= MOST_DAMPING:
        damped = h + damping * mean * torch.eye(len(h), dtype=h.dtype, device=h.device)
        lower, problem = torch.linalg.cholesky_ex(damped)
        if not bool(problem):
            upper, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(problem):
                return upper.float()
        damping *= 10.0
    raise InputError("data", name, "has second moments of inputs that are not positive",
                     "give more calibration text")  # fmt: skip


def _sweep(
    w: Tensor,
    factor: Tensor,
    bits: int,
    size: int,
    group_of: Tensor,
    static: Grids | None,
    block: int,
) -> tuple[Tensor, Tensor, Grids]:
    """Codes and values of columns in order, and the grids; `w` is used up."""
    rows, columns = w.shape
    num_groups = columns // size
    scales, zeros = (torch.empty(rows, num_groups, device=w.device) for _ in range(2))
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=w.device)
    values = torch.empty_like(w)
    groups = group_of.tolist()
    if static is not None:
        scales, zeros = static.scale, static.zero
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, errors = w[:, start:end], torch.empty(rows, end - start, device=w.device)
        inner = factor[start:end, start:end]
        for j in range(end - start):
            at, k = start + j, groups[start + j]
            if static is None and at % size == 0:
                grid = Grids.of(w[:, at : at + size], bits)
                scales[:, k], zeros[:, k] = grid.scale, grid.zero
            grid = Grids(scales[:, k], zeros[:, k])
            chosen = grid.codes(part[:, j], bits)
            value = grid.values(chosen)
            codes[:, at], values[:, at] = chosen.to(torch.uint8), value
            errors[:, j] = (part[:, j] - value) / inner[j, j]
            part[:, j + 1 :].addr_(errors[:, j], inner[j, j + 1 :], alpha=-1.0)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1.0)
    return codes, values, Grids(scales, zeros)
