"""Prices the plans of a case and settles on one: the fastest that fits, where cells were empty.

Building cases and pricing them are apart, so that a fit can price the same cases many times with
other constants of a software stack (`evaluate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec

from ...document import to_json
from ...errors import ForerunError, InputError
from ...estimate import Estimate, Interval
from ...plan import Plan
from ...stack import Stack
from ..estimates import estimate
from ..priced_pieces import Known
from ..simulate import step_seconds
from .build import Candidate, Case, PublishedPlan, unread
from .conventions import memory_unit_bytes, to_seconds, work
from .table import Unread

MEMORY_DOUBT = 0.1
"""How far predicted memory may be off, where a run that took place is predicted not to fit."""
LIKELY = 0.2
"""Least probability of fitting in memory for a searched cell: the plan ran, and who published it
looked for the fastest that does."""
LARGEST_PLAY = 2_000_000
"""Actions of one simulation: beyond it a row is refused rather than played for minutes."""
Overrides = Mapping[str, Mapping[str, Any]]
"""Stack name -> constant -> value; `gemm_efficiency.bf16` names one entry of a table."""
MISTAKES = (ArithmeticError, LookupError, ValueError, TypeError)
"""What a mistake in the cost model raises: it must not stop the other rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted step and memory of the plan that a case settled on."""

    candidate: Candidate
    step_s: Interval
    peak_memory_bytes: Interval
    fit_probability: float
    fits: str
    """yes, marginal or no, as in an Estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A case with its prediction."""

    case: Case
    prediction: Prediction


def predict(plan: Plan, known: Known | None = None) -> Estimate:
    """The estimate of a published plan."""
    _check_size(plan)
    return estimate(plan, known)


def _check_size(plan: Plan) -> None:
    phase = plan.phase
    actions = 2 * phase.num_microbatches * phase.mesh.num_stages
    if actions > LARGEST_PLAY:
        raise InputError("num_microbatches", phase.num_microbatches,
                         f"{actions} pipeline actions are too many to play",
                         "check batch, micro-batch and dp")  # fmt: skip


def price(candidate: Candidate, predicted: Callable[[Plan], Estimate] = predict) -> Prediction:
    """One plan's prediction."""
    found = predicted(candidate.plan)
    rounded_up = found.step_s
    median = _step_s(candidate, rounded_up.median, lambda plan: predicted(plan).step_s.median)
    return Prediction(
        candidate=candidate,
        step_s=_scaled(rounded_up, median / rounded_up.median),
        peak_memory_bytes=_allocated(found),
        fit_probability=found.fit_probability,
        fits=found.fits,
    )


def _step_s(candidate: Candidate, rounded_up_s: float, seconds: Callable[[Plan], float]) -> float:
    """A step in which a last micro-batch that is there in part costs that part.

    The step is linear in the number of micro-batches, so it lies on the line through the plan with
    the number rounded up and one with fewer (or, where there is none, more) of them.
    """
    phase = candidate.plan.phase
    missing = phase.num_microbatches - candidate.micro_batches
    if missing <= 0:
        return rounded_up_s
    # an interleaved schedule runs whole rounds of pp micro-batches
    stride = phase.mesh.pp if phase.mesh.vpp > 1 else 1
    fewer = stride if phase.num_microbatches > stride else -stride
    other_s = seconds(_with_microbatches(candidate.plan, phase.num_microbatches - fewer))
    return rounded_up_s - missing * (rounded_up_s - other_s) / fewer


def _with_microbatches(plan: PublishedPlan, number: int) -> PublishedPlan:
    phase = msgspec.structs.replace(plan.phase, num_microbatches=number)
    return msgspec.structs.replace(plan, phases=(phase,))


def _allocated(found: Estimate) -> Interval:
    """Peak memory as allocators report it: without the device's context."""
    whole = found.peak_memory_bytes
    return _scaled(whole, 1.0 - found.memory_terms_bytes["context"] / whole.median)


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(
        median=interval.median * factor, low=interval.low * factor, high=interval.high * factor
    )


def settle(case: Case, predicted: Callable[[Plan], Estimate] = predict) -> Prediction:
    """The prediction of the case's fastest plan that fits, or is near the leanest if none does.

    Fastest means least time per sequence, since the batch itself may be open. A ladder of
    recomputation is climbed only until a plan fits: more recomputation is never faster.
    """
    priced: list[Prediction] = []
    refused: Exception | None = None
    for ladder in case.ladders:
        for candidate in ladder:
            try:
                prediction = price(candidate, predicted)
            except InputError as error:
                refused = error
                continue
            priced.append(prediction)
            if prediction.fit_probability >= LIKELY:
                break
    if not priced:
        assert refused is not None
        raise refused
    fitting = [p for p in priced if p.fit_probability >= LIKELY]
    if not fitting:  # it ran, so the leanest fits: so may others near it
        leanest = min(p.peak_memory_bytes.median for p in priced)
        fitting = [p for p in priced if p.peak_memory_bytes.median <= leanest * (1 + MEMORY_DOUBT)]
    return min(fitting, key=_seconds_per_sequence)


