"""AdaPT's fixed-point word lengths, from the values of a tensor (Kummer et al. 2021).

A word of WL bits of which FL are fractional holds, for signed codes,

    q(x) = clip( round(x 2^FL), -2^(WL-1), 2^(WL-1) - 1 ) 2^-FL

and its fidelity is the divergence of the histogram of q(x) from that of x over equal bins,

    KL = sum_i p_i ln(p_i / q_i)

with half a count added to every bin of both, so that it is finite, and zero exactly when the two
histograms are equal. *Push-down* takes the shortest word whose KL is within a bound (in the paper's
optimiser by bisection and with stochastic rounding; here by trying all in order, since KL is not
monotone, and to the nearest code, so that the answer repeats); *push-up* adds bits where the
gradients of recent steps point in different directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from .grid import Floats
from .problem import Option

LONGEST = 32
WORD_LENGTHS = tuple(range(4, LONGEST + 1))
BINS = 100
Error = Literal["kl", "relative_square"]
Strategy = Literal["min", "mean", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A fixed-point format, and how far it moves the histogram of the values it was chosen for."""

    word_length: int
    """Bits, sign included."""
    fraction_length: int
    """Bits after the point."""
    kl: float
    """Nats."""


def quantise(values: NDArray[Any], word_length: int, fraction_length: int) -> Floats:
    """The values in a fixed-point format: to the nearest code, ties to even, clipped at its ends.

    >>> quantise(np.array([0.3, -0.3, 9.0]), 4, 2).tolist()
    [0.25, -0.25, 1.75]
    """
    codes = np.rint(np.ldexp(np.asarray(values, dtype=np.float64), fraction_length))
    end = 2.0 ** (word_length - 1)
    return np.ldexp(np.clip(codes, -end, end - 1), -fraction_length)


