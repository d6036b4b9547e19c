"""Which rows no other row beats: at least as much of what is wanted for no more of what is paid.

A point (cost, value) is on the front unless another has cost no larger and value no smaller, one of
them strictly. Equal points are on it together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indexes of the points (cost, value) on the front, in the order of cost, then of index.

    One pass over the points by rising cost and falling value.

    >>> pareto_front([(1, 1), (2, 3), (3, 2), (2, 3), (0.5, 1)])
    [4, 1, 3]
    """
    front: list[int] = []
    best: tuple[float, float] | None = None
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if best is None or points[index][1] > best[1] or points[index] == best:
            front.append(index)
            best = points[index]
    return front


def fronts(points: Iterable[tuple[Hashable, int, float, float]]) -> list[int]:
    """The fronts of several groups together: points are (group, index, cost, value).

    >>> fronts([("a", 0, 1.0, 1.0), ("b", 1, 9.0, 1.0), ("a", 2, 2.0, 1.0)])
    [0, 1]
    """
    groups: dict[Hashable, list[tuple[int, float, float]]] = {}
    for group, index, cost, value in points:
        groups.setdefault(group, []).append((index, cost, value))
    chosen: list[int] = []
    for members in groups.values():
        front = pareto_front([(cost, value) for _, cost, value in members])
        chosen += [members[i][0] for i in front]
    return sorted(chosen)
