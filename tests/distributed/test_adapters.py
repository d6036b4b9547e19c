"""Adapters in every layout: as in a single process, with the predicted bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import adapters
import pytest
from selections import Group, cases, compare_with_single

Single = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def single(one_process: None) -> Single:
    """What a single process finds with the same settings: this one."""
    return cache(lambda kind: adapters.run(kind, 1))


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(adapters.names, adapters.FAMILIES)
)
def test_ranks_train_as_one(
    group: Group, single: Single, selection: str, world: int, model: str, family: str
) -> None:
    kind, *words = family.removeprefix("adapters ").split()
    low = "bf16" in words
    ranks = [rank[model, family] for rank in group(world, selection)]
    expected = single(f"{kind} bf16" if low else kind)
    loss, gradient = (1e-3, 0.05) if low else (1e-5, 1e-4)
    compare_with_single(ranks, expected, loss, gradient, negligible=1e-9)
    for rank in ranks:
        assert rank["bytes_on_wire"] == pytest.approx(rank["predicted"], rel=1e-9)
        assert all("lora" in name for name in rank["gradients"])


def test_a_training_is_handed_from_layout_to_layout(group: Group, single: Single) -> None:
    """Checkpoints hold stored weights by their places in the whole, as they hold parameters."""
    for results in group(2, "quick"):
        rank = results["wide", "chain"]
        assert "error" not in rank, rank.get("error")
        assert rank["equal"] == [True, True]
        assert rank["losses"] == pytest.approx(single("gptq")["losses"], rel=1e-5)
