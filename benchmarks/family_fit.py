"""Fits constants of related software stacks together: each is held near the value of its family.

Stacks of one family (a way of working on a kind of device, such as Megatron on H100) differ less
than their rows can tell apart. With e(t) the logarithms of predicted over measured step times of
stack s under its constants t_s (in the logarithm), f the values of its family, and p physical start
values, the fit minimises

    sum over stacks  sum over rows (sqrt(1 + (e / 0.05)^2) - 1) / doubt
                     + sum over constants ((t_s - f) / spread)^2 / 2
    + sum over families and constants ((f - p) / wide)^2 / 2

a soft-L1 loss that follows most rows and not the worst one, and two normal priors: `spread` is how
far stacks of a family are expected to lie from it, `wide` how far a family from physics. Rows of a
table are not independent, their errors are of structure as well: they count 1 / doubt.

A stack with few rows stays near its family, one with many goes where they say. Held-out errors
refit the stack, and its family's values, without the rows that are scored, to first order around
the fit over all rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]
SCALE = 0.05
"""Of the soft-L1 loss: residuals beyond 5 % count linearly."""
DOUBT = 2.0
LARGEST_STEP = 0.5
"""In the logarithm, per iteration."""
INNER_ROUNDS = 20
REWEIGHTINGS = 50
CLOSE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Free:
    """One free constant."""

    name: str
    start: float
    """Where physics puts it."""
    wide: float
    """Standard deviation of families around that, in the logarithm."""
    spread: float
    """Standard deviation of stacks around their family, in the logarithm."""
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """Stacks that share their time constants, and which of these are free."""

    stacks: tuple[str, ...]
    family: str
    free: tuple[Free, ...]

    @property
    def start(self) -> Floats:
        """Start values in the logarithm."""
        return np.log([f.start for f in self.free])


Values = dict[str, float]
"""Constants by name."""
Centres = dict[tuple[str, str], float]
"""Values of families in the logarithm, by family and constant."""
Residuals = Callable[[Target, Values], Floats]
"""log(predicted / measured) of a target's rows under these constants."""


@dataclass
class Line:
    """The residuals of one target's rows as a linear function around x."""

    target: Target
    x: Floats
    r: Floats
    slope: Floats

    def at(self, y: Floats) -> Floats:
        """Residuals at y."""
        return self.r + self.slope @ (y - self.x)

    def best(self, centre: Floats, rows: Rows, largest_step: float = LARGEST_STEP) -> Floats:
        """The constants that suit some rows and the family's values best."""
        free = self.target.free
        if not free:
            return self.x
        stiff = np.array([f.spread for f in free]) ** -2
        low, high = np.log([f.low for f in free]), np.log([f.high for f in free])
        lower = np.maximum(low, np.minimum(self.x - largest_step, high))
        upper = np.minimum(high, np.maximum(self.x + largest_step, low))
        slope, y = self.slope[rows], np.clip(self.x, lower, upper)
        for _ in range(REWEIGHTINGS):
            r = self.at(y)[rows]
            weight = 1.0 / (SCALE**2 * DOUBT * np.sqrt(1.0 + (r / SCALE) ** 2))
            curve = slope.T @ (weight[:, None] * slope) + np.diag(stiff)
            pull = slope.T @ (weight * (slope @ y - r)) + stiff * centre
            new = _within(curve, pull, lower, upper)
            moved = float(np.max(np.abs(new - y)))
            y = new
            if moved < CLOSE / 10:
                break
        return y


def _within(curve: Floats, pull: Floats, lower: Floats, upper: Floats) -> Floats:
    """Least y C y / 2 - p y with bounds: what runs into one is held, the rest solved again."""
    held = np.zeros(len(pull), dtype=bool)
    y = np.zeros(len(pull))
    while True:
        free = ~held
        if not np.any(free):
            return y
        rest = pull[free] - curve[np.ix_(free, held)] @ y[held]
        y[free] = np.linalg.solve(curve[np.ix_(free, free)], rest)
        outside = free & ((y < lower) | (y > upper))
        if not np.any(outside):
            return y
        y = np.where(outside, np.clip(y, lower, upper), y)
        held |= outside