def divergence(values: Floats, approximate: Floats, bins: int = BINS) -> float:
    """KL in nats of the histogram of `approximate` from that of `values`, in bins of `values`.

    What lies outside the range of `values` counts in the outermost bins.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 0.0 if np.array_equal(values, approximate) else math.log(2 * values.size + 1)
    p, _ = np.histogram(values, bins, (low, high))
    q, _ = np.histogram(np.clip(approximate, low, high), bins, (low, high))
    smooth_p = (p + 0.5) / (values.size + 0.5 * bins)
    smooth_q = (q + 0.5) / (values.size + 0.5 * bins)
    return max(0.0, float(np.sum(smooth_p * np.log(smooth_p / smooth_q))))


def push_down(values: NDArray[Any], *, largest_kl: float = 0.0, bins: int = BINS) -> Word:
    """The shortest word with KL <= `largest_kl`: first the fewest fractional bits, then the width.

    0 <= FL < WL <= 32. When no word of 32 bits is that faithful, the most faithful one is returned;
    its `kl` tells.
    """
    data = _finite(values)
    best: Word | None = None
    for fraction in range(LONGEST):
        word = _word(data, LONGEST, fraction, bins)
        if word.kl <= largest_kl:
            return _narrowed(data, word, largest_kl, bins)
        best = word if best is None or word.kl < best.kl else best
    assert best is not None
    return best


def _narrowed(data: Floats, word: Word, largest_kl: float, bins: int) -> Word:
    for length in range(word.fraction_length + 1, LONGEST):
        shorter = _word(data, length, word.fraction_length, bins)
        if shorter.kl <= largest_kl:
            return shorter
    return word


def _word(data: Floats, length: int, fraction: int, bins: int) -> Word:
    kl = divergence(data, quantise(data, length, fraction), bins)
    return Word(word_length=length, fraction_length=fraction, kl=kl)


def _finite(values: NDArray[Any]) -> Floats:
    data = np.asarray(values, dtype=np.float64).reshape(-1)
    if not data.size or not np.all(np.isfinite(data)):
        raise InputError("values", f"{data.size} numbers", "empty, or some are not finite",
                         "give a tensor of finite numbers")  # fmt: skip
    return data


def best_fraction(values: NDArray[Any], word_length: int, bins: int = BINS) -> Word:
    """The word of this length with the least KL; of equals, the one of the least square error.

    Few fractions can be best: the one whose range just holds the largest value, and those with up
    to two bits less of range, which clip it.
    """
    data = _finite(values)
    largest = float(np.abs(data).max())
    whole_bits = math.frexp(largest)[1] if largest else 0  # largest < 2^whole_bits
    ample = word_length - 1 - whole_bits
    found: list[tuple[float, float, Word]] = []
    for fraction in range(ample, ample + 3):
        approximate = quantise(data, word_length, fraction)
        word = _word(data, word_length, fraction, bins)
        found.append((word.kl, float(np.sum((data - approximate) ** 2)), word))
    return min(found, key=lambda entry: entry[:2])[2]


def push_up(
    word: Word, diversity: float, strategy: Strategy = "mean", headroom_bits: int = 4
) -> Word:
    """The word with bits added for the diversity of recent gradients; `kl` is kept as it was.

    diversity = sum_k ||g_k|| / ||sum_k g_k|| over the steps looked back on, 1 or more. With
    d = ln(diversity) - 1 > 0,

        s1 = max(ceil(1 / d^2), 1)        s2 = max(min(ceil(32 d^2), 32) - FL, 0)

    bits are combined by the strategy; otherwise one bit is added (the form of the paper's published
    optimiser, lorenz0890/AdaPT, optimizers/msgd_fp.py). `headroom_bits` stay before the point.

    Raises InputError for a diversity below 1: the triangle inequality excludes it.
    """
    if not diversity >= 1:
        raise InputError("diversity", diversity, "below 1",
                         "divide the sum of the norms by the norm of the sum")  # fmt: skip
    added = 1
    d = math.log(diversity) - 1
    if d > 0:
        few = max(math.ceil(1 / d**2), 1)
        many = max(min(math.ceil(32 * d**2), 32) - word.fraction_length, 0)
        added = {
            "min": min(few, many),
            "mean": math.ceil((few + many) / 2),
            "max": max(few, many),
        }[strategy]
    fraction = min(word.fraction_length + added, LONGEST)
    length = min(max(word.word_length, fraction) + 1, LONGEST)
    fraction = min(fraction, LONGEST - headroom_bits)
    length = max(length, fraction + headroom_bits)
    return Word(word_length=length, fraction_length=fraction, kl=word.kl)


def fixed_point_options(
    layers: Mapping[str, NDArray[Any]],
    time_s: Mapping[str, float],
    *,
    word_lengths: Sequence[int] = WORD_LENGTHS,
    error: Error = "relative_square",
    bins: int = BINS,
) -> tuple[Option, ...]:
    """One option per layer and word length, for `solve_precision`; named `WL.FL`, such as `8.6`.

    Parameters
    ----------
    layers : the values of each layer's tensor.
    time_s : what each layer takes with 32 bits. A word of WL bits takes WL / 32 of it, the paper's
        own model of arithmetic whose cost is linear in the word; a GPU gains only where the word is
        one of its types, so measure there.
    error : "relative_square" = sum (x - q)^2 / sum x^2, "kl" = the divergence in nats.

    memory_bytes = values x WL / 8.
    """
    options: list[Option] = []
    for name, values in layers.items():
        data = _finite(values)
        if name not in time_s:
            raise InputError("time_s", name, "no time for this layer", "give one per layer")
        square = float(np.sum(data**2))
        for length in word_lengths:
            word = best_fraction(data, length, bins)
            loss = word.kl
            if error == "relative_square":
                moved = data - quantise(data, length, word.fraction_length)
                loss = float(np.sum(moved**2)) / square if square else 0.0
            options.append(
                Option(
                    group=name,
                    name=f"{length}.{word.fraction_length}",
                    time_s=time_s[name] * length / LONGEST,
                    memory_bytes=data.size * length / 8,
                    error=loss,
                )
            )
    return tuple(options)
