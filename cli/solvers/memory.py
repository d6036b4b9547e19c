"""forerun solve memory: offsets for tensors with lifetimes in the smallest arena."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import InputError
from ..options import common_options

if TYPE_CHECKING:
    from ...planner.memory_reuse import MemoryPlan

UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20,
    "gib": 2**30,
}  # fmt: skip
SHOWN = 12
"""Buffers listed in the table: the largest."""


def parse_size(text: str, field: str) -> int:
    """A size in bytes.

    >>> parse_size("1048576", "capacity"), parse_size("1MiB", "capacity")
    (1048576, 1048576)
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)", text.strip().lower())
    scale = UNITS.get(match[2]) if match else None
    if match is None or scale is None:
        raise InputError(field, text, "not a size", "write bytes (1048576), 1MiB or 80GB")
    if float(match[1]) * scale < 1:
        raise InputError(field, text, "not a positive size", "give 1 byte or more")
    return int(match[1]) * scale if match[1].isdigit() else int(float(match[1]) * scale)


@click.command("memory")
@click.argument("buffers_path", metavar="BUFFERS", type=click.Path(path_type=Path))
@click.option(
    "--capacity",
    metavar="SIZE",
    help="Bytes to stay within (1048576, 1MiB, 80GB): the first arena that fits ends the search.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds after which the best offsets so far are given, with their gap.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the rows of BUFFERS with their offset to this CSV file.",
)
@common_options
def command(
    as_json: bool,
    output: Path | None,
    buffers_path: Path,
    capacity: str | None,
    time_limit: float,
) -> None:
    """Offsets for the tensors of BUFFERS in the smallest arena.

    BUFFERS is a CSV file with the columns id, lower, upper, size (a tensor of `size` bytes lives in
    [lower, upper)) and optionally alignment. Exit code 3, with the best offsets, when the capacity
    is not reached.
    """
    from .. import render

    capacity_bytes = None if capacity is None else parse_size(capacity, "capacity")
    from ...planner.memory_reuse import check_capacity, read_buffers, solve, write_offsets

    buffers = read_buffers(buffers_path)
    plan = solve(buffers, capacity_bytes=capacity_bytes, time_limit_s=time_limit)
    if output is not None:
        write_offsets(output, buffers, plan.offsets)
    if as_json:
        render.print_json(plan.document())
    else:
        print_plan(plan)
    if capacity_bytes is not None:
        check_capacity(plan, capacity_bytes)


def print_plan(plan: MemoryPlan) -> None:
    """Print the largest buffers, the arena, and how sure it is that none is smaller."""
    from ...units import format_bytes
    from .. import render

    buffers = plan.buffers
    found = plan.document()
    largest = sorted(range(len(buffers)), key=lambda i: (-buffers.size_bytes[i], i))[:SHOWN]
    columns = ("buffer", "lower", "upper", "size", "offset")
    rows = [
        [
            buffers.ids[i],
            *(
                f"{int(values[i]):,}"
                for values in (buffers.lower, buffers.upper, buffers.size_bytes, plan.offsets)
            ),
        ]
        for i in largest
    ]
    render.print_table(columns, rows)
    if len(buffers) > SHOWN:
        render.print_line(f"the {SHOWN} largest of {len(buffers):,} buffers; all: --json or -o")
    render.print_line(
        f"arena {plan.peak_bytes:,} bytes ({format_bytes(plan.peak_bytes)}), "
        f"{found['fragmentation']:.4f} x max-live, by {plan.method}"
    )
    if plan.optimal:
        verdict = "gap 0 %: no arena is smaller"
    else:
        verdict = (
            f"gap {100 * found['gap']:.2f} %: an arena of {plan.lower_bound_bytes:,} bytes is not "
            "ruled out"
        )
    limit = f", stopped by the limit on {plan.limit}" if plan.limit else ""
    render.print_line(f"{verdict} ({plan.nodes:,} nodes, {plan.seconds:.2f} s{limit})")
