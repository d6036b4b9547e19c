"""What a plan risks in the quality of its training, on whose evidence, and what is allowed.

Techniques that compute the same up to rounding are exact. The others have a class, which says how
far the evidence for them is from the user's own run:

    exact             the same gradients up to floating point
    equivalent-start  the same function where they begin, then training goes its own way
    measured-here     their effect was measured on the user's own task
    published         somebody's paper, under other conditions
    unquantified      no usable number

The planner uses a class, and all before it, where the workload allows it, and single techniques
where the user accepts them by the name of their catalog record. What the user types himself, such
as `--precision fp8`, he accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from ..catalogs import Technique, load_technique, names
from ..choices import HALO_RECIPES
from ..document import Value
from ..errors import unknown_name
from ..evidence import Evidence
from ..local_sgd import RECORDS
from ..local_sgd import TECHNIQUE as LOCAL_SGD
from ..plan import Plan
from ..workload import Quality, Workload

CLASSES: tuple[Quality, ...] = get_args(Quality)
LOW_COMPUTE = ("fp8", "mxfp8", "nvfp4", "int8", "fp6", "fp4")


class Risk(Value, frozen=True, kw_only=True):
    """One technique of a plan that is not exact, with its evidence."""

    technique: str
    """Name of its catalog record."""
    setting: str
    """What of it the plan uses."""
    quality: Quality
    title: str
    paper: str
    claim: str
    conditions: str
    recalled: bool
    """Whether the record was written from memory."""
    beyond: str | None
    """How the plan leaves the conditions of the evidence; None where it does not."""


MEASURED: Quality = "measured-here"


def classes_up_to(allowed: Iterable[str]) -> tuple[Quality, ...]:
    """The classes of a workload that allows these: each stands for all before it.

    >>> classes_up_to(["measured-here"])
    ('exact', 'equivalent-start', 'measured-here')
    """
    last = 0
    for name in allowed:
        if name not in CLASSES:
            raise unknown_name("allow", name, CLASSES)
        last = max(last, CLASSES.index(name))
    return CLASSES[: last + 1]


def accepted_names(given: Iterable[str]) -> tuple[str, ...]:
    """The catalog's own names of techniques that a user accepts, each once."""
    return tuple(dict.fromkeys(load_technique(name, "accept-risk").name for name in given))


def record_names(techniques: Mapping[str, Mapping[str, Any]], optimizer: str) -> dict[str, str]:
    """Catalog records of the techniques of some layers and of an optimiser, with what is used.

    >>> record_names({"precision": {"compute": "fp8", "activations": "fp8"}}, "adamw")
    {'low-precision': 'compute fp8', 'storage': 'activations fp8'}
    """
    used: dict[str, str] = {}
    known = names("techniques")
    for name, settings in techniques.items():
        if name == "precision":
            if settings.get("compute") in LOW_COMPUTE:
                recipe = f", recipe {settings['recipe']}" if "recipe" in settings else ""
                rotates = settings.get("recipe") in HALO_RECIPES
                record = "halo" if rotates else "low-precision"
                used[record] = f"compute {settings['compute']}{recipe}"
            if "activations" in settings:
                used["storage"] = f"activations {settings['activations']}"
        elif name == LOCAL_SGD:
            record = RECORDS.get(str(settings.get("outer", "diloco")), LOCAL_SGD)
            used[record] = ", ".join(f"{key} {value}" for key, value in settings.items())
        elif name == "lora" and str(settings.get("base", "")).startswith("gptq"):
            used |= {"lora": f"rank {settings['rank']}", "gptq": f"base {settings['base']}"}
        elif name in known:
            used[name] = ", ".join(f"{key} {value}" for key, value in settings.items())
    record = optimizer.replace("_", "-")
    if record in known:
        used[record] = f"optimizer {optimizer}"
    return used


def risks(plan: Plan) -> tuple[Risk, ...]:
    """What a plan uses that is not exact, weakest evidence first."""
    used: dict[str, str] = {}
    for phase in plan.phases:
        for setting in phase.settings:
            used |= record_names(setting.techniques, plan.workload.optimizer)
    found: list[Risk] = []
    for name, setting in used.items():
        record = load_technique(name)
        own = measured_here(plan.workload, name, setting)
        if record.exactness != "exact":
            found.append(_risk(record, setting, plan) if own is None else _measured(record, own))
    return tuple(sorted(found, key=lambda risk: (-CLASSES.index(risk.quality), risk.technique)))


def _risk(record: Technique, setting: str, plan: Plan) -> Risk:
    tested, size = record.validated_params, plan.model.num_params
    beyond = None
    if tested is not None and size > 1.05 * tested:  # 7B models have up to 7.3
        beyond = (
            f"{plan.model.name} has {size / 1e9:.1f} B parameters, "
            f"the evidence reaches {tested / 1e9:g} B"
        )
    return Risk(
        technique=record.name,
        setting=setting,
        quality=record.exactness,
        title=record.title,
        paper=record.paper,
        claim=record.claim,
        conditions=record.conditions,
        recalled=record.recalled,
        beyond=beyond,
    )


def _better(quality: Quality) -> Quality:
    """The class of what was measured here too."""
    return CLASSES[min(CLASSES.index(quality), CLASSES.index(MEASURED))]


def _measured(record: Technique, own: Evidence) -> Risk:
    """The risk of what was measured on the user's own task."""
    return Risk(
        technique=record.name,
        setting=own.setting,
        quality=_better(record.exactness),
        title=record.title,
        paper=record.paper,
        claim=own.claim,
        conditions=own.conditions,
        recalled=False,
        beyond=None,
    )


def measured_here(workload: Workload, technique: str, setting: str) -> Evidence | None:
    """The user's own evidence that a setting of a technique does no harm; None without any."""
    for own in workload.evidence:
        if own.technique == technique and own.setting == setting and own.harmless:
            return own
    return None


def precisions_here(workload: Workload) -> tuple[Mapping[str, Any], ...]:
    """Settings of precision below 16 bits that were measured on the user's own task, and that the
    workload allows: what a search tries beside its own."""
    found: list[Mapping[str, Any]] = []
    for own in workload.evidence:
        settings = own.settings.get("precision", {})
        if settings.get("compute") in LOW_COMPUTE and set(settings) <= {"compute", "recipe"}:
            if own.harmless and is_allowed(workload, own.technique, own.setting):
                found.append(settings)
    return tuple(found)


def is_allowed(workload: Workload, technique: str, setting: str = "") -> bool:
    """Whether the planner may use a technique (its record's name) on its own; with a setting,
    evidence of the user's own counts."""
    record = load_technique(technique)
    quality = record.exactness
    if measured_here(workload, technique, setting) is not None and quality != "exact":
        quality = _better(quality)
    return quality in workload.quality or record.name in workload.accepted


def lines(found: Iterable[Risk]) -> list[str]:
    """What a report says of the risks, in words; one line where there is none."""
    said: list[str] = []
    for risk in found:
        memory = " (recalled)" if risk.recalled else ""
        said.append(f"quality risk: {risk.technique} ({risk.setting}), {risk.quality}")
        said.append(f"  evidence: {risk.paper}{memory}")
        said.append(f"  claim: {risk.claim}")
        said.append(f"  conditions: {risk.conditions}")
        if risk.beyond is not None:
            said.append(f"  beyond the evidence: {risk.beyond}")
    return said or ["quality: exact, nothing changes results beyond rounding"]
