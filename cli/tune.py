"""forerun tune: plan, try the best few for real, learn from them, plan again, keep the fastest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from .. import document, units
from ..cluster import Profile
from ..errors import NoFeasiblePlan
from ..measurement import Measurement
from ..plan import PlanFile
from ..units import format_seconds
from .calibrate import learned
from .jobs import Job, is_traced, read_job
from .log import say, say_job
from .options import (
    AXES,
    POSITIVE,
    axis_options,
    common_options,
    fit_option,
    job_options,
    output_option,
    quality_options,
    space_option,
)
from .plan import find_plans, ranked_files
from .progress import step_progress

if TYPE_CHECKING:
    from ..executors.tuning import Tried, Tuning

OFF = 0.1
"""A term that is further off than this part of the step is worth a line."""


@click.command("tune")
@job_options
@axis_options
@click.option(
    "--candidates",
    type=POSITIVE,
    default=3,
    show_default=True,
    help="Plans that the planner proposes each time it is asked.",
)
@click.option("--budget", metavar="TIME", help="Begin nothing that would end later: 90s, 5m, 1h.")
@click.option(
    "--rounds",
    type=POSITIVE,
    default=2,
    show_default=True,
    help="Times that candidates near the fastest run, in turn.",
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
    help="Ask again with what was learned, and fold it into the stored profile.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep what was measured in this file, and go on from it.",
)
@quality_options
@fit_option
@space_option
@output_option("the fastest plan")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    candidates: int,
    budget: str | None,
    rounds: int,
    timed_steps: int,
    calibrating: bool,
    state: Path | None,
    **flags: Any,
) -> None:
    """Plan, run the best few on this machine, learn, plan again, and keep the fastest."""
    from ..executors import tune
    from . import render

    budget_s = units.parse_duration(budget, "budget") if budget is not None else None
    job = read_job(flags)
    say_job(job)
    with step_progress("tune") as on_progress:
        tuning = tune(
            asking(job, flags, candidates),
            learn if calibrating else None,
            request=request_digest(job, flags),
            rounds=rounds,
            steps=timed_steps,
            budget_s=budget_s,
            module=flags["model"] if is_traced(flags["model"]) else None,
            state_path=state,
            on_progress=on_progress,
        )
    if output is not None:
        document.write(output, tuning.winner.plan_file)
    lessons = store_lessons(tuning) if calibrating else []
    if as_json:
        render.print_json(tune_document(tuning, lessons))
    else:
        print_tune(tuning, lessons)


def asking(
    job: Job, flags: dict[str, Any], candidates: int
) -> Callable[[Profile | None], Sequence[PlanFile]]:
    """The planner's best plans for a job, by a profile (None: the job's own)."""

    def search(profile: Profile | None) -> Sequence[PlanFile]:
        asked = job
        if profile is not None:
            cluster = msgspec.structs.replace(job.cluster, profile=profile)
            asked = job._replace(cluster=cluster)
        result = find_plans(asked, flags, candidates, None)
        if result.infeasible is not None:
            raise NoFeasiblePlan(result.infeasible.reason, result.infeasible.smallest_change)
        return ranked_files(result)

    return search


def request_digest(job: Job, flags: dict[str, Any]) -> str:
    """What tells one request from another, whatever the machine's profile says today."""
    cluster = msgspec.structs.replace(job.cluster, profile=None)
    pins = {axis: flags[axis] for axis in (*AXES, "fit", "space")}
    asked = msgspec.json.encode((job.model, cluster, job.workload, pins))
    return hashlib.sha256(asked).hexdigest()


def learn(runs: Sequence[tuple[PlanFile, Measurement]]) -> Profile | None:
    """The profile that the first of these plans was priced with, corrected by all of them."""
    from ..costmodel.calibrate import calibrate

    before = runs[0][0].plan.cluster.profile
    return calibrate(before, runs) if before is not None else None


