"""forerun solve sequences: sequences of unequal length on unequal groups of GPUs."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ... import document
from ..log import say
from ..options import POSITIVE, common_options, output_option

if TYPE_CHECKING:
    from ...planner.sequences import Assignment, Costs, Static

SHOWN = 12
"""Micro-batches listed without --json."""


@click.command("sequences")
@click.argument("lengths_path", metavar="LENGTHS", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Catalog name, config.json or its folder, or 7b.")
@click.option(
    "--gpus",
    required=True,
    help="8xH100, 128x8xA100-80GB, H100:8, or a cluster TOML; a power of two of them.",
)
@click.option(
    "--barriers/--no-barriers",
    default=True,
    show_default=True,
    help="Whether all GPUs meet after every micro-batch (ZeRO 3), or at the step's end (ZeRO 1).",
)
@click.option("--max-degree", type=POSITIVE, help="Most GPUs that share one sequence.")
@click.option(
    "--kind",
    type=click.Choice(["ring", "ulysses"]),
    help="How a group divides a sequence; default: the faster one of each degree.",
)
@click.option("--tokens-per-gpu", type=POSITIVE, help="In place of what the memory holds.")
@click.option(
    "--recompute",
    type=click.Choice(["none", "selective", "full"]),
    default="none",
    show_default=True,
    help="Activations that are recomputed.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    help="Seconds after which the best so far is taken; default: none.",
)
@output_option("the JSON document")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    lengths_path: Path,
    model: str,
    gpus: str,
    barriers: bool,
    max_degree: int | None,
    kind: str | None,
    tokens_per_gpu: int | None,
    recompute: str,
    time_limit: float | None,
) -> None:
    """Give the sequences of one step, LENGTHS in tokens per line, to groups of GPUs.

    Each micro-batch divides the GPUs into groups of unequal size, and each group works through some
    of the sequences; without barriers there is one, whose passes every GPU takes in their order.
    """
    from ...catalogs import load_model, resolve_gpus
    from ...planner.sequences import model_costs, read_lengths, solve
    from .. import render

    lengths = read_lengths(lengths_path)
    resolved = resolve_gpus(gpus)
    for note in resolved.notes:
        say(f"note: {note}")
    started = perf_counter()
    costs = model_costs(
        load_model(model),
        resolved.cluster,
        zero=3 if barriers else 1,
        recompute=recompute,
        kind=kind,
        max_degree=max_degree,
        tokens_per_rank=tokens_per_gpu,
    )
    found, static = solve(
        lengths, costs, resolved.cluster.num_devices, barriers=barriers, time_limit_s=time_limit
    )
    result = to_document(found, static, costs, perf_counter() - started)
    if output is not None:
        document.write_bytes(output, document.to_json(result))
    if as_json:
        render.print_json(result)
    else:
        print_assignment(found, static, lengths, result["seconds"])


def to_document(
    found: Assignment, static: Static | None, costs: Costs, seconds: float
) -> dict[str, Any]:
    """The JSON document."""
    batches = [
        {
            "groups": [
                {
                    "ranks": list(p.ranks),
                    "start": p.start,
                    "len": p.degree,
                    "kind": p.kind,
                    "sequences": list(p.sequences),
                    "seconds": p.seconds,
                }
                for p in batch.groups
            ],
            "seconds": batch.seconds,
        }
        for batch in found.micro_batches
    ]
    return {
        "micro_batches": batches,
        "makespan_s": found.makespan_s,
        "lower_bound_s": found.lower_bound_s,
        "gap": found.gap,
        "cut_bound_s": found.cut_bound_s,
        "cut_gap": found.cut_gap,
        "static_best_s": None if static is None else static.makespan_s,
        "static_degree": None if static is None else static.degree,
        "capacity_tokens": dict(zip(map(str, costs.degrees), costs.capacity_tokens, strict=True)),
        "fit_error": costs.fit_error,
        "limit": found.limit,
        "seconds": seconds,
    }


def print_assignment(
    found: Assignment, static: Static | None, lengths: tuple[int, ...], seconds: float
) -> None:
    """Print the groups of each micro-batch, the gain over one degree and the gap."""
    from ...units import format_seconds
    from .. import render

    render.print_line(
        f"{len(lengths):,} sequences, {sum(lengths):,} tokens (longest {max(lengths):,}) "
        f"on {found.num_ranks:,} GPUs"
    )
    rows: list[list[str]] = []
    for number, batch in enumerate(found.micro_batches[:SHOWN], start=1):
        own = [lengths[i] for p in batch.groups for i in p.sequences]
        blocks: dict[int, set[int]] = {}
        for p in batch.groups:
            blocks.setdefault(p.degree, set()).add(p.start)
        shape = " + ".join(f"{len(starts)}x{degree}" for degree, starts in blocks.items())
        rows.append([
            str(number), f"{len(own):,}", f"{min(own):,} - {max(own):,}", shape,
            format_seconds(batch.seconds),
        ])  # fmt: skip
    render.print_table(("micro-batch", "sequences", "lengths", "groups x GPUs", "time"), rows)
    if len(found.micro_batches) > SHOWN:
        render.print_line(f"... and {len(found.micro_batches) - SHOWN} more micro-batches")
    if static is not None:
        render.print_line(
            f"{static.makespan_s / found.makespan_s:.2f} times as fast as every sequence on "
            f"{static.degree} GPUs ({format_seconds(static.makespan_s)})"
        )
    cut = f", {render.percent(found.cut_gap)} with these micro-batches" if found.barriers else ""
    limit = ", stopped by the time limit" if found.limit else ""
    render.print_line(
        f"{format_seconds(found.makespan_s)}: at most {render.percent(found.gap)} above the best "
        f"possible{cut} ({seconds:.2f} s{limit})"
    )
