"""A technique against its baseline on the user's own model and data, for a bounded time.

    for each seed:  train the baseline, train the same plan with the technique
    loss gap   mean over seeds of (loss with it / loss without it - 1), each over the last quarter
    noise      its standard error over seeds
    step, memory   ratios of the medians over seeds

The two plans of a seed see the same batches from the same parameters. Runs take turns, in the same
processes, so that a machine that slows down hurts both alike. A run whose loss is not finite, or
ends above where it began although the baseline's fell, has diverged: the probe failed, and there is
no evidence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ..document import Value
from ..errors import InputError, RunFailed, unknown_name
from ..measurement import Measurement
from ..plan import Plan, PlanFile
from . import launch
from .measure import report
from .processes import terminated_like_an_exit
from .session import Session
from .support import check_executed

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "halo": {"precision": {"compute": "int8", "recipe": "halo2"}},
    "low-precision": {"precision": {"compute": "fp8", "recipe": "coat"}},
    "offload": {"offload": {"activations": 0.5}},
    "precision": {"precision": {"compute": "bf16"}},
    "recompute": {"recompute": {"mode": "full"}},
    "runtime": {"runtime": {"mode": "compiled"}},
    "storage": {"precision": {"activations": "fp8"}},
}
"""By technique, the settings that make a plan use it; `settings` of a probe change them."""
OPTIMIZERS = {
    "adamw-fp8": "adamw_fp8", "adamw-fp8-block": "adamw_fp8_block", "adamw8bit": "adamw8bit",
    "adamw4bit": "adamw4bit", "adamw-offload": "adamw_offload",
}  # fmt: skip
KEYS = {
    "precision": ("compute", "recipe", "linears", "activations"),
    "offload": ("activations", "rest", "tier"),
    "recompute": ("mode",),
    "runtime": ("mode",),
}
"""Settings by the name that they have in plans."""
LEAST_SEEDS = 2


def with_technique(plan: Plan, technique: str, settings: Mapping[str, Any]) -> Plan:
    """The plan that also uses a technique, in every layer."""
    if technique in OPTIMIZERS:
        for key in settings:
            raise InputError("setting", key, f"{technique} has no settings", "leave it out")
        workload = msgspec.structs.replace(plan.workload, optimizer=OPTIMIZERS[technique])
        return msgspec.structs.replace(plan, workload=workload)
    if technique not in VARIANTS:
        raise unknown_name("technique", technique, (*VARIANTS, *OPTIMIZERS))
    ((name, own),) = VARIANTS[technique].items()
    for key in settings:
        if key not in KEYS[name]:
            raise unknown_name("setting", key, KEYS[name])
    phase = plan.phase
    changed = tuple(
        msgspec.structs.replace(
            setting,
            techniques={
                **setting.techniques,
                name: {**setting.techniques.get(name, {}), **own, **settings},
            },
        )
        for setting in phase.settings
    )
    phases = (msgspec.structs.replace(phase, settings=changed), *plan.phases[1:])
    return msgspec.structs.replace(plan, phases=phases)


class Side(Value, frozen=True, kw_only=True):
    """One of the two plans: medians over seeds, and every seed's loss."""

    label: str
    losses: tuple[float, ...]
    """Mean of the last quarter of the steps, by seed."""
    step_s: float
    peak_memory_bytes: float


class Probed(Value, frozen=True, kw_only=True):
    """What a probe found."""

    baseline: Side
    variant: Side
    steps: int
    limit: Literal["time"] | None = None
    """Set where the budget ended it."""

    @property
    def gaps(self) -> list[float]:
        """Relative loss gap of every seed."""
        pairs = zip(self.variant.losses, self.baseline.losses, strict=True)
        return [own / base - 1 for own, base in pairs]

    @property
    def loss_gap(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.gaps)

    @property
    def loss_noise(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.gaps) / len(self.gaps) ** 0.5

    @property
    def step_ratio(self) -> float:
        """Step with the technique over the baseline's."""
        return self.variant.step_s / self.baseline.step_s

    @property
    def memory_ratio(self) -> float:
        """Peak of live tensors with the technique over the baseline's."""
        return self.variant.peak_memory_bytes / self.baseline.peak_memory_bytes


