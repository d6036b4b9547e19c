"""forerun predict: the estimate for a layout of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import document
from ..measurement import Measurement
from ..plan import Plan
from .jobs import read_job
from .log import say_job, say_not_executed
from .options import axis_options, common_options, job_options, output_option
from .pins import read_pins
from .plan_files import plan_file_of


def with_experts(plan: Plan, placement: Path | None, loads: Path | None) -> Plan:
    """The plan with its experts placed, and loaded as a run measured."""
    from ..planner.experts import expect_loads, place_experts_in

    if placement is not None:
        plan = place_experts_in(plan, document.read_raw(placement), str(placement))
    if loads is not None:
        plan = expect_loads(plan, document.read(Measurement, loads))
    return plan


@click.command("predict")
@job_options
@axis_options
@click.option(
    "--orders",
    "orders_path",
    type=click.Path(path_type=Path),
    help="Pipeline orders in place of a schedule: the file of forerun solve pipeline --csv.",
)
@click.option(
    "--expert-loads",
    type=click.Path(path_type=Path),
    help="Measurement of a run: how uneven the experts' loads are.",
)
@click.option(
    "--expert-placement",
    type=click.Path(path_type=Path),
    help="Placement of experts on ranks, from forerun solve experts -o.",
)
@output_option("the plan file")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    orders_path: Path | None,
    expert_loads: Path | None,
    expert_placement: Path | None,
    **flags: Any,
) -> None:
    """Predict the cost of one layout; nothing is searched.

    An axis not given is 1 or off, dp takes the ranks left, the precision is bf16 (fp32 on CPUs),
    the schedule 1F1B, the micro-batch 1 sequence, recompute none. With --orders the plan file holds
    the orders, and forerun run executes them.
    """
    from ..costmodel import memory_report
    from . import render
    from .layout import fixed_plan

    job = read_job(flags)
    say_job(job)
    pins, orders = read_pins(flags), None
    if orders_path is not None:
        from ..planner.pipeline import read_csv

        orders = read_csv(orders_path)
    plan = fixed_plan(job.model, job.cluster, job.workload, pins, orders)
    if expert_placement is not None or expert_loads is not None:
        plan = with_experts(plan, expert_placement, expert_loads)
    plan_file = plan_file_of(plan)
    say_not_executed(plan_file.plan)
    if output is not None:
        document.write(output, plan_file)
    if as_json:
        from ..planner import risks

        render.print_json(
            {
                "label": plan_file.label,
                "plan": plan_file.plan,
                "estimate": plan_file.estimate,
                "memory": memory_report(plan_file.plan),
                "quality": risks(plan_file.plan),
            }
        )
    else:
        render.print_job(job)
        render.print_plans([plan_file])
        render.print_terms(plan_file.estimate)
        render.print_memory(memory_report(plan_file.plan))
        render.print_quality(plan_file.plan)
