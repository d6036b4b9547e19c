"""Fits the constants of software stacks to a table of published runs, and says how well they hold.

    python benchmarks/fit_stacks.py tests/validation/published_dev.csv            # fit and report
    python benchmarks/fit_stacks.py tests/validation/published_dev.csv --write    # and store
    python benchmarks/fit_stacks.py tests/validation/published_dev.csv --report docs/accuracy.md

Which constants of which stack are free stands in `benchmarks/fit_stacks.toml`: at most six per
stack. All others are held at what the stack's file says. How they are fitted, each stack's near its
family's, says `benchmarks/family_fit.py`. Rows with empty cells keep the filling that is fastest
with the stored constants.

Beside the error in sample stand three that are held out: over five folds of rows; over groups (rows
that share model and source); and as a source that nobody has seen, priced with the family's stack,
whose constants then come from the other sources alone.
"""

from __future__ import annotations

import argparse
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from family_fit import (
    FamilyFit,
    Floats,
    Free,
    Target,
    Values,
    fold_of_groups,
    fold_of_rows,
    mean_size,
    shared,
)

from forerun.catalogs import load_stack
from forerun.costmodel.validate import (
    Case,
    Row,
    build_cases,
    evaluate,
    outcomes,
    read_table,
    settled,
    validate,
)
from forerun.stack import Stack

CONFIG = Path(__file__).with_suffix(".toml")
STACKS = Path(__file__).parent.parent / "catalogs" / "stacks"
TIED = {
    "gemm_16bit": ("tf32", "fp16", "bf16"),
    "gemm_fp8": ("fp8", "int8"),
    "gemm_fp4": ("fp4",),
}
"""Free constants that set several dtypes of `gemm_efficiency` at once."""
ROUNDS = 6
MOST_CONSTANTS = 6
LEAST_SPREAD, MOST_SPREAD = 0.03, 0.3


def constants(values: Values) -> dict[str, float]:
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


def read_config() -> list[Target]:
    """What is fitted. `also` names stacks that differ in memory alone: their rows are fitted
    together."""
    raw = tomllib.loads(CONFIG.read_text())
    common = raw.pop("constants")
    targets: list[Target] = []
    for stack, entry in raw.items():
        free = tuple(Free(name=name, **common[name]) for name in entry["free"])
        if len(free) > MOST_CONSTANTS:
            raise SystemExit(f"{stack}: {len(free)} free constants, at most {MOST_CONSTANTS}")
        stacks = (stack, *entry.get("also", ()))
        targets.append(Target(stacks=stacks, family=entry["family"], free=free))
    return targets


def stored(target: Target) -> Floats:
    """The logarithms of the constants in the stack's file."""
    stack = load_stack(target.stacks[0])
    return np.log([_value(stack, free) for free in target.free])


def _value(stack: Stack, free: Free) -> float:
    if free.name in TIED:
        value = stack.gemm_efficiency.get(TIED[free.name][0])
    else:
        value = getattr(stack, free.name)
    return float(np.clip(value or free.start, free.low, free.high))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Errors of one target's rows, predicted / measured - 1."""

    target: Target
    cases: Sequence[Case]
    values: Values
    in_sample: Floats
    by_rows: Floats
    by_groups: Floats

    @property
    def line(self) -> str:
        """One stack in words."""
        errors = (self.in_sample, self.by_rows, self.by_groups)
        means = (float(np.mean(np.abs(e))) for e in errors)
        in_sample, rows, groups = means
        size = np.abs(self.in_sample)
        values = ", ".join(f"{k} {v:.4g}" for k, v in self.values.items())
        return (
            f"{self.target.stacks[0]}: {len(size)} rows, {len(self.values)} constants; mean error "
            f"in sample {in_sample:.1%}, five folds {rows:.1%}, by group {groups:.1%}; median "
            f"{np.median(size):.1%}, bias {np.median(self.in_sample):+.1%}\n    {values}"
        )


