"""Resumed training is the training that was never interrupted, in its layout and in any other."""

from __future__ import annotations

from functools import cache

import expert_families
import families
import pytest
import resumption
from selections import Group, cases

WORLDS = (1, 2, 4)


@cache
def plain_losses(model: str) -> list[float]:
    models = families.MODELS | expert_families.MODELS
    return families.reference(models[model])["losses"]


def same(world: int, slow: bool) -> list[tuple[str, str]]:
    return resumption.selected(world, slow)[0]


def chains(world: int, slow: bool) -> list[tuple[str, int]]:
    layouts = resumption.selected(world, slow)[1]
    return [(model, len(some)) for model, some in layouts.items()]


@pytest.mark.parametrize(("selection", "world", "model", "family"), cases(same, WORLDS))
def test_the_same_layout_goes_on_bit_for_bit(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    for rank in group(world, selection):
        found = rank[model, f"resume {family}"]
        assert found["problem"] == ""
        assert found["kept"] == [0.5] * 3
        assert found["losses"][0] == found["losses"][1]
        assert found["equal"], "parameters and moments"


@pytest.mark.parametrize(("selection", "world", "model", "num"), cases(chains, WORLDS))
def test_a_training_is_handed_from_layout_to_layout(
    group: Group, selection: str, world: int, model: str, num: int
) -> None:
    for rank in group(world, selection):
        found = rank[model, "chain"]
        assert all(found["equal"]) and len(found["equal"]) == num - 1
        assert found["losses"] == pytest.approx(plain_losses(model)[:num], rel=1e-5)
