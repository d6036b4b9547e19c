"""forerun validate: predictions against a table of published runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import document
from .options import common_options, output_option

COLUMNS = ("source", "rows", "mean", "median", "bias", "coverage", "baseline")


@click.command("validate")
@click.argument("table_path", metavar="TABLE", type=click.Path(path_type=Path))
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="How many of the worst rows to list.",
)
@output_option("the JSON document")
@common_options
def command(as_json: bool, output: Path | None, table_path: Path, worst: int) -> None:
    """Predict every run of TABLE, a CSV file, and compare: error = predicted / measured - 1.

    Errors are on step time, whatever metric a row prints, or on bytes for memory. The columns stand
    in docs/validation.md; a row that cannot be read is reported with its reason.
    """
    from ..costmodel.validate import read_table, validate
    from . import render

    found = validate(read_table(table_path))
    if output is not None:
        document.write_bytes(output, document.to_json(found))
    if as_json:
        render.print_json(found)
    else:
        print_validation(found, worst)


def print_validation(found: Mapping[str, Any], worst: int) -> None:
    """Print the errors per source, the summary, the worst rows and those that were not read."""
    from . import render

    summary = found["summary"]
    if summary["by_source"]:
        render.print_table(COLUMNS, source_rows(summary))
    memory = summary["memory"]
    if memory["rows"]:
        names = ("peak memory", *COLUMNS[1:-1])
        lines = [source_row(name, part)[:-1] for name, part in memory["by_source"].items()]
        render.print_table(names, [*lines, source_row("all rows", memory)[:-1]])
    for line in summary_lines(summary):
        render.print_line(line)
    rows = [row for row in found["rows"] if row["ape"] is not None]
    if worst and rows:
        rows.sort(key=lambda row: -row["ape"])
        render.print_line()
        render.print_table(
            ("worst rows", "metric", "measured", "predicted", "error"),
            [worst_row(row) for row in rows[:worst]],
        )
    for row in found["rows"]:
        if row["predicted"] is None:
            render.print_line(f"not predicted: {row['id']}: {row['note']}")


def source_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One line per source, then the mean over sources and all rows together."""
    from . import render

    lines = [source_row(name, part) for name, part in summary["by_source"].items()]
    macro = ["mean of sources", "", render.percent(summary["macro_mean_ape"]), "", "", ""]
    macro.append(render.percent(summary["baseline_macro_mean_ape"]))
    count = sum(part["rows"] for part in summary["by_source"].values())
    return [*lines, macro, source_row("all rows", {**summary, "rows": count})]


def source_row(name: str, part: Mapping[str, Any]) -> list[str]:
    """Name, rows, mean, median, signed median, coverage and the baseline's mean of some rows."""
    from . import render

    return [
        name or "(no source)",
        str(part["rows"]),
        render.percent(part["mean_ape"]),
        render.percent(part["median_ape"]),
        render.percent(part["bias"], signed=True),
        render.percent(part["coverage"]),
        render.percent(part.get("baseline_mean_ape")),
    ]


def summary_lines(summary: Mapping[str, Any]) -> Sequence[str]:
    """What the tables do not say: counts, searched cells, ranking."""
    from . import render

    filled, ranking = summary["filled"], summary["ranking"]
    lines = [f"{summary['scored']} of {summary['rows']} rows predicted"]
    if filled["rows"]:
        lines.append(
            f"{filled['rows']} rows of time had cells to search: mean "
            f"{render.percent(filled['mean_ape'])}, the others "
            f"{render.percent(summary['stated']['mean_ape'])}"
        )
    if ranking["groups"]:
        tau = ranking["kendall_tau"]
        lines.append(
            f"ranking in {ranking['groups']} groups of plans for one job: mean regret "
            f"{render.percent(ranking['mean_regret'])}, Kendall tau "
            + ("-" if tau is None else f"{tau:.2f}")
        )
    return lines


def worst_row(row: Mapping[str, Any]) -> list[str]:
    """One line of the table of the worst rows."""
    from . import render

    values = [f"{row[name]:.4g}" for name in ("measured", "predicted")]
    return [row["id"], row["metric"], *values, render.percent(row["error"], signed=True)]
