"""forerun tune: plan, try the best three for real, keep the fastest, learn from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import document
from ..errors import NoFeasiblePlan
from ..measurement import Measurement
from ..plan import PlanFile
from ..units import format_seconds
from .calibrate import learned
from .options import (
    POSITIVE,
    axis_options,
    common_options,
    fit_option,
    is_traced,
    job_options,
    output_option,
    quality_options,
    read_job,
    say,
    say_job,
    space_option,
)
from .plan import find_plans, ranked_files
from .progress import step_progress

CANDIDATES = 3
NOISE_LIMIT = 0.1
"""Runs of one plan that differ by more say nothing about the machine's own speed."""


@click.command("tune")
@job_options
@axis_options
@click.option(
    "--rounds",
    type=POSITIVE,
    default=2,
    show_default=True,
    help="Times that every candidate runs, in turn.",
)
@click.option(
    "--timed-steps",
    type=POSITIVE,
    default=5,
    show_default=True,
    help="Timed steps of one such run.",
)
@click.option(
    "--calibrate/--no-calibrate",
    "calibrating",
    default=True,
    show_default=True,
    help="Fold what was measured into the stored profile.",
)
@quality_options
@fit_option
@space_option
@output_option("the fastest plan")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    rounds: int,
    timed_steps: int,
    calibrating: bool,
    **flags: Any,
) -> None:
    """Plan, run the best three on this machine in turns, and keep the fastest."""
    from ..executors import tune
    from . import render

    job = read_job(flags)
    say_job(job)
    result = find_plans(job, flags, CANDIDATES, None)
    if result.infeasible is not None:
        raise NoFeasiblePlan(result.infeasible.reason, result.infeasible.smallest_change)
    tried = ranked_files(result)
    with step_progress("tune") as on_progress:
        winner, measurements, noise = tune(
            tried,
            rounds=rounds,
            steps=timed_steps,
            on_progress=on_progress,
            module=flags["model"] if is_traced(flags["model"]) else None,
        )
    if output is not None:
        document.write(output, tried[winner])
    lessons = learn(tried, measurements, noise) if calibrating else []
    if as_json:
        render.print_json(tune_document(tried, measurements, winner, noise))
    else:
        print_tune(tried, measurements, winner, noise, lessons)


def learn(tried: list[PlanFile], measurements: list[Measurement], noise: float) -> list[str]:
    """What changed in the profile that the plans were priced with, once corrected and stored."""
    from ..catalogs import save_user_profile
    from ..costmodel.calibrate import calibrate

    if noise > NOISE_LIMIT:
        say(f"warning: not calibrated: runs of one plan differ by {noise:.0%}, the machine is busy")
        return []
    before = tried[0].plan.cluster.profile
    if before is None:
        say("note: this device has no profile to calibrate; run forerun profile")
        return []
    after = calibrate(before, list(zip(tried, measurements, strict=True)))
    say(f"stored {save_user_profile(after)}")
    return learned(before, after)


def tune_document(
    tried: list[PlanFile], measurements: list[Measurement], winner: int, noise: float
) -> dict[str, Any]:
    """The fastest plan, and what each candidate was predicted and measured to take."""
    best = tried[winner]
    rows = [
        {
            "label": plan_file.label,
            "predicted_s": plan_file.estimate.step_s.median,
            "measured_s": measured.step_s.median,
            "error": plan_file.estimate.step_s.median / measured.step_s.median - 1,
        }
        for plan_file, measured in zip(tried, measurements, strict=True)
    ]
    return {
        "label": best.label,
        "plan": best.plan,
        "estimate": best.estimate,
        "tried": rows,
        "noise": noise,
        "measurement": measurements[winner],
    }


def print_tune(
    tried: list[PlanFile],
    measurements: list[Measurement],
    winner: int,
    noise: float,
    lessons: list[str],
) -> None:
    """Print the candidates in the order of the prediction, the noise floor and the lessons."""
    from . import render

    rows = [
        [
            row["label"] + (" *" if index == winner else ""),
            format_seconds(row["predicted_s"]),
            format_seconds(row["measured_s"]),
            render.percent(row["error"], signed=True),
        ]
        for index, row in enumerate(tune_document(tried, measurements, winner, noise)["tried"])
    ]
    render.print_table(("candidate", "predicted", "measured", "error"), rows)
    render.print_line(f"* fastest; noise floor {render.percent(noise)} between runs of one plan")
    for line in lessons:
        render.print_line(f"learned  {line}")
