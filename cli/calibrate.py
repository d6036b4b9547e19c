"""forerun calibrate: fold measured runs back into this machine's profile."""

from __future__ import annotations

from pathlib import Path

import click

from .. import document
from ..cluster import Profile
from ..errors import InputError
from ..measurement import Measurement
from ..plan import Plan, PlanFile
from .diff import today_profile
from .log import say
from .options import common_options, output_option
from .plan_files import read_plan_file

Run = tuple[PlanFile, Measurement]


@click.command("calibrate")
@click.argument(
    "files", nargs=-1, metavar="PLAN MEASURED [PLAN MEASURED]...", type=click.Path(path_type=Path)
)
@output_option("a copy of the profile")
@common_options
def command(as_json: bool, output: Path | None, files: tuple[Path, ...]) -> None:
    """Correct the stored profile by runs, each given as its plan and its measurement."""
    from ..catalogs import save_user_profile
    from ..costmodel.calibrate import calibrate
    from . import render

    runs = read_runs(files)
    before = profile_for(runs[0][0].plan)
    after = calibrate(before, runs)
    stored = save_user_profile(after)
    if output is not None:
        document.write(output, after)
    say(f"stored {stored}")
    if as_json:
        render.print_json(after)
    else:
        for line in learned(before, after):
            render.print_line(line)


def read_runs(files: tuple[Path, ...]) -> list[Run]:
    """Plans and their measurements, given side by side."""
    if not files or len(files) % 2:
        raise InputError(
            "files",
            f"{len(files)} given",
            "plans and measurements go in pairs",
            "write plan.json measured.json [plan2.json measured2.json ...]",
        )
    return [
        (read_plan_file(plan), document.read(Measurement, measured))
        for plan, measured in zip(files[::2], files[1::2], strict=True)
    ]


def profile_for(plan: Plan) -> Profile:
    """The user's profile of the plan's device, or the one that the plan carries."""
    profile = today_profile(plan) or plan.cluster.profile
    if profile is None:
        raise InputError(
            "profile",
            plan.cluster.pools[0].device.name,
            "nothing was measured on this device",
            "run forerun profile first",
        )
    return profile


def learned(before: Profile, after: Profile) -> list[str]:
    """One line per correction that changed, and one for the spread."""
    lines = [
        f"{term}: scale {before.scale.get(term, 1.0):.3f} -> {scale:.3f}"
        for term, scale in after.scale.items()
        if abs(scale - before.scale.get(term, 1.0)) >= 5e-4
    ]
    return [*lines, f"spread of a step: {before.spread:.3f} -> {after.spread:.3f}"]
