"""What meetings of replicas that train apart cost, in the mean over a period of H inner steps.

A rank's part of fragment f has n_f elements. R replicas exchange, once per H steps,

    fp32          an all-reduce of 4 n_f bytes
    4 or 8 bits   an all-to-all of encoded parts, m_f bytes, then an all-gather of as many
                  (`forerun.local_sgd.message_bytes`)

With t seconds of transfer, of which b keep this rank's cores or device from computing, beside d
inner steps of T seconds, a rank waits

    b + max(0, t - b - d T)

where b is zero with communication that runs beside compute, and what the same exchange takes inside
a node where it runs on the cores that compute. A quantised exchange has half of the delay for each
of its halves. The outer step reads and writes the fragment as often as `PASSES` says.

Kept besides, in fp32: the parameters of the last meeting and the momentum, of this rank's part; of
the fragment that is on its way its buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...local_sgd import BLOCK, SCALE_BYTES, LocalSgd, message_bytes
from ..graph import Array
from ..overlap import moved
from ..pieces import Pieces
from ..prices import Prices
from ..stages import Load

PASSES = {"average": 3.0, "diloco": 9.0, "co2": 10.0}
"""Times that a fragment is read and written, in copies of it: counted in `executors/local_sgd`."""
CODING_PASSES = 40.0
"""The same for encoding and decoding twice, whose operators are many and narrow: measured on one
thread, 30 to 45 with 4 bits."""
FP32 = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One collective of a fragment."""

    kind: str
    num_bytes: float
    seconds: float
    busy_s: float
    """Of it, what a rank cannot compute beside."""
    steps: int
    """Inner steps that it has until it is waited for."""

    def exposed_s(self, inner_step_s: float) -> float:
        """What a rank waits, with inner steps of that length."""
        beside = self.seconds - self.busy_s - self.steps * inner_step_s
        return self.busy_s + max(0.0, beside)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meetings:
    """All meetings of a period, of one rank."""

    settings: LocalSgd
    messages: tuple[Message, ...]
    work_s: float
    """Of the outer step and of coding, in the mean per inner step."""
    gap_bytes: float
    """Summed over a replica's ranks for the penalty of a stale average, per period."""

    def exposed_s(self, inner_step_s: float) -> float:
        """What a rank waits for messages, in the mean per inner step."""
        waits = (message.exposed_s(inner_step_s) for message in self.messages)
        return sum(waits) / self.settings.period

    def wire_bytes(self) -> dict[str, float]:
        """Bytes handed to collectives between replicas, in the mean per inner step."""
        total: dict[str, float] = {}
        for message in self.messages:
            name = f"{message.kind}@dp"
            total[name] = total.get(name, 0.0) + message.num_bytes / self.settings.period
        return total


def meetings(
    settings: LocalSgd,
    elements: Sequence[float],
    ranks: int,
    stride: int,
    together: int,
    prices: Prices,
) -> Meetings:
    """The meetings of `ranks` replicas, whose ranks of one place lie `stride` apart and have
    `elements` of each fragment; a replica is `together` ranks."""
    messages: list[Message] = []
    work_s = 0.0
    for count in elements:
        if settings.bits == 32:
            kinds = [("all_reduce", FP32 * count, settings.steps_late)]
        else:
            size = float(message_bytes(round(count), ranks, settings.bits))
            late, half = settings.steps_late, settings.half_way
            kinds = [("all_to_all", size, half), ("all_gather", size, late - half)]
        for kind, size, steps in kinds:
            seconds, busy_s = _seconds(kind, size, ranks, stride, together, prices)
            messages.append(
                Message(kind=kind, num_bytes=size, seconds=seconds, busy_s=busy_s, steps=steps)
            )
        passes = PASSES[settings.outer] + (CODING_PASSES if settings.bits < 32 else 0.0)
        one = prices.operator("copy", [np.array([count])], "fp32")[0]
        work_s += passes * float(one[0])
    measures_gap = settings.outer == "co2" and settings.steps_late > 0 and settings.penalty is None
    return Meetings(
        settings=settings,
        messages=tuple(messages),
        work_s=work_s / settings.period,
        gap_bytes=2 * FP32 if measures_gap else 0.0,
    )


def _seconds(
    kind: str, size: float, ranks: int, stride: int, together: int, prices: Prices
) -> tuple[float, float]:
    """Of one collective, and what of it keeps a rank from computing."""
    num_bytes, group = np.array([size]), np.array([float(ranks)])
    apart, groups = np.array([float(stride)]), np.array([float(together)])
    seconds = float(moved(kind, num_bytes, group, apart, groups, prices).seconds[0])
    if prices.pool.stack.can_overlap:
        return seconds, 0.0
    inside = float(prices.collective(kind, num_bytes, group, apart, groups, within=True)[0])
    return seconds, min(seconds, inside)


def fragment_elements(
    settings: LocalSgd, group_of: Sequence[int], costs: Pieces, load: Load, shard: float
) -> list[float]:
    """Trained elements of each fragment that a rank holds, `shard` ranks sharing them evenly.

    `group_of` is the group of every layer in order; embedding, norm and head go with the last.
    """
    num = settings.fragments
    found = [0.0] * num
    for index, group in enumerate(group_of):
        found[index % num] += float(costs.layers[group].trainable_params[0])
    layers = sum(found)
    found[-1] += float(load.trainable_params(costs)[0]) - layers
    return [count / shard for count in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of a rank beside those of its inner training."""

    states: Array
    """Parameters of the last meeting, and momentum."""
    on_its_way: Array
    """Buffers that are there while the replica trains on."""
    meeting: Array
    """Those at a meeting, when activations and gradients are gone."""


def held(settings: LocalSgd | None, in_layers: Array, in_ends: Array, layers: Array) -> Held:
    """What a rank holds with so many trained elements in its `layers` layers and outside of them.

    The last fragment is measured, which the ends of the model belong to.
    """
    trained = in_layers + in_ends
    none = 0.0 * trained
    if settings is None:
        return Held(states=none, on_its_way=none, meeting=none)
    share = np.floor(layers / settings.fragments) / np.maximum(layers, 1.0)
    largest = in_layers * share + in_ends
    copies = 2.0 if settings.outer != "average" else 0.0
    if settings.outer == "diloco" and settings.outer_momentum == 0:
        copies = 1.0
    whole = FP32 * largest
    coded = 2.0 * largest * (settings.bits / 8 + SCALE_BYTES / BLOCK)
    sent = whole if settings.bits == 32 else coded
    late = settings.steps_late > 0
    both = 2.0 if settings.outer == "co2" and late else 1.0
    temporary = 0.0 if settings.bits == 32 else CODING_COPIES
    return Held(
        states=copies * FP32 * trained,
        on_its_way=sent if late else none,
        meeting=(both + temporary) * whole,
    )


CODING_COPIES = 5.0
"""Of a fragment, that encoding has at most beside what it is given."""
