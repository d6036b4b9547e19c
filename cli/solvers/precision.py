"""forerun solve precision: dtypes or word lengths per operator group under an error budget."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, get_args

import click

from ... import document
from ...errors import NoFeasiblePlan
from ...workload import Quality
from ..options import common_options, output_option

if TYPE_CHECKING:
    from ...planner.precision import Option, PrecisionChoice

SHOWN = 20
"""Groups listed without --json."""


@click.command("precision")
@click.argument("options_path", metavar="OPTIONS", type=click.Path(path_type=Path))
@click.option(
    "--error-budget",
    type=float,
    required=True,
    help="Largest sum of errors, in the unit of the column error.",
)
@click.option("--memory-limit", type=float, help="Largest sum of memory_bytes; default: no limit.")
@click.option(
    "--objective",
    type=click.Choice(["time", "memory"]),
    default="time",
    show_default=True,
    help="Which sum is made small.",
)
@click.option(
    "--seconds-per-gib",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="What a GiB is worth in time: adds that much memory to the objective time.",
)
@click.option(
    "--quality",
    type=click.Choice(get_args(Quality)),
    multiple=True,
    help="Allow only options whose column quality says so; may be repeated.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    help="Seconds after which the best choice so far is taken; default: none.",
)
@output_option("the JSON document")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    options_path: Path,
    error_budget: float,
    memory_limit: float | None,
    objective: str,
    seconds_per_gib: float,
    quality: tuple[Quality, ...],
    time_limit: float | None,
) -> None:
    """Choose one option per operator group of OPTIONS, a CSV file, within an error budget.

    The columns are group, option, time_s, memory_bytes, error and, if wanted, quality. Errors of
    groups are taken to add; measure the error of the choice as a whole.
    """
    from ...planner.precision import Limits, Weights, allowed, read_options, solve_precision
    from ...units import GIB
    from .. import render

    started = perf_counter()
    options = read_options(options_path)
    if quality:
        options = allowed(options, quality)
    by_memory = objective == "memory"
    weights = Weights(
        time=0.0 if by_memory else 1.0, memory=1.0 if by_memory else seconds_per_gib / GIB
    )
    deadline = math.inf if time_limit is None else started + time_limit
    try:
        found = solve_precision(
            options,
            Limits(error=error_budget, memory_bytes=memory_limit),
            weights,
            out_of_time=lambda: perf_counter() >= deadline,
        )
    except NoFeasiblePlan as error:
        if as_json:
            reason = {"reason": error.reason, "smallest_change": error.smallest_change}
            render.print_json({"choice": {}, "infeasible": reason})
        raise
    result = to_document(found, perf_counter() - started)
    if output is not None:
        document.write_bytes(output, document.to_json(result))
    if as_json:
        render.print_json(result)
    else:
        print_choice(found, options, result)


def to_document(found: PrecisionChoice, seconds: float) -> dict[str, Any]:
    """The JSON document of a choice."""
    return {
        "choice": found.choice,
        "time_s": found.totals.time_s,
        "memory_bytes": found.totals.memory_bytes,
        "error": found.totals.error,
        "objective": found.objective,
        "lower_bound": found.lower_bound,
        "gap": found.gap,
        "optimal": found.optimal,
        "limit": found.limit,
        "seconds": seconds,
    }


def print_choice(
    found: PrecisionChoice, options: tuple[Option, ...], result: dict[str, Any]
) -> None:
    """Print what was chosen, group by group, and how good it is."""
    from ...units import format_bytes, format_seconds
    from .. import render

    chosen = [option for option in options if found.choice[option.group] == option.name]
    rows = [
        [o.group, o.name, format_seconds(o.time_s), format_bytes(o.memory_bytes), f"{o.error:.4g}"]
        for o in chosen[:SHOWN]
    ]
    render.print_table(("group", "option", "time", "memory", "error"), rows)
    if len(chosen) > SHOWN:
        render.print_line(f"... and {len(chosen) - SHOWN} more groups (--json lists all)")
    totals = found.totals
    render.print_line(
        f"{len(chosen)} groups: {format_seconds(totals.time_s)}, "
        f"{format_bytes(totals.memory_bytes)}, error {totals.error:.6g}"
    )
    proof = "no choice is better" if found.optimal else "a better choice may exist"
    limit = f", stopped by the {found.limit} limit" if found.limit else ""
    render.print_line(
        f"gap {render.percent(found.gap)}: {proof} ({result['seconds']:.2f} s{limit})"
    )
