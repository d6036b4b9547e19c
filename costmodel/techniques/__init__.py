"""Techniques as pure rewrites of the operator graph, applied in one fixed order."""

from __future__ import annotations

from ..graph import Graph
from . import precision, recompute


def apply(graph: Graph, *, compute: str, recompute_mode: str) -> Graph:
    """The graph of a layer under its technique settings: precision first, then recompute."""
    return recompute.rewrite(precision.rewrite(graph, compute), recompute_mode)