def fit(targets: list[Target], cases: Sequence[Sequence[Case]]) -> tuple[FamilyFit, list[Outcome]]:
    """All targets together."""
    of = {target.stacks: rows for target, rows in zip(targets, cases, strict=True)}

    def residuals(target: Target, values: Values) -> Floats:
        changed = constants(values)
        return np.log1p(evaluate(of[target.stacks], {s: changed for s in target.stacks}))

    found = FamilyFit(targets=targets, residuals=residuals)
    found.run(ROUNDS, [stored(t) for t in targets], say=lambda text: print(text, flush=True))
    done = [
        Outcome(
            target=target,
            cases=rows,
            values=found.values(i),
            in_sample=found.in_sample(i),
            by_rows=found.held_out(i, fold_of_rows([case.row.id for case in rows])),
            by_groups=found.held_out(i, fold_of_groups([group_of(case) for case in rows])),
        )
        for i, (target, rows) in enumerate(zip(targets, cases, strict=True))
    ]
    return found, done


def unseen(found: FamilyFit, done: Sequence[Outcome], table: Sequence[Row]) -> dict[str, Floats]:
    """Errors by source of stacks chosen by layout alone, with the families' values from the other
    sources."""
    rows = [row for row in table if row.is_time]
    cases = settled(outcomes(build_cases(rows, named=False)))
    errors: dict[str, Floats] = {}
    for source in sorted({row.source for row in rows}):
        hidden = [np.array([c.row.source == source for c in o.cases]) for o in done]
        values: dict[str, Values] = defaultdict(dict)
        for (family, name), value in found.family_without(hidden).items():
            if (family, name) in shared(found.targets):
                values[family][name] = float(np.exp(value))
        changed = {family: constants(v) for family, v in values.items()}
        errors[source] = np.array(
            evaluate([case for case in cases if case.row.source == source], changed)
        )
    return errors


def store(done: Sequence[Outcome], found: FamilyFit, unknown: Mapping[str, Floats]) -> None:
    """Write the constants into the stacks' files, with what they rest on."""
    for outcome in done:
        if not outcome.values:
            continue
        rows = sorted({case.row.source for case in outcome.cases})
        basis = (
            f"{len(outcome.cases)} rows of {', '.join(rows)}: mean error "
            f"{np.mean(np.abs(outcome.in_sample)):.1%} in sample, "
            f"{np.mean(np.abs(outcome.by_rows)):.1%} over five folds"
        )
        for stack in outcome.target.stacks:
            _store_one(stack, outcome.values, basis, np.log1p(outcome.by_rows))
    families: dict[str, Values] = defaultdict(dict)
    for family, name in sorted(shared(found.targets)):
        families[family][name] = float(np.exp(found.centres[family, name]))
    for family, values in families.items():
        members = [o for o in done if o.target.family == family]
        sources = sorted({case.row.source for o in members for case in o.cases})
        errors = np.concatenate([np.log1p(unknown[source]) for source in sources])
        names = ", ".join(o.target.stacks[0] for o in members)
        _store_one(family, values, f"the family's value: {names}", errors)


def _store_one(stack: str, values: Values, basis: str, errors: Floats) -> None:
    path = STACKS / f"{stack}.toml"
    raw: dict[str, Any] = tomllib.loads(path.read_text())
    for name, value in values.items():
        if name in TIED:
            for dtype in TIED[name]:
                raw["gemm_efficiency"][dtype] = round(value, 4)
        else:
            raw[name] = float(f"{value:.4g}")
    chosen = {k: v for k, v in raw.get("fitted", {}).items() if k in raw and k not in values}
    raw["fitted"] = {**chosen, **dict.fromkeys(values, basis)}
    raw["spread"] = round(float(np.clip(np.std(errors), LEAST_SPREAD, MOST_SPREAD)), 3)
    path.write_text(tomli_w.dumps(raw, multiline_strings=True))


BEGIN, END = "<!-- published: begin -->", "<!-- published: end -->"


def by_source(done: Sequence[Outcome], which: str) -> dict[str, Floats]:
    """One kind of errors, source by source."""
    found: dict[str, list[float]] = defaultdict(list)
    for outcome in done:
        for case, error in zip(outcome.cases, getattr(outcome, which), strict=True):
            found[case.row.source].append(error)
    return {source: np.array(found[source]) for source in sorted(found)}