def store_lessons(tuning: Tuning) -> list[str]:
    """What changed in the profile that the plans were priced with, once corrected and stored."""
    from ..catalogs import save_user_profile
    from ..executors.tuning import NOISE_LIMIT

    if tuning.noise > NOISE_LIMIT:
        say(f"warning: not calibrated: runs of one plan differ by {tuning.noise:.0%}, the machine "
            "is busy")  # fmt: skip
        return []
    before = tuning.ran[0].plan_file.plan.cluster.profile
    after = learn(tuning.measured)
    if before is None or after is None:
        say("note: this device has no profile to calibrate; run forerun profile")
        return []
    say(f"stored {save_user_profile(after)}")
    return [*learned(before, after), *errors_after(tuning, after)]


def errors_after(tuning: Tuning, profile: Profile) -> list[str]:
    """How far the steps that ran were predicted off, before and with what was learned."""
    from ..costmodel.diff import diff

    before = [abs(diff(*run)["step"]["error"]) for run in tuning.measured]
    after = [
        abs(diff(*run, repredict=True, profile=profile)["step"]["error"]) for run in tuning.measured
    ]
    return [
        f"error of {tried.plan_file.label}: {100 * old:.1f} % -> {100 * new:.1f} %"
        for tried, old, new in zip(tuning.ran, before, after, strict=True)
    ]


def terms_off(tuning: Tuning) -> list[str]:
    """Terms that were off by more than a tenth of a step, in the plan where they were most."""
    from ..costmodel.diff import diff

    worst: dict[str, tuple[float, str]] = {}
    for plan_file, measurement in tuning.measured:
        compared = diff(plan_file, measurement)
        for term in compared["terms"]:
            share = (term["predicted"] - term["measured"]) / measurement.step_s.median
            if term["unit"] == "s" and abs(share) > max(OFF, abs(worst.get(term["term"], (0,))[0])):
                line = (
                    f"{term['term']}: predicted {format_seconds(term['predicted'])}, measured "
                    f"{format_seconds(term['measured'])} in {plan_file.label}"
                )
                worst[term["term"]] = (share, line)
    return [line for _, line in worst.values()]


def row_of(tried: Tried) -> dict[str, Any]:
    """One candidate of the document; measurements are null where it failed."""
    predicted_s = tried.plan_file.estimate.step_s.median
    row: dict[str, Any] = {
        "label": tried.plan_file.label,
        "predicted_s": predicted_s,
        "measured_s": None,
        "error": None,
        "turns": len(tried.turns),
    }
    if tried.failed:
        return row | {"failed": tried.failed}
    return row | {"measured_s": tried.step_s, "error": predicted_s / tried.step_s - 1}


def tune_document(tuning: Tuning, lessons: list[str]) -> dict[str, Any]:
    """The fastest plan, and what each candidate was predicted and measured to take."""
    from ..executors.tuning import measurement_of

    best = tuning.winner
    return {
        "label": best.plan_file.label,
        "plan": best.plan_file.plan,
        "estimate": best.plan_file.estimate,
        "tried": [row_of(tried) for tried in tuning.tried],
        "noise": tuning.noise,
        "measurement": measurement_of(best),
        "limit": tuning.limit,
        "learned": lessons,
    }


def print_tune(tuning: Tuning, lessons: list[str]) -> None:
    """Print the candidates in the order in which they ran, the noise floor and the lessons."""
    from . import render

    rows = []
    for tried in tuning.tried:
        row = row_of(tried)
        measured = format_seconds(row["measured_s"]) if tried.turns else "failed"
        label = row["label"] + (" *" if tried is tuning.winner else "")
        error = render.percent(row["error"], signed=True)
        rows.append([label, format_seconds(row["predicted_s"]), measured, error, str(row["turns"])])
    render.print_table(("candidate", "predicted", "measured", "error", "turns"), rows)
    render.print_line(
        f"* fastest; noise floor {render.percent(tuning.noise)} between runs of one plan"
    )
    if tuning.limit is not None:
        render.print_line("the budget ended it: some candidates ran less often, or not at all")
    for tried in tuning.tried:
        if tried.failed:
            render.print_line(f"failed   {tried.plan_file.label}: {tried.failed}")
    for line in terms_off(tuning):
        render.print_line(f"off      {line}")
    for line in lessons:
        render.print_line(f"learned  {line}")
