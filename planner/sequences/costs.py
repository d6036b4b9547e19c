"""What a sequence costs on a group of ranks: t(l, d), which the solvers of this package use.

A group of d ranks works through a pass, one or more sequences packed one after the other. Attention
does not cross sequences, so that the time of a pass is a sum over them:

    time(S, d) = max(f_d, c_d + sum_{i in S} t(l_i, d)),      t(l, d) = a_d l^2 + b_d l
    tokens:      sum_{i in S} l_i <= E_d

with c_d the fixed time of a pass (latencies, gathers of parameters), f_d what its launches take at
least, and E_d the tokens that a group holds.

Source of the form: Wang et al. 2024 (FlexSP), the section on the cost model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs per degree; every tuple has one entry per degree."""

    degrees: tuple[int, ...]
    """Ranks of a group: ascending powers of two."""
    kinds: tuple[str, ...]
    """How a group cuts the sequence: none, ring, ulysses."""
    quadratic_s: tuple[float, ...]
    """a_d, seconds per squared token."""
    linear_s: tuple[float, ...]
    """b_d, seconds per token."""
    pass_s: tuple[float, ...]
    """c_d, seconds per pass."""
    floor_s: tuple[float, ...]
    """f_d, seconds that a pass takes at least."""
    capacity_tokens: tuple[int, ...]
    """E_d, tokens that a group holds."""
    fit_error: float = 0.0
    """Largest relative difference from what the coefficients were fitted to."""

    def __post_init__(self) -> None:
        for degree in self.degrees:
            if degree < 1 or degree & (degree - 1):
                raise InputError("degrees", degree, "not a power of two", "give 1, 2, 4, ...")
        if not self.degrees or list(self.degrees) != sorted(set(self.degrees)):
            raise InputError("degrees", list(self.degrees), "not ascending", "give 1, 2, 4, ...")

    def seconds(self, lengths: Ints) -> Floats:
        """t(l, d) of every length (K,) on every degree (D,) as (K, D); infinite beyond E_d.

        >>> costs = linear_costs((1, 2), seconds_per_token=1.0, tokens_per_rank=10)
        >>> costs.seconds(np.array([4, 16])).tolist()
        [[4.0, 2.0], [inf, 8.0]]
        """
        l = lengths.astype(np.float64)[:, None]
        seconds = l * (l * np.array(self.quadratic_s) + np.array(self.linear_s))
        return np.where(lengths[:, None] <= np.array(self.capacity_tokens), seconds, np.inf)

    def pass_seconds(self, lengths: Iterable[int], degree: int) -> float:
        """Time of one pass of these sequences on a group of `degree` ranks."""
        at = self.degrees.index(degree)
        quadratic, linear = self.quadratic_s[at], self.linear_s[at]
        busy = sum(l * (l * quadratic + linear) for l in lengths)
        return max(self.floor_s[at], self.pass_s[at] + busy)

    def up_to(self, max_degree: int) -> Costs:
        """The same costs without the degrees above `max_degree`."""
        below = [degree for degree in self.degrees if degree <= max_degree]
        if not below:
            raise InputError("max-degree", max_degree, f"no degree of {list(self.degrees)} is left",
                             f"give {self.degrees[0]} or more")  # fmt: skip
        return self.of(below)

    def of(self, degrees: Sequence[int]) -> Costs:
        """The same costs with these degrees alone."""
        keep = [self.degrees.index(degree) for degree in degrees]
        return replace(
            self, **{name: tuple(getattr(self, name)[i] for i in keep) for name in PER_DEGREE}
        )

    def holding(self, tokens_per_rank: int) -> Costs:
        """The same costs where a rank holds `tokens_per_rank` tokens."""
        return replace(self, capacity_tokens=tuple(tokens_per_rank * d for d in self.degrees))


PER_DEGREE = ("degrees", "kinds", "quadratic_s", "linear_s", "pass_s", "floor_s", "capacity_tokens")


