"""forerun profile: measure this machine and store what was found."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .. import document
from ..cluster import Profile
from .log import say
from .options import common_options, output_option
from .progress import progress


@click.command("profile")
@click.option("--quick", is_flag=True, help="Fewer sizes: about half a minute.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What to measure; auto prefers a GPU.",
)
@output_option("a copy of the profile")
@common_options
def command(as_json: bool, quick: bool, device: str, output: Path | None) -> None:
    """Measure the speed of this machine's operators and links; later plans use it."""
    from ..catalogs import save_user_profile
    from . import render

    profile = measure(device, quick)
    stored = save_user_profile(profile)
    if output is not None:
        document.write(output, profile)
    say(f"stored {stored}")
    if as_json:
        render.print_json(profile)
    else:
        print_profile(profile)


def measure(device: str, quick: bool) -> Profile:
    """What the profiler finds, with its progress on stderr."""
    from ..executors.profiling import profile_machine

    warn_if_busy()
    say(f"measuring this machine ({'quick' if quick else 'full'}) ...")
    with progress("profile") as move:
        return profile_machine(
            device=device,
            quick=quick,
            on_progress=lambda fraction, label: move(fraction, 1.0, label),
        )


def warn_if_busy() -> None:
    """Say so when other programs are at work: what is measured now holds for a slower machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        say(f"warning: load average {load:.1f} on {cores} cores: what is timed now will be off")


def print_profile(profile: Profile) -> None:
    """Print what was measured: the fastest matmul per dtype, and how much stands in the file."""
    from . import render

    render.print_line(f"{profile.name}: {profile.device}, {profile.date}")
    for (dtype, busy), flops_per_s in sorted(fastest_matmul(profile).items()):
        render.print_line(f"matmul {dtype}, {busy} busy: {flops_per_s / 1e9:,.0f} GFLOP/s")
    render.print_line(
        f"{len(profile.operators)} operator curves, {len(profile.collectives)} collective curves, "
        f"run-to-run spread {100 * profile.spread:.1f} %"
    )


def fastest_matmul(profile: Profile) -> dict[tuple[str, int], float]:
    """FLOP/s of the best measured matmul by (dtype, busy processes)."""
    best: dict[tuple[str, int], float] = {}
    for curve in profile.operators:
        if curve.axes != ("m", "n", "k"):
            continue
        for (m, n, k), seconds in zip(curve.sizes, curve.forward_s, strict=True):
            key = (curve.dtype, curve.busy)
            best[key] = max(best.get(key, 0.0), 2 * m * n * k / seconds)
    return best
