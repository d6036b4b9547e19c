"""What offload moves per step and rank, and what it takes off the device.

A layer's bytes go out once per micro-batch and come back once, but for one case: where the backward
of a micro-batch follows its forward at once, at the loss, the last layer's backward begins with
what is still on the device, so that nothing of it comes back.

The bytes that lie off the device at once are those of all micro-batches in flight, and the states
that live there. A step's update brings optimiser states in by buckets of `BUCKET_ELEMENTS`
parameters and takes them out again, one bucket ahead and one behind the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..orders import Action
from ..plan import Phase
from ..schedules import rank_of
from ..stack import Stack
from .graph import Array
from .layout import Layouts
from .options import Options
from .prices import Prices
from .schedule import order_of
from .state_bytes import StateBytes
from .states import Counts, Divisors

BUCKET_ELEMENTS = 2**22
"""Parameters whose optimiser states are on the device at once, at most; there are two buckets."""


def returns_at_once(phase: Phase) -> int:
    """Micro-batches whose backward follows their forward through the last stage at once.

    >>> from forerun import Mesh, Phase
    >>> from forerun.plan import even_stages
    >>> step = dict(steps=1, seq_tokens=8, micro_batch_seqs=1, num_microbatches=4)
    >>> two = dict(mesh=Mesh(pp=2), stages=even_stages(2, 2, "cpu"))
    >>> [returns_at_once(Phase(schedule=s, **step, **two)) for s in ("1f1b", "gpipe")]
    [4, 0]
    """
    mesh, m, own = phase.mesh, phase.num_microbatches, phase.own_orders()
    if own is None or mesh.pp == 1:
        return returning(phase.schedule, mesh.pp, mesh.vpp, m)
    return sum(_returning(actions, mesh.num_stages - 1) for actions in own)


@lru_cache(maxsize=1024)
def returning(schedule: str, p: int, v: int, m: int) -> int:
    """`returns_at_once` of the orders of a schedule."""
    if p == 1:
        return m
    rank = rank_of(schedule, p * v - 1, p)
    return _returning(order_of(schedule, p, v, m, rank), p * v - 1)


def _returning(actions: Sequence[Action], last: int) -> int:
    return sum(
        kind == "F" and stage == last and following in (("B", last, micro), ("I", last, micro))
        for (kind, stage, micro), following in pairwise(actions)
    )


HOST_UPDATE_BYTES_PER_S = 2.5e10
"""Memory traffic that the host gives an update per device: 200 GB/s shared by eight. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """States of one rank that wait off the device."""

    num_bytes: Array
    out_bytes: Array
    """Moved off the device per step."""
    in_bytes: Array
    exposed_s: Array
    """What moving them adds to a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """Trained parameters whose optimiser states a rank holds."""

    dense: Array
    experts: Array
    """Of routed experts."""

    @staticmethod
    def of(counts: Counts, layouts: Layouts, stack: Stack) -> Owned:
        """A rank's share of what it trains."""
        return Owned(
            dense=counts.trained / Divisors.of(stack, layouts).optimizer,
            experts=counts.experts / Divisors.of(stack, layouts, experts=True).optimizer,
        )

    @property
    def every(self) -> Array:
        """All of them."""
        return self.dense + self.experts

    def away(self, options: Options) -> Array:
        """Those whose states wait off the device."""
        if options.offload_states is None:
            return 0.0 * self.every
        return self.experts if options.offload_states == "experts" else self.every


def staged_bytes(owned: Owned, states: StateBytes, options: Options) -> Array:
    """On the device while an update works through states that wait elsewhere."""
    if options.offload_states == "parameters":  # which are updated there
        return 0.0 * owned.every
    return states.optimizer * np.minimum(owned.away(options), 2.0 * BUCKET_ELEMENTS)


def states_off_device(
    owned: Owned, update_s: Array, layouts: Layouts, prices: Prices, options: Options
) -> States:
    """The states of a rank where they wait off the device, and what moving them adds.

    Copies of moments run beside the update of their parameters and beside each other where
    something is left to run them. FSDP's parameters come for every gather and its gradients leave
    after every scatter; the update then runs on the host. How much of that hides is assumed:
    nothing.
    """
    away, states = owned.away(options), StateBytes.of(prices.pool.stack, options)
    none = 0.0 * away
    if options.offload_states is None:
        return States(num_bytes=none, out_bytes=none, in_bytes=none, exposed_s=none)
    if options.offload_states == "parameters":
        streams = (layouts.pp == 1) * layouts.num_microbatches
        gathers = np.where((layouts.zero == 3) & (streams > 0), 2 * streams, 1)
        scatters = np.where((layouts.zero >= 2) & (streams > 0), streams, 1)
        moved = (away * states.gradient * scatters, away * states.parameter * gathers)
        num_bytes = away * (states.parameter + states.gradient + states.optimizer)
        traffic = 2 * states.parameter + states.gradient + 2 * states.updated
        beyond = np.maximum(0.0, away * traffic / HOST_UPDATE_BYTES_PER_S - update_s)
    else:
        num_bytes = away * states.optimizer
        moved, beyond = (num_bytes, num_bytes), none
    there, back = (
        prices.copy_s(direction, size, options.offload_tier)
        for direction, size in zip(("out", "in"), moved, strict=True)
    )
    if options.offload_states == "parameters":
        exposed = there + back + beyond
    else:
        hidden = prices.copy_hidden_share
        own_s = update_s * away / np.maximum(owned.every, 1.0)
        beside = np.maximum(0.0, np.maximum(there, back) - own_s)
        exposed = hidden * beside + (1.0 - hidden) * (there + back)
    return States(
        num_bytes=num_bytes,
        out_bytes=moved[0],
        in_bytes=moved[1],
        exposed_s=exposed * prices.scale("exposed.copy"),
    )
