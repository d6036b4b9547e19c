"""8-bit linears, stored activations and 8-bit moments in every layout: as in a single process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import low_precision
import pytest
import torch
from selections import Group, cases, compare_with_single
from torch import Tensor

from forerun.costmodel import estimate

Single = Callable[[str], dict[str, Any]]

LOSS = {
    "coat": 1e-3,
    "halo": 1e-3,
    "gathered": 1e-3,
    "low": 1e-3,
    "stored": 1e-4,
    "moments": 1e-5,
    "blocks": 1e-4,
}
"""Relative tolerance of a loss: 8-bit operands round to 2^-4, of which a mean over tokens leaves
little; what is stored acts through gradients alone."""
GRADIENT = {
    "coat": 0.15,
    "halo": 0.06,
    "gathered": 0.06,
    "low": 0.15,
    "stored": 0.04,
    "moments": 1e-5,
    "blocks": 1e-5,
}
"""Of the first step's gradients, relative to the norm of each."""


@pytest.fixture(scope="module")
def single(one_process: None) -> Single:
    """What a single process finds with the same settings: this one."""
    return cache(lambda kind: low_precision.run(kind, 1))


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(low_precision.names, low_precision.FAMILIES)
)
def test_ranks_train_as_one(
    group: Group, single: Single, selection: str, world: int, model: str, family: str
) -> None:
    kind = family.split()[0]
    ranks = [rank[model, family] for rank in group(world, selection)]
    compare_with_single(ranks, single(kind), LOSS[kind], GRADIENT[kind])


def results(group: Group, world: int, family: str) -> list[dict[str, Any]]:
    """What the ranks of a family of the default run found."""
    return [rank["wide", family] for rank in group(world, "quick")]


def test_training_goes_on_at_8_bits(single: Single) -> None:
    """Otherwise equal losses would say little; against fp32 with plain AdamW, 6 steps."""
    plain, coat = single("stored")["losses"], single("coat")["losses"]
    assert plain[-1] < plain[0] - 0.3
    assert coat[-1] == pytest.approx(plain[-1], rel=2e-3)


def values(state: dict[str, Tensor], name: str) -> Tensor:
    from forerun.kernels.adamw_fp8 import unpack

    if f"{name}_groups" not in state:
        return state[name]
    codes = state[name]
    return unpack(codes.view(codes.shape[0], -1), state[f"{name}_groups"]).view(codes.shape)


def test_sharded_moments_are_parts_of_the_whole_ones(group: Group, single: Single) -> None:
    """Groups lie within rows, so that shards of rows hold the groups of the whole. Gradients are
    summed in another order: the smallest moment of a group, and codes with it, may differ."""
    whole = single("moments")
    shards = results(group, 2, "moments zero3")
    packed = 0
    for name, state in whole["states"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            parts = [rank["states"][name] for rank in shards]
            found = torch.cat([values(part, moment) for part in parts])
            expected = values(state, moment)
            assert float((found - expected).norm() / expected.norm()) < 0.02, name
            packed += state[moment].dtype == torch.uint8
    assert packed == 2 * (2 * 7 + 2)


def test_replicas_have_equal_moments(group: Group) -> None:
    first, second = results(group, 2, "moments ddp")
    for name, state in first["states"].items():
        for key, value in state.items():
            assert torch.equal(value, second["states"][name][key]), (name, key)


def test_formats_below_16_bits_move_no_byte_more(group: Group) -> None:
    """Shards are gathered in bf16 and reduced in fp32, whatever matmuls and moments are."""
    calls = results(group, 2, "coat zero3")[0]["collectives"]
    params = low_precision.WIDE.num_params
    moved = {kind: 0 for kind in ("all_gather", "reduce_scatter")}
    for (kind, _, num_bytes), count in calls.items():
        moved[kind] += num_bytes * count
    layers = sum(layer.repeat * layer.num_params(128) for layer in low_precision.WIDE.layers)
    micro_batches = 2
    gathered = micro_batches * (2 * layers + (params - layers))
    assert moved == {
        "all_gather": 2 * gathered, "reduce_scatter": 4 * params * micro_batches,
    }  # fmt: skip


def test_codes_are_gathered_at_a_byte_each(group: Group) -> None:
    """Weights of linears at one byte, the rest at two, and one maximum per step for the scales; as
    predicted."""
    calls = results(group, 2, "gathered zero3")[0]["collectives"]
    moved: dict[str, int] = {}
    for (kind, _, num_bytes), count in calls.items():
        moved[kind] = moved.get(kind, 0) + num_bytes * count
    predicted = estimate(low_precision.plan_of("gathered zero3", 2)).bytes_on_wire
    layer = low_precision.WIDE.layers[0]
    norms = 2 * 128
    coded = 2 * (layer.num_params(128) - norms)
    assert moved["all_reduce"] == predicted["all_reduce@dp"] == 4 * 2 * 7
    for kind in ("all_gather", "reduce_scatter"):
        assert moved[kind] == predicted[f"{kind}@dp"], kind
    rest = low_precision.WIDE.num_params - coded
    assert moved["all_gather"] == 2 * (2 * (coded + 2 * 2 * norms) + 2 * (rest - 2 * norms))
