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
    validate,
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
MOST_CONSTANTS = 6
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


@dataclass(frozen=True, kw_only=True)
class Target:
    """Stacks that share their time constants, and which of these are free."""

    stacks: tuple[str, ...]
    free: tuple[Free, ...]


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

    target: Target
    values: dict[str, float]
    in_sample: Floats
    by_rows: Floats
    by_groups: Floats


def fit(target: Target, cases: Sequence[Case]) -> Fit:
    """Gauss-Newton in the logarithm of the constants."""
    free = target.free
    start = np.log([f.start for f in free])
    low, high = np.log([f.low for f in free]), np.log([f.high for f in free])
    firm = SCALE / np.array([f.spread for f in free])

    def residuals(x: Floats) -> Floats:
        values = {f.name: float(np.exp(v)) for f, v in zip(free, x, strict=True)}
        changed = constants(values)
        return np.log1p(evaluate(cases, {stack: changed for stack in target.stacks}))

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
        target=target,
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


def read_config() -> list[Target]:
    """What is fitted: a stack's own entries override the common start values.

    `also` names stacks that differ in memory alone: their rows are fitted together.
    """
    raw = tomllib.loads(CONFIG.read_text())
    common = raw.pop("constants")
    targets: list[Target] = []
    for stack, entries in raw.items():
        also = tuple(entries.pop("also", ()))
        free = tuple(Free(name=name, **{**common[name], **own}) for name, own in entries.items())
        if len(free) > MOST_CONSTANTS:
            raise SystemExit(f"{stack}: {len(free)} free constants, at most {MOST_CONSTANTS}")
        targets.append(Target(stacks=(stack, *also), free=free))
    return targets


def store(result: Fit, cases: Sequence[Case]) -> None:
    """Write the constants into the stack's file, with what they rest on."""
    rows = sorted({case.row.source for case in cases})
    basis = (
        f"{len(cases)} rows of {', '.join(rows)}: mean error "
        f"{np.mean(np.abs(result.in_sample)):.1%} in sample, "
        f"{np.mean(np.abs(result.by_rows)):.1%} over five folds"
    )
    for stack in result.target.stacks:
        _store_one(STACKS / f"{stack}.toml", result, basis)


def _store_one(path: Path, result: Fit, basis: str) -> None:
    raw: dict[str, Any] = tomllib.loads(path.read_text())
    for name, value in result.values.items():
        if name in TIED:
            for dtype in TIED[name]:
                raw["gemm_efficiency"][dtype] = round(value, 4)
        else:
            raw[name] = float(f"{value:.4g}")
    others = {k: v for k, v in raw.get("fitted", {}).items() if k not in result.values}
    raw["fitted"] = {**others, **dict.fromkeys(result.values, basis)}
    raw["spread"] = round(float(np.clip(np.std(np.log1p(result.by_rows)), 0.03, 0.3)), 3)
    path.write_text(tomli_w.dumps(raw, multiline_strings=True))


def held(target: Target, cases: Sequence[Case]) -> Fit:
    """The stored constants as they are: nothing is fitted, nothing is held out."""
    errors = np.array(evaluate(cases))
    return Fit(target=target, values={}, in_sample=errors, by_rows=errors, by_groups=errors)


def line(result: Fit) -> str:
    """One stack's outcome in words."""
    in_sample, rows, groups = (
        float(np.mean(np.abs(e))) for e in (result.in_sample, result.by_rows, result.by_groups)
    )
    median, bias = np.median(np.abs(result.in_sample)), np.median(result.in_sample)
    values = ", ".join(f"{k} {v:.4g}" for k, v in result.values.items())
    return (
        f"{result.target.stacks[0]}: {len(result.in_sample)} rows, {len(result.values)} constants; "
        f"mean error in sample {in_sample:.1%}, five folds {rows:.1%}, by group {groups:.1%}; "
        f"median {median:.1%}, bias {bias:+.1%}\n    {values}"
    )


BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"