def centres_of(targets: Sequence[Target], found: Sequence[Floats]) -> Centres:
    """The families' values that suit their stacks' constants best."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for target, x in zip(targets, found, strict=True):
        for free, value in zip(target.free, x, strict=True):
            key = (target.family, free.name)
            weight, total = sums.get(key, (free.wide**-2, np.log(free.start) * free.wide**-2))
            sums[key] = (weight + free.spread**-2, total + float(value) * free.spread**-2)
    return {key: total / weight for key, (weight, total) in sums.items()}


def shared(targets: Sequence[Target]) -> set[tuple[str, str]]:
    """Families and constants that two stacks or more leave free: one alone makes no family."""
    counts = Counter((target.family, free.name) for target in targets for free in target.free)
    return {key for key, count in counts.items() if count > 1}


def centre_for(target: Target, centres: Centres) -> Floats:
    """The family's values of a target's free constants; physical ones where it has none."""
    return np.array(
        [centres.get((target.family, f.name), float(np.log(f.start))) for f in target.free]
    )


@dataclass
class FamilyFit:
    """All targets together."""

    targets: list[Target]
    residuals: Residuals
    lines: list[Line] = field(default_factory=list)
    centres: Centres = field(default_factory=dict)

    def run(
        self, rounds: int, start: Sequence[Floats], say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Linearise, solve, and again, until nothing moves or `rounds` are over."""
        found = [np.clip(x, *_bounds(t)) for t, x in zip(self.targets, start, strict=True)]
        best = (np.inf, self.lines)
        for number in range(rounds + 1):
            self.lines = [self._line(t, x) for t, x in zip(self.targets, found, strict=True)]
            best = min(best, (self.loss(), self.lines), key=lambda entry: entry[0])
            say(f"round {number}: loss {self.loss():.2f}")
            found = self._solve()
            moved = [np.max(np.abs(y - line.x), initial=0.0) for y, line in
                     zip(found, self.lines, strict=True)]  # fmt: skip
            if max(moved, default=0.0) < 0.01:
                break
        self.lines = best[1]
        self.centres = centres_of(self.targets, [line.x for line in self.lines])

    def loss(self) -> float:
        """What the fit minimises, at the lines' points."""
        total = 0.0
        centres = centres_of(self.targets, [line.x for line in self.lines])
        for line in self.lines:
            total += float(np.sum(np.sqrt(1 + (line.r / SCALE) ** 2) - 1)) / DOUBT
            spread = np.array([f.spread for f in line.target.free])
            apart = (line.x - centre_for(line.target, centres)) / spread
            total += 0.5 * float(np.sum(apart**2))
        return total

    def _line(self, target: Target, x: Floats) -> Line:
        step = 0.03
        r = self.residuals(target, values_of(target, x))
        columns = [
            (self.residuals(target, values_of(target, x + step * unit)) - r) / step
            for unit in np.eye(len(x))
        ]
        slope = np.stack(columns, axis=1) if columns else np.zeros((len(r), 0))
        return Line(target=target, x=x, r=r, slope=slope)

    def _solve(self) -> list[Floats]:
        found = [line.x for line in self.lines]
        for _ in range(INNER_ROUNDS):
            centres = centres_of(self.targets, found)
            new = [
                line.best(centre_for(line.target, centres), np.ones(len(line.r), dtype=bool))
                for line in self.lines
            ]
            moved = max(
                (float(np.max(np.abs(a - b), initial=0.0)) for a, b in
                 zip(new, found, strict=True)), default=0.0,
            )  # fmt: skip
            found = new
            if moved < CLOSE:
                break
        return found

    def values(self, which: int) -> Values:
        """The fitted constants of one target."""
        return values_of(self.targets[which], self.lines[which].x)

    def in_sample(self, which: int) -> Floats:
        """Errors, predicted / measured - 1."""
        return np.expm1(self.lines[which].r)

    def held_out(self, which: int, folds: Sequence[Rows]) -> Floats:
        """Errors of a target's rows, each fold's by the fit without it."""
        line = self.lines[which]
        out = line.r.copy()
        for fold in folds:
            out[fold] = line.at(self.without(which, fold))[fold]
        return np.expm1(out)

    def without(self, which: int, rows: Rows) -> Floats:
        """One target's constants refitted without some of its rows, with its family's values."""
        line = self.lines[which]
        found = [other.x for other in self.lines]
        if not line.target.free:
            return line.x
        for _ in range(INNER_ROUNDS):
            centre = centre_for(line.target, centres_of(self.targets, found))
            y = line.best(centre, ~rows, 2 * LARGEST_STEP)
            moved = float(np.max(np.abs(y - found[which])))
            found[which] = y
            if moved < CLOSE:
                break
        return found[which]

    def family_without(self, rows: Sequence[Rows]) -> Centres:
        """The families' values without some rows of every target; targets without rows left do not
        count."""
        kept = [i for i, fold in enumerate(rows) if not np.all(fold)]
        lines = [self.lines[i] for i in kept]
        found = [line.x for line in lines]
        for _ in range(3):
            centres = centres_of([line.target for line in lines], found)
            found = [
                line.best(centre_for(line.target, centres), ~rows[i]) if np.any(rows[i]) else line.x
                for i, line in zip(kept, lines, strict=True)
            ]
        return centres_of([line.target for line in lines], found)


def values_of(target: Target, x: Floats) -> Values:
    """Constants by name from their logarithms."""
    return {f.name: float(np.exp(v)) for f, v in zip(target.free, x, strict=True)}


def _bounds(target: Target) -> tuple[Floats, Floats]:
    return np.log([f.low for f in target.free]), np.log([f.high for f in target.free])


def fold_of_rows(names: Sequence[str], folds: int = 5) -> list[Rows]:
    """Five folds over rows, drawn once."""
    order = np.random.default_rng(0).permutation(len(names))
    return [np.isin(np.arange(len(names)), order[i::folds]) for i in range(folds)]


def fold_of_groups(names: Sequence[str]) -> list[Rows]:
    """One fold per name."""
    array = np.array(names)
    return [array == name for name in sorted(set(names))]


def mean_size(errors: Mapping[str, Floats]) -> float:
    """Mean over sources of the mean size inside each."""
    return float(np.mean([np.mean(np.abs(e)) for e in errors.values()]))
