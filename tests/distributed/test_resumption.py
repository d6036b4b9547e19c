"""Resumed training is the training that was never interrupted, in its layout and in any other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import families
import pytest
import resumption

Group = Callable[[int, str], Any]
WORLDS = (1, 2, 4)


@cache
def plain_losses(model: str) -> list[float]:
    models = families.MODELS | families.EXPERT_MODELS
    return families.reference(models[model])["losses"]


def check_same(group: Group, selection: str, world: int, model: str, family: str) -> None:
    for rank in group(world, selection):
        found = rank[model, f"resume {family}"]
        assert found["problem"] == ""
        assert found["kept"] == [0.5] * 3
        assert found["losses"][0] == found["losses"][1]
        assert found["equal"], "parameters and moments"


def check_chain(group: Group, selection: str, world: int, model: str, num: int) -> None:
    for rank in group(world, selection):
        found = rank[model, "chain"]
        assert all(found["equal"]) and len(found["equal"]) == num - 1
        assert found["losses"] == pytest.approx(plain_losses(model)[:num], rel=1e-5)


def same(slow: bool) -> list[tuple[int, str, str]]:
    return [(world, *name) for world in WORLDS for name in resumption.selected(world, slow)[0]]


def chains(slow: bool) -> list[tuple[int, str, int]]:
    selected = {world: resumption.selected(world, slow)[1] for world in WORLDS}
    return [(world, model, len(layouts)) for world in WORLDS
            for model, layouts in selected[world].items()]  # fmt: skip


@pytest.mark.parametrize(("world", "model", "family"), same(slow=False))
def test_the_same_layout_goes_on_bit_for_bit(
    group: Group, world: int, model: str, family: str
) -> None:
    check_same(group, "quick", world, model, family)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model", "family"), same(slow=True))
def test_every_layout_goes_on_bit_for_bit(
    group: Group, world: int, model: str, family: str
) -> None:
    check_same(group, "slow", world, model, family)


@pytest.mark.parametrize(("world", "model", "num"), chains(slow=False))
def test_a_training_is_handed_from_layout_to_layout(
    group: Group, world: int, model: str, num: int
) -> None:
    check_chain(group, "quick", world, model, num)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "model", "num"), chains(slow=True))
def test_a_training_passes_through_many_layouts(
    group: Group, world: int, model: str, num: int
) -> None:
    check_chain(group, "slow", world, model, num)
