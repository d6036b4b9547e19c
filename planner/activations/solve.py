"""The best choice for every tensor of a stage's layers, and how sure that is.

    sets       tau layer types with N_tau equal layers; b in tau their policies (`policies.py`),
               complete up to domination
    variables  n_b in {0, 1, ...}: layers with policy b; D_b >= 0: their bytes on the host
    objective  min sum_b seconds_b(n_b, D_b)                 (of one micro-batch; `copies.py`)
    rules      count_tau:  sum_{b in tau} n_b = N_tau
               device:     k (sum_b n_b S_b - sum_b D_b) <= M
               host:       k sum_b D_b <= H
               stored_b:   D_b <= n_b S_b

with k live micro-batches and S_b bytes stored by policy b. Without the host's rule it is solved to
a given gap by `mixture.py`; where that answer breaks the rule, by the integer programme of
`hosted.py`. The D_b of given counts follow in closed form, and the whole answer is
checked without any of this (`check.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Literal

import numpy as np

from ...errors import InputError, NoFeasiblePlan
from ...units import format_bytes
from .check import violations
from .copies import Columns, extra_s, moved_bytes
from .hosted import mix_within_host, total_s
from .mixture import mix
from .policies import ABSENT, COMPRESSED, MADE_AGAIN, Floats, Policies, policies
from .problem import LayerType, Problem
from .relax import Relaxed, relax
from .solution import Choice, PolicyUse, Solution, TensorChoice

Limit = Literal["time", "nodes"] | None
GAP = 1e-3
"""Relative gap at which the search stops: far below what prices are known to."""
NEAR = 1e-6
"""Relative gap below which the bound and the answer are one: what solvers leave by rounding."""


def solve(
    problem: Problem,
    *,
    gap: float = GAP,
    time_limit_s: float | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Solution:
    """The choice per tensor and layer that adds the fewest seconds within the limits.

    Within `gap`, relative, of the optimum; 0 asks for the optimum itself. When `time_limit_s`
    seconds by `clock` are over, the best solution so far with its gap.

    Raises
    ------
    InputError : the gap or the time limit is negative.
    NoFeasiblePlan : the device limit is below the least possible bytes.
    """
    for field, value in (("gap", gap), ("time-limit", time_limit_s or 0.0)):
        if not value >= 0:
            raise InputError(field, value, "negative", "give 0 or more")
    deadline = float("inf") if time_limit_s is None else clock() + time_limit_s
    limits = problem.limits
    found = [policies(layer, limits) for layer in problem.layers]
    _check_feasible(problem, found)
    columns = Columns.of(found)
    relaxed = relax(columns, problem)
    free = replace(problem, limits=replace(limits, host_bytes=float("inf")))
    mixed = mix(columns, free if limits.offload else problem, gap, lambda: clock() >= deadline)
    counts, bound_s = mixed.counts, max(mixed.bound_s, relaxed.seconds)
    fits = moved_bytes(columns, counts, limits) is not None
    limit: Limit = None
    if not (fits and mixed.finished):
        left_s = None if time_limit_s is None else max(0.0, deadline - clock())
        other, bound_s, limit = mix_within_host(columns, problem, relaxed, bound_s, gap, left_s)
        if not fits or total_s(columns, other, limits) < total_s(columns, counts, limits):
            counts = other
    solution = _solution(problem, found, columns, counts, bound_s, relaxed, limit)
    wrong = violations(problem, solution)
    assert not wrong, wrong
    return solution


def least_bytes(problem: Problem, found: list[Policies] | None = None) -> float:
    """The fewest device bytes that any choice needs."""
    if found is None:
        found = [policies(layer, problem.limits) for layer in problem.layers]
    live = problem.limits.live_micro_batches
    stored = live * sum(p.layer.count * float(p.stored_bytes[0]) for p in found)
    return max(0.0, stored - problem.limits.host_bytes) if problem.limits.offload else stored


def _check_feasible(problem: Problem, found: list[Policies]) -> None:
    least, limits = least_bytes(problem, found), problem.limits
    if least <= limits.device_bytes * (1 + 1e-12):
        return
    remedies = [f"raise the memory limit to {least:.0f} bytes"]
    if not limits.offload:
        remedies.append("allow offload")
    elif limits.host_bytes < float("inf"):
        remedies.append("raise the host limit")
    if not limits.compress:
        remedies.append("allow fp8")
    raise NoFeasiblePlan(
        f"saved tensors need at least {format_bytes(least)} on the device, "
        f"the limit is {format_bytes(limits.device_bytes)}",
        ", or ".join(remedies),
    )


def _solution(
    problem: Problem,
    found: list[Policies],
    columns: Columns,
    counts: Floats,
    bound_s: float,
    relaxed: Relaxed,
    limit: Limit,
) -> Solution:
    """The answer in the words of the problem."""
    limits = problem.limits
    used = np.flatnonzero(counts)
    chosen, num = columns.take(used), counts[used]
    moved = moved_bytes(chosen, num, limits)
    assert moved is not None
    seconds = extra_s(chosen, num, moved, limits)
    uses = [
        _use(
            found[chosen.kind[i]],
            int(chosen.index[i]),
            int(num[i]),
            float(moved[i]),
            float(seconds[i]),
        )
        for i in range(len(chosen))
    ]
    live, total = limits.live_micro_batches, float(np.sum(seconds))
    bound_s = total if bound_s >= total * (1 - NEAR) else float(bound_s)
    return Solution(
        policies=tuple(uses),
        device_bytes=live * sum(use.layers * use.device_bytes for use in uses),
        host_bytes=live * sum(use.layers * use.host_bytes for use in uses),
        extra_s=total,
        lower_bound_s=bound_s,
        relaxed_s=min(relaxed.seconds, total),
        gap=1 - bound_s / total if total > 0 else 0.0,
        keep_all_bytes=problem.keep_all_bytes,
        recompute_all_s=_recompute_all_s(problem),
        limit=limit,
    )


def _recompute_all_s(problem: Problem) -> float:
    """Seconds of the fewest stored bytes without compression and offload."""
    alone = replace(problem.limits, compress=False, copy_bytes_per_s=0.0)
    return sum(
        layer.count * float(policies(layer, alone).backward_s[0]) for layer in problem.layers
    )


def _use(found: Policies, index: int, layers: int, moved: float, seconds: float) -> PolicyUse:
    """One policy as the choice for each tensor; what is moved is filled in forward order."""
    layer, codes = found.layer, found.codes[index]
    tensors: list[TensorChoice] = []
    left = moved / layers
    again, charged = _runs_again(layer, codes)
    for tensor, code in zip(layer.tensors, codes, strict=True):
        if code == ABSENT:
            continue
        stored, seconds_here = tensor.bytes, 0.0
        choice: Choice = "keep"
        if code == MADE_AGAIN:
            stored, choice, seconds_here = 0.0, "recompute", charged.get(tensor.name, 0.0)
        elif code == COMPRESSED:
            stored, choice = tensor.compressed_bytes or 0.0, "compress"
            seconds_here = tensor.compress_s + tensor.decompress_s
        host = min(left, stored)
        left -= host
        if host > 0 and choice == "keep":
            choice = "offload"
        tensors.append(
            TensorChoice(
                name=tensor.name, bytes=tensor.bytes, needed=tensor.needed, choice=choice,
                fraction=host / stored if host > 0 else 0.0, stored_bytes=stored,
                seconds=seconds_here,
            )
        )  # fmt: skip
    on_host = moved / layers
    on_device = max(0.0, float(found.stored_bytes[index]) - on_host)
    direct = sum(t.bytes for t in tensors if t.needed and t.choice in ("keep", "offload"))
    offloaded = sum(t.fraction * t.stored_bytes for t in tensors)
    return PolicyUse(
        layer=layer.name,
        layers=layers,
        tensors=tuple(tensors),
        runs_again=again,
        device_bytes=on_device,
        host_bytes=on_host,
        restored_bytes=layer.needed_bytes - direct + offloaded,
        exposed_copy_s=max(0.0, seconds / layers - sum(t.seconds for t in tensors)),
        extra_s=seconds / layers,
    )


def _runs_again(layer: LayerType, codes: np.ndarray) -> tuple[tuple[str, ...], dict[str, float]]:
    """Operators that run again, and their seconds by the first output that they are run for."""
    made = {t.name for t, code in zip(layer.tensors, codes, strict=True) if code == MADE_AGAIN}
    again: list[str] = []
    charged: dict[str, float] = {}
    for maker in layer.makers:
        wanted = [name for name in maker.outputs if name in made]
        if wanted:
            again.append(maker.name)
            charged[wanted[0]] = maker.seconds
    return tuple(again), charged