def report(done: Sequence[tuple[Fit, Sequence[Case]]], summary: dict[str, Any]) -> list[str]:
    """The tables of docs/accuracy.md: by source, and the constants by stack."""
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for result, cases in done:
        triples = zip(result.in_sample, result.by_rows, result.by_groups, strict=True)
        for case, triple in zip(cases, triples, strict=True):
            rows.setdefault(case.row.source, []).append(triple)
    lines = [
        BEGIN,
        "| source | rows | in sample | median | bias | five folds | median | leave a group out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    means: list[Floats] = []
    for source in sorted(rows):
        errors = np.array(rows[source])
        size = np.abs(errors)
        mean, median = size.mean(axis=0), np.median(size, axis=0)
        means.append(mean)
        lines.append(
            f"| {source} | {len(errors)} | {mean[0]:.1%} | {median[0]:.1%} "
            f"| {np.median(errors[:, 0]):+.1%} | {mean[1]:.1%} | {median[1]:.1%} | {mean[2]:.1%} |"
        )
    macro = np.mean(means, axis=0)
    lines += [
        f"| **mean of the sources** | {sum(map(len, rows.values()))} | **{macro[0]:.1%}** | | "
        f"| **{macro[1]:.1%}** | | **{macro[2]:.1%}** |",
        "",
        f"{sum(len(result.values) for result, _ in done)} constants are fitted, in "
        f"{sum(bool(result.values) for result, _ in done)} stacks. One constant efficiency per GPU "
        f"type and precision, fitted to the same rows, has a mean error of "
        f"{summary['baseline_macro_mean_ape']:.1%}.",
        "",
        "With the stored constants: "
        + ", ".join(
            f"{name} {summary[key]:.1%}"
            for name, key in (
                ("mean of the sources", "macro_mean_ape"),
                ("median row", "median_ape"),
                ("signed median", "bias"),
                ("coverage of the 90 % intervals", "coverage"),
            )
        )
        + f"; peak memory {summary['memory']['mean_ape']:.1%} over {summary['memory']['rows']} "
        f"rows; plans of one model, GPUs and batch: mean regret "
        f"{summary['ranking']['mean_regret']:.1%}, Kendall tau-b "
        f"{summary['ranking']['kendall_tau']:.2f} over {summary['ranking']['groups']} groups.",
        "",
        "| stack | constants fitted |",
        "|---|---|",
    ]
    for result, _ in done:
        if result.values:
            values = ", ".join(f"{k} {v:.3g}" for k, v in result.values.items())
            lines.append(f"| {', '.join(result.target.stacks)} | {values} |")
    return [*lines, END]


def write_report(path: Path, lines: Sequence[str]) -> None:
    """Replace the tables between their marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + "\n".join(lines) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--only", nargs="*", help="stacks to fit")
    parser.add_argument("--write", action="store_true", help="store the constants")
    parser.add_argument("--rows", action="store_true", help="print every row's error")
    parser.add_argument("--report", type=Path, help="write the tables into this page")
    options = parser.parse_args()
    table = read_table(options.table)
    times = [case for case in settled(outcomes(build_cases(table))) if case.row.is_time]
    done: list[tuple[Fit, Sequence[Case]]] = []
    targets = [t for t in read_config() if not options.only or t.stacks[0] in options.only]
    for target in targets:
        cases = [case for case in times if stack_of(case) in target.stacks]
        if not cases:
            print(f"{target.stacks[0]}: no rows")
            continue
        result = fit(target, cases)
        done.append((result, cases))
        print(line(result), flush=True)
        if options.rows:
            for case, error in zip(cases, result.in_sample, strict=True):
                print(f"      {case.row.id:24s} {error:+7.1%}  {case.ladders[0][0].plan.label}")
        if options.write:
            store(result, cases)
    if options.report is not None:
        fitted = {stack for target in targets for stack in target.stacks}
        others = sorted({stack_of(case) for case in times} - fitted)
        for stack in others:
            cases = [case for case in times if stack_of(case) == stack]
            done.append((held(Target(stacks=(stack,), free=()), cases), cases))
        write_report(options.report, report(done, validate(table)["summary"]))


if __name__ == "__main__":
    main()
