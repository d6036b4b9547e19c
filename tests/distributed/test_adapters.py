"""Adapters in every layout: as in a single process, with the predicted bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import adapters
import pytest
import torch.distributed as dist
from adapters import FAMILIES, SLOW

Group = Callable[[int, str], list[dict[tuple[str, str], dict[str, Any]]]]
Single = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Single]:
    """What a single process finds with the same settings: this one."""
    store = tmp_path_factory.mktemp("single") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield cache(lambda kind: adapters.run(kind, 1))
    dist.destroy_process_group()


def check(group: Group, single: Single, world: int, family: str) -> None:
    words = family.split()
    low = "bf16" in words
    expected = single(" ".join(words[: 2 if low else 1]))
    covered: set[str] = set()
    for results in group(world, "slow" if family in SLOW else "quick"):
        rank = results["wide", f"adapters {family}"]
        assert "error" not in rank, rank["error"]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-3 if low else 1e-5)
        assert rank["bytes_on_wire"] == pytest.approx(rank["predicted"], rel=1e-9)
        for name, gradient in rank["gradients"].items():
            whole = expected["gradients"][name]
            error = float((gradient - whole).norm())
            assert error <= (0.05 if low else 1e-4) * float(whole.norm()) + 1e-9, name
        covered |= set(rank["gradients"])
    assert covered == set(expected["gradients"])
    assert all("lora" in name for name in covered)


@pytest.mark.parametrize("family", [name for name in FAMILIES[2] if name not in SLOW])
def test_two_processes_train_as_one(group: Group, single: Single, family: str) -> None:
    check(group, single, 2, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES[2] if name in SLOW])
def test_more_layouts_of_two_processes_do(group: Group, single: Single, family: str) -> None:
    check(group, single, 2, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[4])
def test_four_processes_train_as_one(group: Group, single: Single, family: str) -> None:
    check(group, single, 4, family)


def test_a_training_is_handed_from_layout_to_layout(group: Group, single: Single) -> None:
    """Checkpoints hold stored weights by their places in the whole, as they hold parameters."""
    for results in group(2, "quick"):
        rank = results["wide", "chain"]
        assert "error" not in rank, rank.get("error")
        assert rank["equal"] == [True, True]
        assert rank["losses"] == pytest.approx(single("gptq")["losses"], rel=1e-5)
