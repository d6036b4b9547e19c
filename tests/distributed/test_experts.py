"""Mixtures of experts in every layout train like a plain loop, and move the bytes predicted."""

from __future__ import annotations

from functools import cache
from typing import Any

import expert_families
import families
import pytest
from expert_reference import reference
from selections import Group, cases, mean_bytes
from test_equality import compare

from forerun.costmodel import estimate


@cache
def expected_of(world: int, model: str, family: str) -> dict[str, Any]:
    return reference(expert_families.plan_of(world, model, family))


@cache
def expected_without_losses(model: str, clip_norm: float | None) -> dict[str, Any]:
    return families.reference(expert_families.MODELS[model], clip_norm=clip_norm)


def expected(world: int, model: str, family: str) -> dict[str, Any]:
    """The plain loop's results; those of dropless models without router losses are one."""
    workload = expert_families.plan_of(world, model, family).workload
    plain = workload.balance_loss == "none" and not workload.router_z_loss_coef
    if plain and model in ("moe", "mla"):
        return expected_without_losses(model, workload.clip_norm)
    return expected_of(world, model, family)


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(expert_families.names, expert_families.QUICK)
)
def test_equals_the_plain_loop(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    ranks = group(world, selection)
    for rank in ranks:
        assert (model, family) in rank, "the group stopped at an earlier family"
        assert "error" not in rank[model, family], rank[model, family]["error"]
    plan = expert_families.plan_of(world, model, family)
    plainly = expected(world, model, family)
    for rank in ranks:
        found = rank[model, family]
        if plan.phase.compute_dtype == "fp32":
            compare(found, plainly, "fp32")
        else:  # rounding moves some tokens to other experts
            losses = plainly["losses"][: len(found["losses"])]
            assert found["losses"] == pytest.approx(losses, rel=2e-3)
    covered = {name for rank in ranks for name in rank[model, family]["gradients"]}
    assert covered == set(plainly["gradients"]), "an expert without a gradient"
    assert estimate(plan).bytes_on_wire == mean_bytes(rank[model, family] for rank in ranks)


def test_counts_of_a_recomputed_layer_are_told_once(group: Group) -> None:
    """A balance loss's sum comes once per layer and micro-batch, counts of rows go twice."""
    world, name = 2, ("moe", "ep2 ddp, global balance")
    calls = group(world, "quick")[0][name]["collectives"]
    experts, layers, micro_batches = 8, 3, 2
    counted = sum(n for (kind, axis, _), n in calls.items() if (kind, axis) == ("all_reduce", "ep"))
    assert counted == layers * micro_batches
    told = calls["all_to_all", "ep", 8 * experts]
    assert told == 2 * layers * micro_batches