def _seconds_per_sequence(prediction: Prediction) -> float:
    return prediction.step_s.median / prediction.candidate.plan.workload.global_batch_seqs


class _Memory:
    """Estimates by plan: rows of one run differ in metric alone, and others in few pieces."""

    def __init__(self) -> None:
        self._known: dict[bytes, Estimate] = {}
        self._pieces: Known = {}

    def __call__(self, plan: Plan) -> Estimate:
        key = to_json(plan, indent=0)
        if key not in self._known:
            self._known[key] = predict(plan, self._pieces)
        return self._known[key]


def outcomes(cases: Sequence[Case | Unread]) -> tuple[Outcome | Unread, ...]:
    """Every case predicted; an `Unread` with the reason where the cost model refuses."""
    memory = _Memory()
    result: list[Outcome | Unread] = []
    for case in cases:
        if isinstance(case, Unread):
            result.append(case)
            continue
        try:
            prediction = settle(case, memory)
        except (ForerunError, *MISTAKES) as error:
            result.append(unread(case.row, error))
        else:
            result.append(Outcome(case=case, prediction=prediction))
    return tuple(result)


def settled(found: Sequence[Outcome | Unread]) -> tuple[Case, ...]:
    """The predicted cases, each with the one plan that it settled on: what a fit prices again."""
    return tuple(
        replace(outcome.case, ladders=((outcome.prediction.candidate,),))
        for outcome in found
        if isinstance(outcome, Outcome)
    )


def error_of(case: Case, prediction: Prediction) -> float:
    """Signed relative error: predicted / measured - 1, of the step time or of the peak memory."""
    row = case.row
    if not row.is_time:
        return prediction.peak_memory_bytes.median / (row.value * memory_unit_bytes(row)) - 1.0
    return prediction.step_s.median / _measured_s(case, prediction.candidate) - 1.0


def _measured_s(case: Case, candidate: Candidate) -> float:
    """The step time behind a row's value."""
    pool, batch = candidate.plan.cluster.pools[0], candidate.plan.workload.global_batch_seqs
    rate_work = work(case.row, case.model, pool.device, batch)
    return to_seconds(case.row, case.row.value, rate_work)


def evaluate(cases: Sequence[Case], overrides: Overrides | None = None) -> list[float]:
    """Signed errors of cases priced with changed stack constants, in their order.

    >>> evaluate([], {"megatron-h100": {"gemm_efficiency.bf16": 0.7}})
    []
    """
    errors: list[float] = []
    seconds = _Seconds()
    for case in cases:
        changed = with_overrides(case, overrides or {})
        (first, *others), *ladders = changed.ladders
        if case.row.is_time and not others and not ladders:
            step_s = _step_s(first, seconds(first.plan), seconds)
            errors.append(step_s / _measured_s(changed, first) - 1.0)
        else:
            errors.append(error_of(changed, settle(changed)))
    return errors


class _Seconds:
    """Step times by plan, as `_Memory` has estimates."""

    def __init__(self) -> None:
        self._known: dict[bytes, float] = {}
        self._pieces: Known = {}

    def __call__(self, plan: Plan) -> float:
        key = to_json(plan, indent=0)
        if key not in self._known:
            _check_size(plan)
            self._known[key] = step_seconds(plan, self._pieces)
        return self._known[key]


def with_overrides(case: Case, overrides: Overrides) -> Case:
    """The case with the named constants of its stacks replaced."""
    return replace(
        case,
        ladders=tuple(
            tuple(replace(c, plan=_overridden(c.plan, overrides)) for c in ladder)
            for ladder in case.ladders
        ),
    )


def _overridden(plan: PublishedPlan, overrides: Overrides) -> PublishedPlan:
    pools = plan.cluster.pools
    if not any(pool.stack.name in overrides for pool in pools):
        return plan
    pools = tuple(
        msgspec.structs.replace(
            pool, stack=_changed(pool.stack, overrides.get(pool.stack.name, {}))
        )
        for pool in pools
    )
    cluster = msgspec.structs.replace(plan.cluster, pools=pools)
    return msgspec.structs.replace(plan, cluster=cluster)


def _changed(stack: Stack, values: Mapping[str, Any]) -> Stack:
    changes: dict[str, Any] = {}
    for name, value in values.items():
        field, dot, entry = name.partition(".")
        if field not in stack.__struct_fields__:
            raise InputError("overrides", name, f"{stack.name} has no such constant",
                             f"known: {', '.join(stack.__struct_fields__)}")  # fmt: skip
        if dot:
            table = cast("dict[str, Any]", changes.get(field) or getattr(stack, field))
            value = {**table, entry: value}
        changes[field] = value
    return msgspec.structs.replace(stack, **changes)
