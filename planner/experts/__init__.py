"""Replication and placement of experts on ranks under a load profile."""

from .place import Placement, place_experts
from .problem import Layout, Loads, check_placement, rank_loads, read_loads

__all__ = [
    "Layout", "Loads", "Placement", "check_placement", "place_experts", "rank_loads", "read_loads",
]  # fmt: skip
