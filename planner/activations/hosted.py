"""The best mixture of policies as an integer programme: where host memory binds as well.

    sets       tau layer types with N_tau equal layers; b in tau their policies
    variables  n_b in {0, 1, ...}: layers with policy b
               D_b >= 0: bytes of those layers on the host
               A_b, E_b: seconds added to their forwards and backwards
    objective  min sum_b A_b + E_b
    rules      count_tau:  sum_{b in tau} n_b = N_tau
               device:     k (sum_b n_b S_b - sum_b D_b) <= M
               host:       k sum_b D_b <= H
               stored_b:   D_b <= n_b S_b
               forward_b:  A_b >= n_b F_b ,  A_b >= D_b / B - n_b Wf_tau
               backward_b: E_b >= n_b G_b ,  E_b >= D_b / B - n_b Wb_tau

The token-wise relaxation gives a bound and the least by which a layer with policy b would raise it;
rounding it gives a solution; policies that cannot lead to a better one are left out, and HiGHS
solves the rest to a small gap: a proof to the last digit among many nearly equal policies can take
minutes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations_with_replacement, islice, product
from typing import Any, Literal

import numpy as np

from .copies import Columns, extra_s, moved_bytes
from .mixture import NEAR
from .policies import Floats
from .problem import Limits, Problem
from .relax import Relaxed

ROUNDINGS = 500
"""Ways of rounding the relaxation that are tried."""
NODES = 20_000
"""Nodes of the integer programme, which end it at the same place on every machine."""


def mix_within_host(
    columns: Columns,
    problem: Problem,
    relaxed: Relaxed,
    bound_s: float,
    gap: float,
    time_limit_s: float | None,
) -> tuple[Floats, float, Literal["time", "nodes"] | None]:
    """Layers per column, a bound of the seconds, and what stopped the search.

    `gap` is the relative distance to the bound at which it may stop.
    """
    best, best_s = _rounded(columns, relaxed, problem)
    bound_s, limit = max(bound_s, relaxed.seconds), None
    if best_s > bound_s * (1 + gap) + NEAR * best_s:
        keep = np.flatnonzero(relaxed.reduced_s <= (best_s - relaxed.seconds) * (1 + 1e-6))
        counts, proven_s, limit = _integer(columns.take(keep), problem, gap, time_limit_s)
        bound_s = max(bound_s, proven_s)
        if counts is not None:
            whole = np.zeros(len(columns))
            whole[keep] = counts
            seconds = total_s(columns, whole, problem.limits)
            if seconds < best_s:
                best, best_s = whole, seconds
    return best, min(bound_s, best_s), limit


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout meanwhile: HiGHS prints from C++ when it repairs a solution."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def total_s(columns: Columns, counts: Floats, limits: Limits) -> float:
    """The least seconds of given counts; infinite where they do not fit."""
    moved = moved_bytes(columns, counts, limits)
    if moved is None:
        return float("inf")
    return float(np.sum(extra_s(columns, counts, moved, limits)))


def _rounded(columns: Columns, relaxed: Relaxed, problem: Problem) -> tuple[Floats, float]:
    """The best way found of making the relaxation's counts whole, and its seconds."""
    best, best_s = np.zeros(len(columns)), float("inf")
    for counts in islice(_roundings(columns, relaxed.layers, problem), ROUNDINGS):
        used = np.flatnonzero(counts)
        seconds = total_s(columns.take(used), counts[used], problem.limits)
        if seconds < best_s:
            best, best_s = counts, seconds
    assert best_s < float("inf")
    return best, best_s


def _roundings(columns: Columns, layers: Floats, problem: Problem) -> Iterator[Floats]:
    """Whole counts near fractional ones; first those with the fewest bytes, which always fit."""
    least = [int(np.flatnonzero(columns.kind == t)[0]) for t in range(len(problem.layers))]
    fewest = np.zeros(len(columns))
    fewest[least] = [float(layer.count) for layer in problem.layers]
    yield fewest
    base = np.floor(layers + 1e-7)
    choices: list[list[tuple[int, ...]]] = []
    for kind, layer in enumerate(problem.layers):
        own = columns.kind == kind
        rest = round(layer.count - float(np.sum(base[own])))
        support = {int(b) for b in np.flatnonzero(own & (layers > 1e-7))} | {least[kind]}
        choices.append(list(combinations_with_replacement(sorted(support), rest)))
    for added in product(*choices):
        counts = base.copy()
        for group in added:
            for column in group:
                counts[column] += 1
        yield counts


def _integer(
    columns: Columns, problem: Problem, gap: float, time_limit_s: float | None
) -> tuple[Floats | None, float, Literal["time", "nodes"] | None]:
    """Counts from the integer programme, a bound that it proved, and whether time ran out."""
    from scipy import optimize
    from scipy.sparse import bmat, csr_matrix, diags, identity

    types, limits, num = problem.layers, problem.limits, len(columns)
    live = limits.live_micro_batches
    size = max(float(np.max(columns.stored_bytes)), 1.0)
    second = max(float(np.max(columns.forward_s + columns.backward_s)), 1e-12)
    stored, one = columns.stored_bytes / size, identity(num)
    member = csr_matrix((columns.kind == np.arange(len(types))[:, None]).astype(float))
    device = limits.device_bytes / live / size
    total = [sum(layer.count for layer in types)] * num
    copy = size / limits.copy_bytes_per_s / second if limits.offload else 0.0
    none = csr_matrix((1, num))
    rows = bmat([
        [csr_matrix(stored), -csr_matrix(np.ones(num)), none, none],
        [none, csr_matrix(np.ones(num)), none, none],
        [-diags(stored), one, None, None],
        [diags(columns.forward_s / second), None, -one, None],
        [-diags(columns.forward_window_s / second), copy * one, -one, None],
        [diags(columns.backward_s / second), None, None, -one],
        [-diags(columns.backward_window_s / second), copy * one, None, -one],
    ])  # fmt: skip
    host = min(limits.host_bytes / live / size, 1e15) if limits.offload else 0.0
    most = np.concatenate(([device, host], np.zeros(5 * num)))
    equal = bmat([[member, csr_matrix((len(types), 3 * num))]])
    costs = np.concatenate((np.zeros(2 * num), np.ones(2 * num)))
    upper = np.concatenate((total, np.full(3 * num, np.inf)))
    whole = np.zeros(len(costs))
    whole[:num] = 1
    counts = np.array([float(layer.count) for layer in types])
    options: dict[str, float] = {"mip_rel_gap": gap, "node_limit": NODES}
    if time_limit_s is not None:
        options["time_limit"] = time_limit_s
    scale = 1e3  # HiGHS stops at an absolute gap of 1e-6
    library: Any = optimize  # its annotations know of numbers alone where it takes arrays
    rules = [library.LinearConstraint(rows, ub=most)]
    rules.append(library.LinearConstraint(equal, counts, counts))
    with _quiet():
        answer = library.milp(
            scale * costs, integrality=whole, bounds=library.Bounds(0, upper), options=options,
            constraints=rules,
        )  # fmt: skip
    bound_s = answer.mip_dual_bound
    proven_s = 0.0 if bound_s is None or not np.isfinite(bound_s) else bound_s * second / scale
    found = None if answer.x is None else np.round(answer.x[:num])
    return found, proven_s, "time" if answer.status == 1 else None