def check_ranks(num_ranks: int) -> None:
    """Raise InputError unless the ranks are a power of two: groups are aligned blocks of them."""
    if num_ranks < 1 or num_ranks & (num_ranks - 1):
        below = 1 << max(num_ranks, 1).bit_length() - 1
        raise InputError("gpus", num_ranks, "groups need a power of two of them",
                         f"use {below} or {2 * below}")  # fmt: skip


def check_lengths(lengths: Ints, costs: Costs) -> None:
    """Raise InputError unless every sequence is positive and fits on some group."""
    if len(lengths) == 0:
        raise InputError("lengths", "(empty)", "no sequences", "give one length per line")
    if int(lengths.min()) < 1:
        index = int(np.argmin(lengths))
        raise InputError("lengths", int(lengths[index]), f"sequence {index} is not positive",
                         "give tokens, 1 or more")  # fmt: skip
    most, longest = max(costs.capacity_tokens), int(lengths.max())
    if longest > most:
        problem = f"the largest group, {costs.degrees[-1]} ranks, holds {most} tokens"
        raise InputError("lengths", longest, problem,
                         "use more GPUs, recompute, or cut longer sequences")  # fmt: skip


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `most`.

    >>> powers_of_two(8)
    (1, 2, 4, 8)
    """
    return tuple(1 << k for k in range(most.bit_length()))


def linear_costs(
    degrees: tuple[int, ...], *, seconds_per_token: float, tokens_per_rank: int, pass_s: float = 0.0
) -> Costs:
    """Work that divides perfectly and has no quadratic part."""
    return Costs(
        degrees=degrees,
        kinds=tuple("none" if d == 1 else "ulysses" for d in degrees),
        quadratic_s=(0.0,) * len(degrees),
        linear_s=tuple(seconds_per_token / d for d in degrees),
        pass_s=(pass_s,) * len(degrees),
        floor_s=(0.0,) * len(degrees),
        capacity_tokens=tuple(tokens_per_rank * d for d in degrees),
    )


PUBLISHED_WORK_S = {"7b": (5.128e-9, 1.8396e-4), "13b": (9.2852e-9, 3.0602e-4),
                    "30b": (1.54262e-8, 8.0357e-4)}  # fmt: skip
"""Seconds per squared token and per token of one rank."""
PUBLISHED_PASS_S = {"7b": 0.6294, "13b": 1.1326, "30b": 2.7894}
PUBLISHED_SHAPES = {"7b": (32, 4096), "13b": (40, 5120), "30b": (60, 6656)}
"""Layers and width."""
PUBLISHED_LINKS = {2: 154e9, 4: 137e9, 8: 121e9, 16: 8e9, 32: 6e9}
"""Bytes per second of the all-to-all by degree; 5 GB/s beyond."""


def published_costs(
    num_ranks: int, *, tokens_per_rank: int, model: str = "7b", pass_s: float | None = None
) -> Costs:
    """The costs that FlexSP's authors fitted to GPTs on nodes of eight A100.

    Work a l^2 + b l divided by d, and four all-to-alls each way of two bytes per element; `pass_s`
    replaces their fixed time of a group and micro-batch.

    Source: PKU-DAIR/Hetu-Galvatron, branch flexsp, galvatron/flexsp_solver/solver.py.
    """
    quadratic, linear = PUBLISHED_WORK_S[model]
    layers, width = PUBLISHED_SHAPES[model]
    degrees = powers_of_two(num_ranks)
    moved = [4 * 2 * 2 * layers * width / PUBLISHED_LINKS.get(d, 5e9) if d > 1 else 0.0
             for d in degrees]  # fmt: skip
    fixed = PUBLISHED_PASS_S[model] if pass_s is None else pass_s
    return Costs(
        degrees=degrees,
        kinds=tuple("none" if d == 1 else "ulysses" for d in degrees),
        quadratic_s=tuple(quadratic / d for d in degrees),
        linear_s=tuple((linear + m) / d for d, m in zip(degrees, moved, strict=True)),
        pass_s=(fixed,) * len(degrees),
        floor_s=(0.0,) * len(degrees),
        capacity_tokens=tuple(tokens_per_rank * d for d in degrees),
    )
