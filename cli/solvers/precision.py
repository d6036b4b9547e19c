"""forerun solve precision: dtypes or word lengths per operator group under an error budget.

The options come from a CSV file, or are measured: what each precision in each group of layers does
to the gradient of a plan's model. The answer is then the plan with the choice in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import click

from ... import document
from ...errors import InputError, NoFeasiblePlan
from ...plan import Plan, PlanFile
from ...workload import Quality
from ..options import POSITIVE, common_options, output_option
from ..plan_files import plan_file_of

if TYPE_CHECKING:
    from ...planner.precision import Option, PrecisionChoice
    from ...planner.precision.layers import Group, Settings

SHOWN = 20
"""Groups listed without --json."""


@click.command("precision")
@click.argument(
    "options_path", metavar="[OPTIONS]", type=click.Path(path_type=Path), required=False
)
@click.option(
    "--measure",
    "plan_path",
    metavar="PLAN",
    type=click.Path(path_type=Path),
    help="Measure the options on the layers of this plan file, in place of a CSV file.",
)
@click.option(
    "--options",
    "named",
    default="bf16,int8-halo2",
    show_default=True,
    metavar="NAME,…",
    help="With --measure: precisions to choose among, compute or compute-recipe.",
)
@click.option(
    "--group-layers",
    type=POSITIVE,
    default=1,
    show_default=True,
    help="With --measure: layers that are chosen for together.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="With --measure: steps of training before.",
)
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path),
    help="With --measure: write the options that were measured to this file.",
)
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
@output_option("the JSON document (with --measure: the plan file)")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    options_path: Path | None,
    plan_path: Path | None,
    named: str,
    group_layers: int,
    steps: int,
    csv_path: Path | None,
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

    With --measure PLAN the groups are layers of the plan, and the error of an option is the
    relative squared change of the gradient with it in that group, measured here on one device; -o
    then writes the plan with the choice, which forerun run executes.
    """
    from ...planner.precision import Limits, Weights, allowed, read_options, solve_precision
    from ...units import GIB
    from .. import render

    started = perf_counter()
    measured: Measured | None = None
    if (options_path is None) == (plan_path is None):
        raise InputError("options", options_path or "(missing)", "give a CSV file, or --measure "
                         "and a plan file", "one of the two")  # fmt: skip
    if plan_path is not None:
        plan = document.read(PlanFile, plan_path).plan
        measured = measure(plan, named.split(","), group_layers, steps)
        options = measured.options
        if csv_path is not None:
            document.write_bytes(csv_path, csv_of(options).encode())
    else:
        assert options_path is not None
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
    if measured is not None:
        plan_file = plan_file_of(measured.plan_with(found.choice))
        result |= {"label": plan_file.label, "plan": plan_file.plan}
        if output is not None:
            document.write(output, plan_file)
    elif output is not None:
        document.write_bytes(output, document.to_json(result))
    if as_json:
        render.print_json(result)
    else:
        print_choice(found, options, result)


class Measured(NamedTuple):
    """Options of a plan's layers."""

    plan: Plan
    settings: dict[str, Settings]
    groups: tuple[Group, ...]
    options: tuple[Option, ...]

    def plan_with(self, choice: dict[str, str]) -> Plan:
        """The plan with a choice in it."""
        from ...planner.precision.layers import group_name, with_precision

        chosen = {group: self.settings[choice[group_name(group)]] for group in self.groups}
        return with_precision(self.plan, chosen)


def measure(plan: Plan, names: Sequence[str], group_layers: int, steps: int) -> Measured:
    """The options of these names on the layers of a plan, priced and measured."""
    from ...executors.sensitivity import sensitivities
    from ...planner.precision.layers import groups_of, layer_options, parse_option, with_precision
    from ..progress import progress

    settings = {name: parse_option(name) for name in names}
    groups = groups_of(plan.model.num_layers, group_layers)
    for own in settings.values():  # what the plan's devices refuse, before anything is measured
        everywhere = with_precision(plan, {(0, plan.model.num_layers - 1): own})
        plan_file_of(everywhere)
    with progress("measure") as on_progress:
        errors = sensitivities(plan, settings, groups, steps=steps, on_progress=on_progress)
    return Measured(plan, settings, groups, layer_options(plan, settings, groups, errors))


def csv_of(options: Sequence[Option]) -> str:
    """The options as the CSV file that this command reads."""
    lines = ["group,option,time_s,memory_bytes,error"]
    lines += [f"{o.group},{o.name},{o.time_s!r},{o.memory_bytes!r},{o.error!r}" for o in options]
    return "\n".join(lines) + "\n"


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
