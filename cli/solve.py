"""forerun solve: the planner's solvers, each usable on its own."""

from __future__ import annotations

import click

from .lazy import LazyGroup

SOLVERS = ("memory", "activations", "sequences", "pipeline", "precision", "experts")


@click.command("solve", cls=LazyGroup, names=SOLVERS, package="solvers", kind="solver")
def command() -> None:
    """Solve one problem of planning on its own, from numbers or a file of them."""
