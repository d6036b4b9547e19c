"""Replication and placement of experts on ranks under a load profile."""

from .apply import expect_loads, place_experts_in
from .place import Placement, place_experts
from .problem import Layout, Loads, check_placement, rank_loads, read_loads

__all__ = [
    "Layout", "Loads", "Placement", "check_placement", "expect_loads",
    "place_experts", "place_experts_in", "rank_loads", "read_loads",
]  # fmt: skip
