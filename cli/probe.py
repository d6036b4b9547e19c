"""forerun probe: measure what a technique does to the user's own model, and keep it as evidence."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import units
from ..errors import InputError
from ..evidence import Evidence, family_of
from ..plan import Plan
from ..units import format_bytes, format_seconds
from .jobs import is_traced, read_job
from .log import say, say_job
from .options import POSITIVE, axis_options, common_options, job_options
from .pins import read_pins
from .plan_files import plan_file_of
from .progress import step_progress

if TYPE_CHECKING:
    from ..executors.probing import Probed


@click.command("probe")
@click.argument("technique")
@job_options
@axis_options
@click.option(
    "--setting",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the technique, as in a plan: recipe=halo1.",
)
@click.option(
    "--seeds",
    type=POSITIVE,
    default=3,
    show_default=True,
    help="Pairs of runs; the spread over them is the noise.",
)
@click.option("--budget", metavar="TIME", help="Begin no pair that would end later: 90s, 5m, 1h.")
@common_options
def command(
    as_json: bool,
    technique: str,
    given: Sequence[str],
    seeds: int,
    budget: str | None,
    **flags: Any,
) -> None:
    """Train with TECHNIQUE and without it, and keep the effect as evidence.

    The other flags say the baseline, as in forerun predict; the technique is added in every layer.
    --steps are those of every run. A run that diverges fails the probe, and nothing is kept. The
    planner uses what was found for models of the same family and about the same size on the same
    device, as class measured-here.
    """
    from ..catalogs import load_technique, save_evidence
    from ..executors import probe
    from ..executors.probing import with_technique
    from . import render
    from .layout import fixed_plan

    budget_s = units.parse_duration(budget, "budget") if budget is not None else None
    record = load_technique(technique)
    job = read_job(flags)
    say_job(job)
    baseline = fixed_plan(job.model, job.cluster, job.workload, read_pins(flags), None)
    variant = with_technique(baseline, record.name, parse_settings(given))
    with step_progress("probe") as on_progress:
        probed = probe(
            plan_file_of(baseline),
            plan_file_of(variant),
            record.name,
            steps=job.workload.steps,
            seeds=seeds,
            budget_s=budget_s,
            module=flags["model"] if is_traced(flags["model"]) else None,
            on_progress=on_progress,
        )
    evidence = evidence_of(variant, record.name, probed)
    path = save_evidence(evidence)
    say(f"stored {path}")
    if as_json:
        render.print_json(probe_document(evidence, probed, path))
    else:
        print_probe(evidence, probed)


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs; values as JSON where they are, else text.

    >>> parse_settings(["recipe=halo1", "activations=0.5"])
    {'recipe': 'halo1', 'activations': 0.5}
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError("setting", text, "is no NAME=VALUE", "write it as recipe=halo1")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def evidence_of(plan: Plan, technique: str, probed: Probed) -> Evidence:
    """What a probe of this plan, which uses the technique, says about it."""
    from ..planner.quality import record_names

    workload, model = plan.workload, plan.model
    used = record_names(plan.phase.settings[0].techniques, workload.optimizer)
    return Evidence(
        technique=technique,
        setting=used[technique],
        settings=settings_of(plan, technique),
        model=model.name,
        family=family_of(model),
        num_params=model.num_params,
        device=plan.cluster.pools[0].device.name,
        optimizer=workload.optimizer,
        learning_rate=workload.learning_rate,
        seq_tokens=workload.seq_tokens,
        global_batch_seqs=workload.global_batch_seqs,
        steps=probed.steps,
        seeds=len(probed.gaps),
        loss=sum(probed.baseline.losses) / len(probed.gaps),
        loss_gap=probed.loss_gap,
        loss_noise=probed.loss_noise,
        step_ratio=probed.step_ratio,
        memory_ratio=probed.memory_ratio,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def settings_of(plan: Plan, technique: str) -> dict[str, dict[str, Any]]:
    """What the plan says of a technique."""
    from ..executors.probing import VARIANTS

    return {name: dict(plan.phase.technique(name)) for name in VARIANTS.get(technique, {})}


def probe_document(evidence: Evidence, probed: Probed, path: Path) -> Mapping[str, Any]:
    """The probe's JSON document."""
    return {
        "technique": evidence.technique,
        "setting": evidence.setting,
        "baseline": probed.baseline,
        "variant": probed.variant,
        "loss_gap": evidence.loss_gap,
        "loss_noise": evidence.loss_noise,
        "step_ratio": evidence.step_ratio,
        "memory_ratio": evidence.memory_ratio,
        "harmless": evidence.harmless,
        "steps": evidence.steps,
        "seeds": evidence.seeds,
        "evidence": str(path),
        "limit": probed.limit,
    }


def print_probe(evidence: Evidence, probed: Probed) -> None:
    """Print both sides and the effect."""
    from . import render

    rows = [
        [name, f"{sum(side.losses) / len(side.losses):.4f}", format_seconds(side.step_s),
         format_bytes(side.peak_memory_bytes)]
        for name, side in (("baseline", probed.baseline), (evidence.technique, probed.variant))
    ]  # fmt: skip
    render.print_table(("plan", "loss", "step", "memory"), rows)
    render.print_line(f"{evidence.setting}: {evidence.claim}")
    render.print_line(f"on {evidence.conditions}")
    if probed.limit is not None:
        render.print_line("the budget ended it: fewer seeds ran than were asked for")
    verdict = "may use it (--allow measured-here)" if evidence.harmless else "will not use it"
    render.print_line(f"the planner {verdict}")
