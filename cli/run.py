"""forerun run: execute a plan and write what really happened."""

from __future__ import annotations

from pathlib import Path

import click

from .. import document
from .options import POSITIVE, common_options, output_option, plan_argument, read_plan_file
from .progress import step_progress


@click.command("run")
@plan_argument
@output_option("the measurement")
@click.option("--steps", type=POSITIVE, help="Timed steps; default: the plan's.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Steps before the timed ones.",
)
@click.option("--data", help="File or folder of text or JSONL in place of the plan's.")
@click.option("--model", help="package.module:function, again, for a plan of one's own module.")
@click.option(
    "--pace",
    metavar="DEVICE",
    help="Emulate: CPU processes hold every chunk to the time predicted for this device (H100, a "
    "profile's file, or plan: the plan's own); for schedules, not for speed.",
)
@click.option(
    "--pace-scale",
    type=float,
    metavar="FACTOR",
    help="Seconds here per emulated second; default: such that real work is short beside it.",
)
@common_options
def command(
    as_json: bool,
    plan_path: Path,
    output: Path | None,
    steps: int | None,
    warmup: int,
    data: str | None,
    model: str | None,
    pace: str | None,
    pace_scale: float | None,
) -> None:
    """Train as PLAN says, on this machine, and measure every term of the prediction."""
    from ..executors import run
    from . import render

    plan_file = read_plan_file(plan_path)
    with step_progress(plan_file.label) as on_progress:
        measurement = run(
            plan_file,
            steps=steps,
            warmup_steps=warmup,
            data=data,
            on_progress=on_progress,
            module=model,
            pace=pace,
            pace_scale=pace_scale,
        )
    if output is not None:
        document.write(output, measurement)
    if as_json:
        render.print_json(measurement)
    else:
        render.print_measurement(measurement)
