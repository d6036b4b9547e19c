"""Experts check their sizes, placements that every expert lies somewhere."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import InputError
from forerun.experts import Experts, check_placement
from forerun.mesh import Mesh
from forerun.model import Layer, Model

EIGHT = Experts(num_experts=8, top_k=2, ffn_hidden=4)
IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"top_k": 9}, "top_k=9: tiny has 8 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"routed_scale": -1.0}, "routed_scale=-1.0"),
        ({"shared_ffn_hidden": -4}, "shared_ffn_hidden=-4"),
    ],
)
def test_sizes_that_cannot_be_meant(changes: dict[str, Any], field: str) -> None:
    experts = Experts(**{"num_experts": 8, "top_k": 2, "ffn_hidden": 4, **changes})
    layer = Layer(repeat=1, heads=1, kv_heads=1, head_dim=4, experts=experts)
    with pytest.raises(InputError, match=rf"^layers\.experts\.{field}"):
        Model(name="tiny", hidden=4, vocab=8, layers=(layer,))


@given(st.integers(1, 64), st.integers(1, 500), st.floats(0.1, 4))
def test_capacity_is_the_least_whole_number_of_rows(
    num_experts: int, tokens: int, factor: float
) -> None:
    experts = Experts(num_experts=num_experts, top_k=1, ffn_hidden=1, capacity_factor=factor)
    mean = factor * tokens / num_experts
    assert mean <= experts.capacity(tokens) < mean + 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"slots": [[0, 1, 2, 3], [4, 5, 6]]}, "ranks hold unequally many"),
        ({"slots": [[0, 1, 2, 3], [4, 5, 6, 6]]}, r"slots=\[7\]: 1 of 8 experts lie on no rank"),
        ({"slots": [[0, 1, 2, 3, 8], [4, 5, 6, 7, 0]]}, "slots=8: the layer has experts 0 to 7"),
        ({"slots": [[*range(8)]]}, "slots=1 ranks: the plan has ep=2"),
        ({"slots": [0, 1]}, "not lists of experts"),
        ({"slots": "01"}, "not lists of experts"),
        ({"slots": [["0", "1", "2", "3"], ["4", "5", "6", "7"]]}, "not lists of experts"),
        ({"imbalance": 0.5}, "imbalance=0.5"),
        ({"imbalance": 2.5}, "imbalance=2.5"),
        ({"imbalance": float("nan")}, "imbalance=nan"),
        ({"slot": IN_ORDER}, "expert-placement=slot: unknown setting"),
    ],
)
def test_placements_that_do_not_fit(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_placement(setting, EIGHT, 2)


def test_one_rank_needs_no_placement() -> None:
    check_placement({"imbalance": 1.0}, EIGHT, 1)
    with pytest.raises(InputError, match="at ep=1 every rank holds all experts"):
        check_placement({"slots": [[*range(8)]]}, EIGHT, 1)


def test_placements_that_fit() -> None:
    check_placement({"slots": IN_ORDER, "imbalance": 1.5}, EIGHT, 2)
    check_placement({"slots": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]}, EIGHT, 2)
    full = Experts(num_experts=8, top_k=2, ffn_hidden=4, capacity_factor=1.0)
    check_placement({"slots": IN_ORDER}, full, 2)
    with pytest.raises(InputError, match="capacity is not shared among replicas"):
        check_placement({"slots": [[0, 1, 2, 3, 4], [4, 5, 6, 7, 0]]}, full, 2)


degrees = st.sampled_from([1, 2, 3, 4])


@given(degrees, degrees, degrees, degrees, st.sampled_from([1, 2]), st.sampled_from([1, 2, 3, 4]))
def test_the_expert_mesh_is_the_same_ranks(
    dp_replicate: int, dp_shard: int, cp: int, tp: int, pp: int, ep: int
) -> None:
    """ep lies over neighbours of dp and cp (of tp too where it does not divide these)."""
    holders = dp_replicate * dp_shard * cp
    if holders % ep and (holders * tp) % ep:
        return
    mesh = Mesh(dp_replicate=dp_replicate, dp_shard=dp_shard, cp=cp, tp=tp, pp=pp, ep=ep)
    shape = mesh.expert_shape()
    product = 1
    for degree in shape.values():
        product *= degree
    sharing = dp_shard * cp * tp // mesh.expert_tp
    if sharing % ep == 0 or ep % sharing == 0:  # `layout_problems` refuses the others
        assert product == mesh.world
    assert shape["expert_tp"] == (tp if holders % ep == 0 else 1)
