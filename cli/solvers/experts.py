"""forerun solve experts: replication and placement of experts on ranks under a load profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ... import document
from ...errors import NoFeasiblePlan
from ..options import common_options, output_option

if TYPE_CHECKING:
    from ...planner.experts import Placement

SHOWN = 16
"""Ranks or layers listed without --json."""


@click.command("experts")
@click.argument("loads_path", metavar="LOADS", type=click.Path(path_type=Path))
@click.option("--ranks", type=int, required=True, help="Ranks that share the experts.")
@click.option("--nodes", type=int, help="Nodes of equally many ranks: traffic between is counted.")
@click.option(
    "--slots", type=int, help="Experts held per rank; default: just enough for one of each."
)
@click.option(
    "--groups", type=int, help="Groups of neighbouring experts that each stay within a node."
)
@output_option("the JSON document")
@common_options
def command(
    as_json: bool,
    output: Path | None,
    loads_path: Path,
    ranks: int,
    nodes: int | None,
    slots: int | None,
    groups: int | None,
) -> None:
    """Replicate and place the experts of LOADS so that the fullest rank has little.

    LOADS is the JSON that forerun run wrote, or a CSV file whose columns are expert and load, or
    layer and one column per expert with a row per layer.
    """
    from ...planner.experts import Layout, place_experts, read_loads
    from .. import render

    started = perf_counter()
    loads = read_loads(loads_path)
    if slots is None:
        slots = -(-len(loads.experts) // max(ranks, 1))
    layout = Layout(ranks=ranks, slots=slots, nodes=nodes, groups=groups)
    try:
        placements = place_experts(loads, layout)
    except NoFeasiblePlan as error:
        if as_json:
            reason = {"reason": error.reason, "smallest_change": error.smallest_change}
            render.print_json({"replicas": {}, "placement": [], "infeasible": reason})
        raise
    result = to_document(placements, perf_counter() - started)
    if output is not None:
        document.write_bytes(output, document.to_json(result))
    if as_json:
        render.print_json(result)
    else:
        print_placements(placements, result["seconds"])


def to_document(placements: Sequence[Placement], seconds: float) -> dict[str, Any]:
    """The JSON document: of one layer flat, of several under `layers`, the worst beside them."""
    layers = [of_layer(placement) for placement in placements]
    if len(layers) == 1:
        return layers[0] | {"seconds": seconds}
    limits = [layer["limit"] for layer in layers if layer["limit"]]
    return {
        "layers": [
            {"layer": placement.layer} | layer
            for placement, layer in zip(placements, layers, strict=True)
        ],
        "imbalance": max(layer["imbalance"] for layer in layers),
        "gap": max(layer["gap"] for layer in layers),
        "contiguous_imbalance": max(layer["contiguous_imbalance"] for layer in layers),
        "limit": limits[0] if limits else None,
        "seconds": seconds,
    }


def of_layer(placement: Placement) -> dict[str, Any]:
    """The fields of one layer."""
    fields: dict[str, Any] = {
        "replicas": placement.replicas,
        "placement": [list(rank) for rank in placement.ranks],
        "max_load": placement.max_load,
        "mean_load": placement.mean_load,
        "imbalance": placement.imbalance,
        "lower_bound": placement.lower_bound,
        "gap": placement.gap,
        "optimal": placement.optimal,
        "contiguous_imbalance": placement.contiguous_imbalance,
        "limit": placement.limit,
    }
    if placement.cross_node_fraction is not None:
        fields["cross_node_fraction"] = placement.cross_node_fraction
    return fields


def print_placements(placements: Sequence[Placement], seconds: float) -> None:
    """Print the ranks of one layer, or a line per layer of several."""
    from .. import render

    if len(placements) == 1:
        ranks = placements[0].ranks
        rows = [[str(rank), " ".join(own)] for rank, own in enumerate(ranks[:SHOWN])]
        render.print_table(("rank", "experts"), rows)
        if len(ranks) > SHOWN:
            render.print_line(f"... and {len(ranks) - SHOWN} more ranks (--json lists all)")
    rows = [
        [
            placement.layer,
            f"{placement.max_load:,.6g}",
            f"{placement.imbalance:.3f}",
            f"{placement.contiguous_imbalance:.3f}",
            render.percent(placement.gap),
            render.percent(placement.cross_node_fraction),
        ]
        for placement in placements[:SHOWN]
    ]
    columns = ("layer", "fullest rank", "/ mean", "contiguous / mean", "gap", "across nodes")
    render.print_table(columns, rows)
    if len(placements) > SHOWN:
        render.print_line(f"... and {len(placements) - SHOWN} more layers (--json lists all)")
    worst = max(placements, key=lambda placement: placement.gap)
    limits = [placement.limit for placement in placements if placement.limit]
    limit = f", stopped by the {limits[0]} limit" if limits else ""
    proof = "no placement is better" if worst.optimal else "a better placement may exist"
    render.print_line(f"gap {render.percent(worst.gap)} at worst: {proof} ({seconds:.2f} s{limit})")
