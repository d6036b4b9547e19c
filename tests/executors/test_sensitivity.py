"""Precision by layers: measured sensitivities, the plan that follows, and that it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forerun.errors import InputError
from forerun.executors.sensitivity import sensitivities
from forerun.planner.precision import Limits, solve_precision
from forerun.planner.precision.layers import (
    group_name,
    groups_of,
    layer_options,
    parse_option,
    with_precision,
)

from .plans import LLAMA, plan_of, train, trainer_of

OPTIONS: dict[str, dict[str, Any]] = {
    name: parse_option(name) for name in ("bf16", "int8-halo2", "fp4-halo0")
}


def test_settings_by_layers_leave_the_rest_of_a_plan() -> None:
    plan = plan_of(LLAMA, {"compute": "bf16"}, recompute={"mode": "full"})
    mixed = with_precision(plan, {(1, 1): OPTIONS["int8-halo2"]})
    assert [s.layers for s in mixed.phase.settings] == [(0, 0), (1, 1)]
    assert mixed.phase.technique("precision", 1) == OPTIONS["int8-halo2"]
    for index in range(2):
        assert mixed.phase.technique("recompute", index) == {"mode": "full"}
    assert "mixed~" in mixed.label and "mixed" not in plan.label
    assert (
        with_precision(mixed, {(1, 1): {"compute": "bf16"}}).phase.settings == plan.phase.settings
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [("int9", "options=int9: unknown name"), ("int8-halo3", "options=halo3: unknown name")],
)
def test_options_are_named(text: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        parse_option(text)


def test_groups_need_layers() -> None:
    with pytest.raises(InputError, match="group-layers=0"):
        groups_of(4, 0)


@pytest.mark.usefixtures("one_rank")
def test_errors_are_measured_solved_for_and_run() -> None:
    """Fewer bits move the gradient more; what a budget leaves in few bits runs, and trains."""
    plan = plan_of(LLAMA, {"compute": "bf16"})
    groups = groups_of(2, 1)
    errors = sensitivities(plan, OPTIONS, groups, steps=2, batches=1)
    for group in groups:
        assert errors[group, "bf16"] == 0.0
        assert 0.0 < errors[group, "int8-halo2"] < errors[group, "fp4-halo0"] / 4
    options = layer_options(plan, OPTIONS, groups, errors)
    assert all(option.time_s > 0 and option.memory_bytes > 0 for option in options)
    # 8 bits are no faster on a CPU: let each layer pay for its bits
    bits = {"bf16": 16.0, "int8-halo2": 8.0, "fp4-halo0": 4.0}
    cheaper = [replace(option, time_s=bits[option.name]) for option in options]
    budget = errors[(0, 0), "int8-halo2"] + errors[(1, 1), "fp4-halo0"]
    choice = solve_precision(cheaper, Limits(error=budget)).choice
    chosen = {group: OPTIONS[choice[group_name(group)]] for group in groups}
    mixed = with_precision(plan, chosen)
    assert len({str(own) for own in chosen.values()}) == 2
    wide = train(trainer_of(plan), 4)
    assert train(trainer_of(mixed), 4) == pytest.approx(wide, rel=0.02)


@pytest.mark.usefixtures("one_rank")
def test_fp32_is_not_mixed_with_others() -> None:
    with pytest.raises(InputError, match="do not mix fp32 and others"):
        sensitivities(plan_of(LLAMA), OPTIONS, groups_of(2, 1), steps=0)