def report(
    done: Sequence[Outcome], unknown: Mapping[str, Floats], summary: dict[str, Any]
) -> list[str]:
    """The tables of docs/accuracy.md: by source, and the constants by stack."""
    kinds = [by_source(done, which) for which in ("in_sample", "by_rows", "by_groups")]
    in_sample, rows, groups = kinds
    lines = [
        BEGIN,
        "| source | rows | in sample | median | bias | five folds | median | leave a group out "
        "| as an unknown source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source, errors in in_sample.items():
        size, fold = np.abs(errors), np.abs(rows[source])
        lines.append(
            f"| {source} | {len(errors)} | {size.mean():.1%} | {np.median(size):.1%} "
            f"| {np.median(errors):+.1%} | {fold.mean():.1%} | {np.median(fold):.1%} "
            f"| {np.abs(groups[source]).mean():.1%} | {np.abs(unknown[source]).mean():.1%} |"
        )
    total = sum(map(len, in_sample.values()))
    fitted = sum(len(o.values) for o in done)
    families = {o.target.family for o in done if o.values}
    lines += [
        f"| **mean of the sources** | {total} | **{mean_size(in_sample):.1%}** | | "
        f"| **{mean_size(rows):.1%}** | | **{mean_size(groups):.1%}** "
        f"| **{mean_size(unknown):.1%}** |",
        "",
        f"{fitted} constants are fitted, in {sum(bool(o.values) for o in done)} stacks of "
        f"{len(families)} families. One constant efficiency per GPU type and precision, fitted to "
        f"the same rows, has a mean error of {summary['baseline_macro_mean_ape']:.1%}.",
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
        "| stack | family | constants fitted |",
        "|---|---|---|",
    ]
    for outcome in done:
        if outcome.values:
            values = ", ".join(f"{k} {v:.3g}" for k, v in outcome.values.items())
            names = ", ".join(outcome.target.stacks)
            lines.append(f"| {names} | {outcome.target.family} | {values} |")
    return [*lines, END]


def stored_summary(table: Path) -> dict[str, Any]:
    """How good the stored constants are."""
    return validate([row for row in read_table(table) if isinstance(row, Row)])["summary"]


def write_report(path: Path, lines: Sequence[str]) -> None:
    """Replace the tables between their marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(before + "\n".join(lines) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--write", action="store_true", help="store the constants")
    parser.add_argument("--rows", action="store_true", help="print every row's error")
    parser.add_argument("--report", type=Path, help="write the tables into this page")
    options = parser.parse_args()
    table = [row for row in read_table(options.table) if isinstance(row, Row)]
    times = [case for case in settled(outcomes(build_cases(table))) if case.row.is_time]
    targets = read_config()
    fitted = {stack for target in targets for stack in target.stacks}
    for stack in sorted({stack_of(case) for case in times} - fitted):
        targets.append(Target(stacks=(stack,), family=stack, free=()))
    cases = [[c for c in times if stack_of(c) in target.stacks] for target in targets]
    found, done = fit(
        [t for t, rows in zip(targets, cases, strict=True) if rows], [c for c in cases if c]
    )
    for outcome in done:
        print(outcome.line)
        if options.rows:
            for case, *errors in zip(
                outcome.cases, outcome.in_sample, outcome.by_rows, strict=True
            ):
                shown = " ".join(f"{error:+7.1%}" for error in errors)
                print(f"      {case.row.id:24s} {shown}  {case.ladders[0][0].plan.label}")
    unknown = unseen(found, done, table)
    for name, errors in [
        ("in sample", by_source(done, "in_sample")),
        ("five folds", by_source(done, "by_rows")),
        ("by group", by_source(done, "by_groups")),
        ("unknown source", unknown),
    ]:
        print(f"{name}: mean of the sources {mean_size(errors):.2%}")
    if options.write:
        store(done, found, unknown)
    if options.report is not None:
        fresh = get_context("spawn")  # stacks are read once per process, and may just have changed
        with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as one:
            summary = one.submit(stored_summary, options.table).result()
        write_report(options.report, report(done, unknown, summary))


if __name__ == "__main__":
    main()
