"""Fits the constants of software stacks to a table of published runs, and says how well they hold.

    python benchmarks/fit_stacks.py tests/validation/published_dev.csv            # fit and report
    python benchmarks/fit_stacks.py tests/validation/published_dev.csv --write    # and store

Which constants of which stack are free stands in `benchmarks/fit_stacks.toml`: at most six per
stack. All others are held at what the stack's file says. Constants are fitted in the logarithm,
with a weak prior around a physical start value and bounds, to the logarithm of predicted over
measured step time under a soft-L1 loss, which follows most rows and not the worst one. Rows with
empty cells keep the filling that is fastest at the start values.

Beside the error in sample stand two cross-validated ones: five folds over rows, and folds over
groups (rows that share model and source), each refitted without the fold to first order around the
fit over all rows.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray
from scipy.optimize import least_squares

from forerun.costmodel.validate import (
    Case,
    build_cases,
    evaluate,
    outcomes,
    read_table,
    settled,
)

Floats = NDArray[np.float64]
CONFIG = Path(__file__).with_suffix(".toml")
STACKS = Path(__file__).parent.parent / "catalogs" / "stacks"
SCALE = 0.05
"""Of the soft-L1 loss: residuals beyond 5 % count linearly."""
TIED = {
    "gemm_16bit": ("tf32", "fp16", "bf16"),
    "gemm_fp8": ("fp8", "int8"),
    "gemm_fp4": ("fp4",),
}
"""Free constants that set several dtypes of `gemm_efficiency` at once."""
STEPS = 6
LARGEST_STEP = 0.5
"""In the logarithm, per iteration."""


@dataclass(frozen=True, kw_only=True)
class Free:
    """One free constant: where it starts, how firmly it is held there, and its bounds."""

    name: str
    start: float
    spread: float
    """Standard deviation of the prior in the logarithm."""
    low: float
    high: float


def constants(values: Mapping[str, float]) -> dict[str, float]:
    """Free constants as the stack's own: a tied one sets several dtypes."""
    plain = {name: value for name, value in values.items() if name not in TIED}
    tied = {
        f"gemm_efficiency.{dtype}": value
        for name, value in values.items()
        if name in TIED
        for dtype in TIED[name]
    }
    return {**plain, **tied}


def stack_of(case: Case) -> str:
    """The stack that prices a settled case."""
    return case.ladders[0][0].plan.cluster.pools[0].stack.name


def group_of(case: Case) -> str:
    """Rows of one model in one source are near-duplicates."""
    return f"{case.row.source} {case.row.model}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The outcome for one stack: errors are predicted / measured - 1."""

    stack: str
    values: dict[str, float]
    in_sample: Floats
    by_rows: Floats
    by_groups: Floats


def fit(stack: str, cases: Sequence[Case], free: Sequence[Free]) -> Fit:
    """Gauss-Newton in the logarithm of the constants."""
    start = np.log([f.start for f in free])
    low, high = np.log([f.low for f in free]), np.log([f.high for f in free])
    firm = SCALE / np.array([f.spread for f in free])

    def residuals(x: Floats) -> Floats:
        values = {f.name: float(np.exp(v)) for f, v in zip(free, x, strict=True)}
        return np.log1p(evaluate(cases, {stack: constants(values)}))

    def solve(x: Floats, r: Floats, slope: Floats, rows: NDArray[np.bool_]) -> Floats:
        """The best step from x of the linear model over some rows."""
        if not len(free):
            return x

        def linear(y: Floats) -> Floats:
            data = (r + slope @ (y - x))[rows] / SCALE
            loss = np.sqrt(2 * (np.sqrt(1 + data**2) - 1))  # soft L1, as a residual
            return np.concatenate([loss, (y - start) * firm / SCALE])

        lower = np.maximum(low - 1e-9, x - LARGEST_STEP)
        upper = np.minimum(high + 1e-9, x + LARGEST_STEP)
        return least_squares(linear, np.clip(x, lower, upper), bounds=(lower, upper)).x

    everything = np.ones(len(cases), dtype=bool)
    x, r = start, residuals(start)
    best = (_loss(r, x, start, firm), x, r)
    slope = np.zeros((len(cases), len(free)))
    for _ in range(STEPS if len(free) else 0):
        slope = _slope(residuals, x, r)
        step = solve(x, r, slope, everything)
        if np.max(np.abs(step - x)) < 1e-3:
            break
        x = step
        r = residuals(x)
        best = min(best, (_loss(r, x, start, firm), x, r), key=lambda entry: entry[0])
    _, x, r = best
    if len(free):
        slope = _slope(residuals, x, r)

    def held_out(folds: Sequence[NDArray[np.bool_]]) -> Floats:
        out = r.copy()
        for fold in folds:
            if np.any(~fold):
                y = solve(x, r, slope, ~fold)
                out[fold] = (r + slope @ (y - x))[fold]
        return np.expm1(out)

    order = np.random.default_rng(0).permutation(len(cases))
    groups = sorted({group_of(case) for case in cases})
    names = np.array([group_of(case) for case in cases])
    return Fit(
        stack=stack,
        values={f.name: float(np.exp(v)) for f, v in zip(free, x, strict=True)},
        in_sample=np.expm1(r),
        by_rows=held_out([np.isin(np.arange(len(cases)), order[i::5]) for i in range(5)]),
        by_groups=held_out([names == group for group in groups]),
    )


