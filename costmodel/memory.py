"""Peak memory of one pipeline rank, by category: the largest moment of a step.

What lies at rest is in `states.py`, what a micro-batch keeps in `liveness.py` and `kept.py`, copies
of parameters in use in `working_copies.py`, the moments that can be the peak in `moments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..estimate import MEMORY_TERMS
from ..stack import Stack
from .graph import Array
from .kept import Kept
from .layout import Layouts
from .moments import RankMoments
from .options import Options
from .pieces import Pieces
from .stages import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The largest moment: its terms (bytes), which sum to `total`."""

    total: Array
    terms: dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """Live chunk activations of a rank at its first backward of a step (no gradients yet), and at
    later ones; zero where there is none, or none is looked at."""

    first: Array
    later: Array

    @property
    def least(self) -> Array:
        """The fewer of both, where there are both."""
        later = np.where(self.later > 0, self.later, self.first)
        return np.where(self.first > 0, np.minimum(self.first, later), later)


def peak_memory(
    load: Load,
    costs: Pieces,
    layouts: Layouts,
    *,
    options: Options,
    stack: Stack,
    in_flight: InFlight,
) -> Peak:
    """Live tensors at the peak of one pipeline rank; `load` is all chunks of the rank."""
    rank = RankMoments.of(load, costs, layouts, options, stack)
    kept = Kept.of(costs, layouts, stack)
    per_chunk = rank.per_chunk(kept)
    found: list[dict[str, Array]] = []
    for moment in rank.moments:
        here = rank.activations(moment, kept, per_chunk)
        terms, exists = dict(moment.terms), moment.exists
        if moment.kind != "update":
            live = in_flight.later if moment.later else in_flight.first
            others = np.maximum(live - 1.0, 0.0) * per_chunk
            terms["activations"] = terms.get("activations", 0.0) + here.kept + others
            exists = (live > 0) & exists
            terms["workspace"] = here.working
        found.append({name: np.where(exists, value, 0.0) for name, value in terms.items()})
    return _largest(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """Bytes of one rank under many layouts; the peak is one of two kinds of moments."""

    total: Array
    """The peak."""
    kept: Array
    """What live micro-batches keep while the head or any layer runs backward."""
    working: Array
    """The most that is there beside `kept` then."""
    closing: Array
    """What is there in the backward of the rank's first layer, or after it, beside `kept` of the
    other micro-batches."""
    others: Array
    """These others as a share of all live micro-batches."""


def peak_bytes(rank: RankMoments, kept: Kept, in_flight: InFlight) -> Peaks:
    """The total of `peak_memory` under a policy of what layers keep, and what it consists of."""
    per_chunk = rank.per_chunk(kept)
    live = in_flight.least
    others = np.maximum(live - 1.0, 0.0)
    peak, working, closing = np.zeros((3, len(per_chunk)))
    for moment in rank.moments:
        here = rank.activations(moment, kept, per_chunk)
        now = moment.standing + here.kept + here.working
        exists = moment.exists
        if moment.kind != "update":
            alive = in_flight.later if moment.later else in_flight.first
            now = now + np.maximum(alive - 1.0, 0.0) * per_chunk
            exists = exists & (alive > 0)
        now = np.where(exists, now, 0.0)
        peak = np.maximum(peak, now)
        if moment.kind == "fetch":  # not of every mixture of policies
            continue
        whole = moment.kind not in ("first", "update")
        beside = now - np.where(exists, here.passing, 0.0)
        if whole:
            working = np.maximum(working, beside - live * per_chunk - here.shortfall)
        short = (here.shortfall > 0) & np.isfinite(here.shortfall)
        least = np.where(short, now, beside) - others * per_chunk
        closing = np.maximum(closing, np.where(short | (not whole), least, 0.0))
    return Peaks(
        total=peak,
        kept=live * per_chunk,
        working=working,
        closing=closing,
        others=others / np.maximum(live, 1.0),
    )


def _largest(moments: Sequence[dict[str, Array]]) -> Peak:
    totals = np.stack([sum(moment.values(), np.zeros(1)) for moment in moments])
    index = np.argmax(totals, axis=0)
    terms = dict.fromkeys(MEMORY_TERMS, np.zeros(len(index)))
    for i in sorted(set(index.tolist())):
        here = index == i
        for name, value in moments[i].items():
            terms[name] = np.where(here, value, terms[name])
    return Peak(total=np.max(totals, axis=0), terms=terms)
