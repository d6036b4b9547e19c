"""Every layout trains like a plain loop over the plain module: losses and gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import families
import pytest
from selections import Group, cases
from torch import Tensor

LOSS = {"fp32": 1e-5, "bf16": 2e-4}
"""Relative tolerance of a loss: bf16 rounds to 4e-3, which a mean over tokens evens out."""
GRADIENT = {"fp32": 1e-5, "bf16": 5e-2}
NEGLIGIBLE = 1e-4
"""A gradient smaller than this part of the whole model's is compared with that part: biases of keys
have none in exact arithmetic (softmax ignores a shift), so that theirs is rounding alone."""


@cache
def reference(model: str, clip_norm: float | None = None, packed: bool = False) -> dict[str, Any]:
    return families.reference(families.MODELS[model], clip_norm=clip_norm, packed=packed)


def gradient_error(found: Tensor, expected: Tensor, floor: float) -> float:
    return float((found - expected).norm() / max(float(expected.norm()), floor))


def compare(result: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    losses = expected["losses"][: len(result["losses"])]  # the default run takes fewer steps
    for step, (found, loss) in enumerate(zip(result["losses"], losses, strict=True)):
        assert found == pytest.approx(loss, rel=LOSS[dtype]), f"step {step}"
    whole = sum(float(g.norm()) ** 2 for g in expected["gradients"].values()) ** 0.5
    for name, gradient in result["gradients"].items():
        error = gradient_error(gradient, expected["gradients"][name], NEGLIGIBLE * whole)
        assert error <= GRADIENT[dtype], name


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(families.names, families.FAMILIES)
)
def test_equals_the_plain_loop(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    ranks = group(world, selection)
    for rank in ranks:
        assert (model, family) in rank, "the group stopped at an earlier family"
        assert "error" not in rank[model, family], rank[model, family]["error"]
    if family.startswith("bf16"):
        expected, dtype = group(1, selection)[0][model, "bf16"], "bf16"
    else:
        settings = families.FAMILIES[world][family]
        clip_norm, packed = settings.get("clip_norm"), settings.get("packed", False)
        expected, dtype = reference(model, clip_norm, packed), "fp32"
    for rank in ranks:
        compare(rank[model, family], expected, dtype)
    covered = {name for rank in ranks for name in rank[model, family]["gradients"]}
    assert covered == set(expected["gradients"])


def test_bf16_single_process_is_near_fp32(group: Group) -> None:
    compare(group(1, "quick")[0]["llama", "bf16"], reference("llama"), "bf16")


@pytest.mark.parametrize("model", ["llama", "gpt"])
def test_the_reference_learns(model: str) -> None:
    """Otherwise equal losses would say little about the optimiser step."""
    losses = reference(model)["losses"]
    assert losses[-1] < losses[0] - 0.1