def tail(losses: Sequence[float]) -> float:
    """Mean of the last quarter."""
    return statistics.mean(losses[-max(1, len(losses) // 4) :])


def check_converging(variant: Sequence[float], baseline: Sequence[float], what: str) -> None:
    """Raise RunFailed where losses grew that fell in the baseline."""
    if tail(variant) > variant[0] and tail(baseline) < baseline[0]:
        raise RunFailed(
            f"{what}: diverged, its loss went from {variant[0]:.4g} to {tail(variant):.4g} while "
            f"the baseline's fell to {tail(baseline):.4g}; nothing was recorded"
        )


@dataclass(kw_only=True)
class _Runs:
    """Measurements of the two plans, seed by seed."""

    session: Session
    steps: int
    on_progress: launch.OnProgress | None

    def run(self, plan_file: PlanFile, seed: int, what: str) -> Measurement:
        plan = plan_file.plan
        workload = msgspec.structs.replace(plan.workload, seed=seed)
        seeded = msgspec.structs.replace(plan, workload=workload)
        one = msgspec.structs.replace(plan_file, plan=seeded)
        try:
            results = self.session.run(
                one, steps=self.steps - 1, warmup_steps=1, on_progress=self.on_progress
            )
        except RunFailed as error:
            raise RunFailed(f"{what} failed: {error}; nothing was recorded") from error
        return report.measurement(seeded, plan_file.label, results, {})


def probe(
    baseline: PlanFile,
    variant: PlanFile,
    technique: str,
    *,
    steps: int,
    seeds: int = 3,
    budget_s: float | None = None,
    data: str | None = None,
    module: str | None = None,
    on_progress: launch.OnProgress | None = None,
) -> Probed:
    """The effect of a technique: `variant` is `baseline` with it.

    No pair of runs begins that would end after `budget_s`, but for the first two, without which
    there is no noise. `data` and `module` are as in `launch.run`. Raises RunFailed for a run that
    fails or diverges.
    """
    if seeds < LEAST_SEEDS:
        raise InputError("seeds", seeds, "tell no noise", f"give {LEAST_SEEDS} or more")
    if steps < 2:
        raise InputError("steps", steps, "tell no loss", "give 2 or more")
    for plan_file in (baseline, variant):
        check_executed(plan_file.plan)
    if baseline.plan == variant.plan:
        raise InputError("technique", technique, "is what the baseline does already",
                         "drop the flag that asks for it, or give another --setting")  # fmt: skip
    began, limit = time.monotonic(), None
    pairs: list[tuple[Measurement, Measurement]] = []
    with terminated_like_an_exit(), Session(data, module) as session:
        runs = _Runs(session=session, steps=steps, on_progress=on_progress)
        first_seed = baseline.plan.workload.seed
        for index in range(seeds):
            passed = time.monotonic() - began
            if (
                budget_s is not None
                and index >= LEAST_SEEDS
                and passed * (1 + 1 / index) > budget_s
            ):
                limit = "time"
                break
            seed = first_seed + index
            base = runs.run(baseline, seed, "probe: the baseline")
            own = runs.run(variant, seed, f"probe: {technique}")
            check_converging(own.loss, base.loss, f"probe: {technique}")
            pairs.append((base, own))
    return Probed(
        baseline=_side(baseline.label, [base for base, _ in pairs]),
        variant=_side(variant.label, [own for _, own in pairs]),
        steps=steps,
        limit=limit,
    )


def _side(label: str, found: Sequence[Measurement]) -> Side:
    return Side(
        label=label,
        losses=tuple(tail(one.loss) for one in found),
        step_s=statistics.median(one.step_s.median for one in found),
        peak_memory_bytes=statistics.median(one.peak_memory_bytes for one in found),
    )
