"""forerun solve pipeline: the order of forward and backward actions on every pipeline rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...errors import InputError
from ..options import common_options

if TYPE_CHECKING:
    from ...planner.pipeline import Solution

MOST_ACTIONS = 20
"""Actions of a rank shown on a terminal."""


@click.command("pipeline")
@click.option("--stages", type=int, required=True, help="Pipeline ranks P.")
@click.option("--micro-batches", type=int, required=True, help="Micro-batches M of a step.")
@click.option(
    "--forward",
    required=True,
    help="Time of a forward pass of one micro-batch, in any unit: one number for each rank's share "
    "of the model, or P numbers with commas, one per rank, or 2P, one per chunk in the model's "
    "order.",
)
@click.option(
    "--backward-input", required=True, help="Likewise: backward pass, gradient of the input."
)
@click.option(
    "--backward-weight", required=True, help="Likewise: backward pass, gradient of the weights."
)
@click.option(
    "--comm", type=float, default=0.0, show_default=True, help="Time of a transfer between ranks."
)
@click.option(
    "--memory-limit",
    type=float,
    help="Activations that a rank may keep, in units of one full stage (a chunk of two is half a "
    "unit); default P, what 1F1B keeps.",
)
@click.option(
    "--chunks",
    type=int,
    help="Model chunks per rank, 1 or 2; default: the better. With 2 the orders number 2P stages; "
    "a time given per rank is halved.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Prove the optimum by a MILP (P times M up to 15), in at most 60 s without --time-limit.",
)
@click.option("--time-limit", type=float, help="Seconds after which the best so far is given.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path),
    help="Write the orders to a file that torch's pipeline runtime loads.",
)
@common_options
def command(
    as_json: bool,
    stages: int,
    micro_batches: int,
    forward: str,
    backward_input: str,
    backward_weight: str,
    comm: float,
    memory_limit: float | None,
    chunks: int | None,
    exact: bool,
    time_limit: float | None,
    csv_path: Path | None,
) -> None:
    """Find the fastest order of F, I and W on every rank under a memory limit.

    F is a forward pass, I the backward pass for the stage's input, W that for its weights, which
    nobody waits for. Stages of one chunk per rank are numbered 0 to P-1; two chunks per rank lie
    either in rounds (r and P+r on rank r) or folded in a V (r and 2P-1-r): `placement` says which,
    and `stages` lists rank and times of every stage. `builtin` holds the known schedules on the
    same times, null where they exceed the memory limit.
    """
    from ...planner.pipeline import solve_pipeline, write_csv
    from .. import render

    if time_limit is not None and not time_limit > 0:
        raise InputError("time-limit", time_limit, "not positive", "give seconds")
    solution = solve_pipeline(
        stages,
        micro_batches,
        times("forward", forward),
        times("backward-input", backward_input),
        times("backward-weight", backward_weight),
        comm_s=comm,
        memory_limit=memory_limit,
        chunks=chunks,
        exact=exact,
        time_limit_s=time_limit,
    )
    if csv_path is not None:
        write_csv(csv_path, solution.orders)
    if as_json:
        render.print_json(solution.document())
    else:
        print_solution(solution)


def times(field: str, text: str) -> float | list[float]:
    """One number, or the numbers between commas.

    >>> times("forward", "1"), times("forward", "1, 1.5")
    (1.0, [1.0, 1.5])
    """
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(field, text, "not a number or numbers with commas between them",
                         "write 1.0 or 1.0,1.2") from error  # fmt: skip
    return values if "," in text else values[0]


def print_solution(solution: Solution) -> None:
    """Print the schedule beside those known by name, and the order of every rank."""
    from .. import render

    limit = solution.memory_limit
    rows = [
        [
            known.name,
            f"{known.makespan_s:g}",
            f"{known.peak:g}" + ("" if solution.fits(known) else " > limit"),
            render.percent(known.makespan_s / solution.makespan_s - 1, signed=True),
        ]
        for known in sorted(solution.builtin, key=lambda known: known.makespan_s)
    ]
    found = f"{solution.makespan_s:g}", f"{max(solution.peak_activations):g}", ""
    render.print_table(
        ("schedule", "makespan", f"activations of {limit:g}", "slower by"),
        [["found", *found], *rows],
    )
    placements = {
        "one": "one stage per rank",
        "looped": "two chunks per rank, r and P+r",
        "v": "two chunks per rank in a V, r and 2P-1-r",
    }
    ends = {None: "no order is faster", "moves": "end of the search", "time": "time limit"}
    render.print_line(f"{placements[solution.placement]}; from: {solution.method}")
    render.print_line(
        f"bubble {render.percent(solution.bubble)}, lower bound {solution.lower_bound_s:g}, gap "
        f"{render.percent(solution.gap)} ({ends[solution.stop]}, {solution.seconds:.2f} s)"
    )
    render.print_line()
    for rank, texts in solution.document()["orders"].items():
        more = " ..." if len(texts) > MOST_ACTIONS else ""
        render.print_line(f"rank {rank}: {' '.join(texts[:MOST_ACTIONS])}{more}")
