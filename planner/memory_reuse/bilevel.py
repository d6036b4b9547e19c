"""Memory reuse in two levels: a layer's short-lived buffers once, then all layers around them.

MEMO (Zhao et al. 2024, arXiv 2407.12117, section 4.2): equal layers ask for the same short-lived
buffers pass after pass. Level 1 places the buffers of one pass in the smallest arena of their own,

    P = min peak(inner)

and level 2 replaces every pass by one buffer of P bytes that lives as long as the pass, beside the
buffers that outlive a pass:

    minimise    peak(outer and one block of P bytes per pass)
    offsets     of inner buffer i in pass r = o_r + o_i

Both levels are problems of a handful to a few hundred buffers, however many layers there are. The
price is that nothing else uses the holes inside a block; `flat` gives the same buffers in one
problem, to see what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...errors import InputError
from .buffers import Buffers, Ints, make_buffers
from .solve import TIME_LIMIT_S, MemoryPlan, solve


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass of a layer: its short-lived buffers start where the pass does."""

    name: str
    inner: Buffers
    """Times count from 0, the start of the pass."""
    start: int
    """Moment of the outer problem at which the pass starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bilevel:
    """Offsets of all buffers of all passes and of the outer ones."""

    plan: MemoryPlan
    """Of the outer buffers and the blocks, named `block:PASS`; its bound holds for blocks."""
    inner_plans: tuple[MemoryPlan, ...]
    """One per distinct pass."""
    buffers: Buffers
    """All buffers one by one; those of a pass are named `PASS/ID`."""
    offsets: Ints

    @property
    def peak_bytes(self) -> int:
        """The arena."""
        return self.plan.peak_bytes


def bilevel(
    outer: Buffers,
    passes: Sequence[Pass],
    *,
    time_limit_s: float = TIME_LIMIT_S,
    clock: Callable[[], float] = perf_counter,
) -> Bilevel:
    """Place each distinct pass once, then its blocks beside the outer buffers.

    Passes that share one `Buffers` object share one plan. Raises InputError for equal names.
    """
    everything = flat(outer, passes)
    deadline_s = clock() + time_limit_s
    plans: dict[int, MemoryPlan] = {}
    for one in passes:
        if id(one.inner) not in plans:
            left_s = max(0.0, deadline_s - clock())
            plans[id(one.inner)] = solve(one.inner, time_limit_s=left_s, clock=clock)
    blocks = [plans[id(one.inner)].peak_bytes for one in passes]
    plan = solve(
        make_buffers(
            [*outer.ids, *(f"block:{one.name}" for one in passes)],
            [*outer.lower.tolist(), *(one.start + int(one.inner.lower.min()) for one in passes)],
            [*outer.upper.tolist(), *(one.start + int(one.inner.upper.max()) for one in passes)],
            [*outer.size_bytes.tolist(), *blocks],
            [
                *outer.alignment_bytes.tolist(),
                *(int(one.inner.alignment_bytes.max()) for one in passes),
            ],
        ),
        time_limit_s=max(0.0, deadline_s - clock()),
        clock=clock,
    )
    parts = [plan.offsets[: len(outer)]]
    for index, one in enumerate(passes):
        parts.append(plan.offsets[len(outer) + index] + plans[id(one.inner)].offsets)
    return Bilevel(
        plan=plan,
        inner_plans=tuple(plans.values()),
        buffers=everything,
        offsets=np.concatenate(parts),
    )


def flat(outer: Buffers, passes: Sequence[Pass]) -> Buffers:
    """All buffers of both levels in one problem, in the order outer, then pass by pass."""
    names = [one.name for one in passes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError("pass", twice, "there twice", "give every pass a name of its own")
    groups = [(outer, 0, ""), *((one.inner, one.start, f"{one.name}/") for one in passes)]
    return make_buffers(
        [f"{prefix}{name}" for group, _, prefix in groups for name in group.ids],
        np.concatenate([group.lower + shift for group, shift, _ in groups]),
        np.concatenate([group.upper + shift for group, shift, _ in groups]),
        np.concatenate([group.size_bytes for group, _, _ in groups]),
        np.concatenate([group.alignment_bytes for group, _, _ in groups]),
    )