def _loss(r: Floats, x: Floats, start: Floats, firm: Floats) -> float:
    data = np.sum(np.sqrt(1 + (r / SCALE) ** 2) - 1)
    return float(data + 0.5 * np.sum(((x - start) * firm / SCALE) ** 2))


def _slope(residuals: Callable[[Floats], Floats], x: Floats, r: Floats) -> Floats:
    step = 0.03
    return np.stack(
        [(residuals(x + step * unit) - r) / step for unit in np.eye(len(x))], axis=1
    ).reshape(len(r), len(x))


def read_config() -> dict[str, list[Free]]:
    """The free constants by stack: a stack's own entries override the common start values."""
    raw = tomllib.loads(CONFIG.read_text())
    common = raw.pop("constants")
    return {
        stack: [
            Free(name=name, **{**common[name], **own}) for name, own in constants.items()
        ]
        for stack, constants in raw.items()
    }  # fmt: skip


def store(result: Fit, cases: Sequence[Case]) -> None:
    """Write the constants into the stack's file, with what they rest on."""
    path = STACKS / f"{result.stack}.toml"
    raw: dict[str, Any] = tomllib.loads(path.read_text())
    rows = sorted({case.row.source for case in cases})
    basis = (
        f"{len(cases)} rows of {', '.join(rows)}: mean error "
        f"{np.mean(np.abs(result.in_sample)):.1%} in sample, "
        f"{np.mean(np.abs(result.by_rows)):.1%} over five folds"
    )
    fitted = {}
    for name, value in result.values.items():
        if name in TIED:
            for dtype in TIED[name]:
                raw["gemm_efficiency"][dtype] = round(value, 4)
        else:
            raw[name] = float(f"{value:.4g}")
        fitted[name] = basis
    raw["fitted"] = {
        **{k: v for k, v in raw.get("fitted", {}).items() if k not in fitted},
        **fitted,
    }
    raw["spread"] = round(float(np.clip(np.std(np.log1p(result.by_rows)), 0.03, 0.3)), 3)
    path.write_text(tomli_w.dumps(raw, multiline_strings=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--only", nargs="*", help="stacks to fit")
    parser.add_argument("--write", action="store_true", help="store the constants")
    parser.add_argument("--rows", action="store_true", help="print every row's error")
    options = parser.parse_args()
    everything = settled(outcomes(build_cases(read_table(options.table))))
    for name, free in read_config().items():
        if options.only and name not in options.only:
            continue
        cases = [case for case in everything if case.row.is_time and stack_of(case) == name]
        if not cases:
            print(f"{name}: no rows")
            continue
        result = fit(name, cases, free)
        errors = [result.in_sample, result.by_rows, result.by_groups]
        print(
            f"{name}: {len(cases)} rows, {len(free)} constants; mean error in sample "
            + ", five folds ".join(f"{np.mean(np.abs(e)):.1%}" for e in errors[:2])
            + f", by group {np.mean(np.abs(errors[2])):.1%}; median "
            + f"{np.median(np.abs(errors[0])):.1%}, bias {np.median(errors[0]):+.1%}\n    "
            + ", ".join(f"{k} {v:.4g}" for k, v in result.values.items()),
            flush=True,
        )
        if options.rows:
            for case, error in zip(cases, result.in_sample, strict=True):
                print(f"      {case.row.id:24s} {error:+7.1%}  {case.ladders[0][0].plan.label}")
        if options.write:
            store(result, cases)


if __name__ == "__main__":
    main()
