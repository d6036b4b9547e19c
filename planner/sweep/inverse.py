"""Searches on a ladder 0, 1, ..., last for the end of what holds, with few questions.

Smallest: the least rung i such that holds(i), where larger rungs are expected to hold too.
Largest: the greatest rung i such that holds(i), where smaller rungs are expected to hold too.

Both ask along a coarse subset of the rungs until the answer changes, bisect between the last two,
and then ask rungs beside the answer, as what holds is only nearly monotone: degrees have to divide
counts. When one of those holds it becomes the answer, and its own neighbours are asked. The result
is exact when `holds` is monotone; otherwise it is a rung that holds, none of whose neighbours that
were asked improves on it.

Every rung is asked at most once. `usable(i)` false: the rung is passed over without a question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Holds = Callable[[int], bool]
Neighbours = Callable[[int], Iterable[int]]
NEAREST = 3


def _everywhere(rung: int) -> bool:
    return True


def _never() -> bool:
    return False


def smallest(
    holds: Holds,
    coarse: Sequence[int],
    *,
    neighbours: Neighbours | None = None,
    usable: Holds = _everywhere,
    hopeless: Callable[[], bool] = _never,
    others: Callable[[], Iterable[int]] = tuple,
) -> int | None:
    """The least rung that holds, or None when none of `coarse` (rising) and of `others()` does.

    `neighbours` proposes rungs below an answer; `hopeless` true ends the coarse search early;
    `others` proposes rungs to ask when none of the coarse ones holds.

    >>> smallest(lambda i: i >= 11, [0, 1, 3, 7, 15])
    11
    """
    asked: dict[int, bool] = {}
    below = -1
    for rung in coarse:
        if _known(holds, asked, rung):
            found = _bisect(holds, asked, usable, rung, below)
            return _improve(holds, asked, usable, found, neighbours or _below, below)
        below = rung
        if hopeless():
            break
    found = next((r for r in others() if usable(r) and _known(holds, asked, r)), None)
    if found is None:
        return None
    return _improve(holds, asked, usable, found, neighbours or _below, -1)


def largest(
    holds: Holds,
    coarse: Sequence[int],
    *,
    neighbours: Neighbours | None = None,
) -> int | None:
    """The greatest rung that holds, or None when the first rung of `coarse` (rising) does not.

    Rungs above the last of `coarse` are not asked. `neighbours` proposes rungs above an answer.

    >>> largest(lambda i: i <= 11, [0, 1, 3, 7, 15])
    11
    """
    asked: dict[int, bool] = {}
    found, above = None, coarse[-1] + 1
    for rung in coarse:
        if not _known(holds, asked, rung):
            above = rung
            break
        found = rung
    if found is None:
        return None
    found = _bisect(holds, asked, _everywhere, found, above)
    return _improve(holds, asked, _everywhere, found, neighbours or _above, coarse[-1] + 1)


def _known(holds: Holds, asked: dict[int, bool], rung: int) -> bool:
    if rung not in asked:
        asked[rung] = holds(rung)
    return asked[rung]


def _bisect(holds: Holds, asked: dict[int, bool], usable: Holds, good: int, bad: int) -> int:
    """The last rung that holds on the way from `good` to `bad` (either direction)."""
    while True:
        between = range(min(good, bad) + 1, max(good, bad))
        middle = (good + bad) // 2
        outward = sorted(between, key=lambda rung: (abs(rung - middle), rung))
        rung = next((r for r in outward if r in asked or usable(r)), None)
        if rung is None:
            return good
        if _known(holds, asked, rung):
            good = rung
        else:
            bad = rung


def _improve(
    holds: Holds,
    asked: dict[int, bool],
    usable: Holds,
    found: int,
    neighbours: Neighbours,
    end: int,
) -> int:
    """Better rungs (towards `end`, which is not asked) among the neighbours, until none holds."""
    while True:
        low, high = sorted((found, end))
        proposed = [r for r in dict.fromkeys(neighbours(found)) if low < r < high]
        better = next((r for r in proposed if usable(r) and _known(holds, asked, r)), None)
        if better is None:
            return found
        found = better


def _below(rung: int) -> Iterable[int]:
    return range(rung - 1, rung - 1 - NEAREST, -1)


def _above(rung: int) -> Iterable[int]:
    return range(rung + 1, rung + 1 + NEAREST)


def rounder_above(number: int) -> list[int]:
    """The next multiple of 1, 2, 4, ... above a number, up to twice the number.

    >>> rounder_above(11), rounder_above(8)
    ([12, 16], [9, 10, 12, 16])
    """
    steps = (2**k for k in range(number.bit_length()))
    return sorted({number - number % step + step for step in steps})


def rounder_below(number: int) -> list[int]:
    """The next multiple of 1, 2, 4, ... below a number, the largest first; no zero.

    >>> rounder_below(11), rounder_below(8)
    ([10, 8], [7, 6, 4])
    """
    steps = (2**k for k in range(number.bit_length()))
    return sorted({(number - 1) // step * step for step in steps} - {0}, reverse=True)
