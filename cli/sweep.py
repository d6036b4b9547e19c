"""forerun sweep: tables and inverse questions over clusters, lengths, batches and models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import document
from ..errors import InputError, NoFeasiblePlan
from .log import say
from .options import POSITIVE, axis_options, common_options, fit_option, output_option, space_option

if TYPE_CHECKING:
    from ..planner.sweep import Ask, Conditions, SweepResult


@click.command("sweep")
@click.option("--model", metavar="LIST", help="Models, with commas between: llama-3.1-8b,13b.")
@click.option("--gpus", metavar="LIST", help="Clusters: 8xH100,16x8xH100,4x8xA100-80GB.")
@click.option("--seq-len", metavar="LIST", help="Tokens per sequence: 8k,32k,128k.")
@click.option("--global-batch", metavar="LIST", help="Sequences (64) or tokens (1Mtok) per step.")
@click.option(
    "--round-batch",
    is_flag=True,
    help="Batches in tokens: sequences that many degrees divide (1Mtok of 8k: 128, not 122).",
)
@click.option("--fewest-gpus", is_flag=True, help="Fewest GPUs of each kind that reach the goal.")
@click.option(
    "--longest-context", is_flag=True, help="Longest sequences that fit; batch in tokens."
)
@click.option("--largest-model", is_flag=True, help="Largest standard decoder that fits.")
@click.option("--cheapest", is_flag=True, help="Cluster that trains --tokens for the least money.")
@click.option("--tokens", metavar="COUNT", help="Length of the run: 15T, 300B.")
@click.option("--deadline", metavar="TIME", help="Goal: --tokens within 30d, 12h.")
@click.option("--step-time", metavar="TIME", help="Goal: seconds per step (5s, 800ms).")
@click.option("--min-tokens-per-s", metavar="COUNT", help="Goal: tokens per second (1M).")
@click.option("--max-nodes", type=POSITIVE, help="Nodes that --fewest-gpus tries; default: 512.")
@fit_option
@space_option
@click.option("--prices", metavar="FILE", help="CSV file with the columns gpu,usd_per_hour.")
@axis_options
@click.option("--top", type=POSITIVE, help="Rows to show: the first in tokens/s; default: all.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop asking after this long, and say what was left out.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Write a .svg or .html plot.")
@output_option("the table (.csv, or .json for the document)")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    plot: Path | None,
    top: int | None,
    time_limit: float | None,
    **flags: Any,
) -> None:
    """Plan every combination of the given lists, or ask what it takes to reach a goal.

    Lists have commas between their parts. Rows on the Pareto front have the most tokens per second
    for their USD per hour (for their GPUs, where a price is not known) among rows of the same
    model, length and batch. A question varies what it asks for and keeps the rest as given.
    """
    from . import render
    from .sweep_inputs import read_asks, read_question
    from .sweep_plot import plot_html, plot_svg
    from .sweep_table import print_sweep, table_csv

    check_ending("plot", plot, (".svg", ".html"))
    check_ending("output", output, (".csv", ".json"))
    question = read_question(flags)
    goal = read_goal(flags)
    asks = read_asks(flags, question)
    result = ask_all(question, asks, flags, goal, time_limit)
    if output is not None:
        text = table_csv(result).encode()
        in_json = output.suffix.lower() == ".json"
        document.write_bytes(output, document.to_json(result.document()) if in_json else text)
    if plot is not None:
        drawn = plot_html(result) if plot.suffix.lower() == ".html" else plot_svg(result)
        document.write_bytes(plot, drawn.encode())
    if as_json:
        render.print_json(result.document())
    else:
        print_sweep(result, top)
    fail_without_answer(result)


def check_ending(field: str, path: Path | None, endings: tuple[str, ...]) -> None:
    """Raise InputError for a file whose ending says none of the kinds that can be written."""
    if path is not None and path.suffix.lower() not in endings:
        raise InputError(field, path, "not a kind of file that is written here",
                         f"name it {' or '.join('FILE' + e for e in endings)}")  # fmt: skip


def read_goal(flags: dict[str, Any]) -> dict[str, float]:
    """The goals that were given, as numbers: tokens, seconds, tokens per second."""
    from .sweep_inputs import parse_amount, parse_duration

    readers = {
        "tokens": parse_amount,
        "deadline": parse_duration,
        "step_time": parse_duration,
        "min_tokens_per_s": parse_amount,
    }
    return {
        name: read(flags[name], name.replace("_", "-"))
        for name, read in readers.items()
        if flags[name] is not None
    }


def ask_all(
    question: str,
    asks: list[Ask],
    flags: dict[str, Any],
    goal: dict[str, float],
    time_limit_s: float | None,
) -> SweepResult:
    """The question put to the planner, with a bar on stderr."""
    from ..planner.sweep import Conditions
    from .progress import progress

    with progress("sweep") as report:
        conditions = Conditions(
            fit=flags["fit"],
            tokens=goal.get("tokens"),
            time_limit_s=time_limit_s,
            report=report,
        )
        return put(question, asks, flags, goal, conditions)


def put(
    question: str,
    asks: list[Ask],
    flags: dict[str, Any],
    goal: dict[str, float],
    conditions: Conditions,
) -> SweepResult:
    """The function of the planner that answers a question."""
    from ..planner import sweep
    from .sweep_inputs import sized_pins

    if question == "fewest-gpus":

        def needed(ask: Ask) -> float:
            if "deadline" in goal:
                return goal["tokens"] / goal["deadline"]
            if "step_time" in goal:
                return ask.workload.global_batch_tokens / goal["step_time"]
            return goal["min_tokens_per_s"]

        return sweep.fewest_gpus(
            asks,
            conditions,
            needed,
            max_nodes=flags["max_nodes"] or sweep.MAX_NODES,
            pins_of=lambda ask: sized_pins(ask, flags),
        )
    if question == "longest-context":
        return sweep.longest_context(asks, conditions)
    if question == "largest-model":
        return sweep.largest_model(asks, conditions)
    if question == "cheapest":
        return sweep.cheapest(asks, conditions, deadline_s=goal.get("deadline"))
    return sweep.sweep_table(asks, conditions)


def fail_without_answer(result: SweepResult) -> None:
    """Exit 3 when there is no plan at all, or no answer to the question."""
    from ..planner.sweep import why_none

    if result.limit == "time":
        left = sum(row.status == "left out" for row in result.rows)
        say(f"note: the time limit struck; {left} combinations were not asked"
            if result.question in ("table", "cheapest") else
            "note: the time limit struck; what was not asked by then is left out")  # fmt: skip
    if result.answered:
        return
    if result.answers:
        change = "change the goal, the job or the clusters"
        if result.limit == "time":
            change = "raise --time-limit"
        raise NoFeasiblePlan(result.answers[0].text, change)
    raise NoFeasiblePlan(*why_none(result.rows))
