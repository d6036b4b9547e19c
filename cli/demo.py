"""forerun demo: profile, plan, run and diff on this machine, no GPU needed."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from .. import document
from ..cluster import Profile
from ..errors import NoFeasiblePlan
from ..measurement import Measurement
from ..model import Model
from ..plan import PlanFile
from ..workload import Workload
from .log import say
from .options import common_options
from .plan_files import read_plan_file
from .profile import measure, warn_if_busy
from .progress import step_progress

MODEL, GPUS = "tiny-3m", "2xcpu"
SEQ_TOKENS, BATCH_SEQS, STEPS = 256, 8, 20
FRESH = timedelta(days=1)


@click.command("demo")
@click.option("--fresh", is_flag=True, help="Measure this machine again.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep plan.json, measured.json and report.html in this folder.",
)
@common_options
def command(as_json: bool, fresh: bool, output: Path | None) -> None:
    """Plan a tiny training run for this machine, execute it, and show how wrong the plan was."""
    from . import render

    with tempfile.TemporaryDirectory(prefix="forerun-demo-") as scratch:
        comparison = play(output or Path(scratch), fresh)
    if as_json:
        render.print_json(comparison)
    else:
        render.print_diff(comparison)
        kept = f"; files in {output}" if output is not None else ""
        render.print_line(f"error = predicted / measured - 1{kept}")


def play(folder: Path, fresh: bool) -> dict[str, Any]:
    """The diff document of the whole round; its files stand in `folder`, its story on stderr."""
    from ..costmodel.diff import diff
    from ..executors import run
    from ..planner import risks
    from .report import report_html

    profile = recent_profile(fresh)
    say(f"1. this machine: {profile.name}, measured {profile.date}")
    document.write(folder / "plan.json", best_plan(profile))
    plan_file = read_plan_file(folder / "plan.json")
    say(
        f"2. plan: {MODEL} on {GPUS} -> {plan_file.label}, "
        f"{1e3 * plan_file.estimate.step_s.median:.0f} ms per step predicted"
    )
    warn_if_busy()
    with step_progress("3. run") as on_progress:
        measurement = run(plan_file, on_progress=on_progress)
    document.write(folder / "measured.json", measurement)
    say(
        f"3. run: {len(measurement.steps)} steps on real text, loss "
        f"{measurement.loss[0]:.2f} -> {measurement.loss[-1]:.2f}, "
        f"{1e3 * measurement.step_s.median:.0f} ms per step measured"
    )
    comparison = diff(plan_file, document.read(Measurement, folder / "measured.json"))
    comparison["quality"] = [document.to_raw(risk) for risk in risks(plan_file.plan)]
    document.write_bytes(folder / "report.html", report_html(comparison).encode())
    say("4. diff:")
    return comparison


def best_plan(profile: Profile) -> PlanFile:
    """The plan that the search ranks first for two processes of this machine."""
    from ..catalogs import load_cluster, load_model
    from ..planner import Pins, search
    from .plan import ranked_files

    model: Model = load_model(MODEL)
    workload = Workload(seq_tokens=SEQ_TOKENS, global_batch_seqs=BATCH_SEQS, steps=STEPS)
    result = search(model, load_cluster(GPUS, profile=profile), workload, Pins(), keep=1)
    if result.infeasible is not None:
        raise NoFeasiblePlan(result.infeasible.reason, result.infeasible.smallest_change)
    return ranked_files(result)[0]


def recent_profile(fresh: bool) -> Profile:
    """The stored profile of this machine's CPU when younger than a day, or a quick new one.

    A new quick one is stored too, except over a stored one that holds more.
    """
    from ..catalogs import load_user_profile, save_user_profile

    stored = load_user_profile("cpu")
    if stored is not None and not fresh and _age(stored) < FRESH:
        return stored
    profile = measure("cpu", quick=True)
    if stored is None or len(stored.operators) <= len(profile.operators):
        save_user_profile(profile)
    return profile


def _age(profile: Profile) -> timedelta:
    """Time since a profile was taken."""
    taken = datetime.fromisoformat(profile.date)
    if taken.tzinfo is None:
        taken = taken.replace(tzinfo=UTC)
    return datetime.now(UTC) - taken
