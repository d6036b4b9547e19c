"""The plot of a sweep: plain SVG, alone or within one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..planner.sweep import SweepResult

WIDTH, HEIGHT = 860, 500
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 44, 60
LEGEND_ROW = 18
LOG_FROM = 10.0
"""An axis whose largest value is this many times its smallest is logarithmic."""
COLOURS = ("#3b78c2", "#e08a2c", "#3f9b55", "#b5495b", "#7d5ba6", "#5a6b7b", "#b08d2f", "#2f9aa0")
NAMES = {
    "tokens_per_s": "throughput (tokens/s)",
    "seq_tokens": "sequence length (tokens)",
    "num_params": "model size (parameters)",
    "usd_per_hour": "price (USD per hour)",
    "gpus": "GPUs (devices)",
}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2733}.title{font-size:15px}"
    ".axis{stroke:#1c2733;stroke-width:1}.grid{stroke:#d5dbe1;stroke-width:1}"
)
PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #1c2733; }
h1 { font-size: 1.4rem } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .2rem .7rem; text-align: right } th { border-bottom: 1px solid #9aa7b4 }
td:first-child, th:first-child { text-align: left } li { overflow-wrap: anywhere }
"""


class Axis(NamedTuple):
    """From values to pixels, with the values that are labelled."""

    place: Callable[[float], float]
    ticks: list[float]


def plot_svg(result: SweepResult) -> str:
    """A scatter of the rows with the Pareto front of every job as a line, as an SVG document.

    Rows without a plan are not drawn; a sweep without any gives empty axes.
    """
    drawn = result.compared
    xs = [result.cost(i) for i in drawn] or [1.0]
    ys = [result.value(i) for i in drawn] or [1.0]
    across = axis(xs, LEFT, WIDTH - RIGHT)
    upward = axis(ys, HEIGHT - BOTTOM, TOP)
    jobs = list(dict.fromkeys(result.job(i) for i in drawn))
    height = HEIGHT + LEGEND_ROW * len(jobs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>forerun sweep: {result.question}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(LEFT, 24, f"{NAMES[result.wanted]} over {NAMES[result.paid]}", css="title"),
        *frame(across, upward, NAMES[result.paid], NAMES[result.wanted]),
    ]
    for number, job in enumerate(jobs):
        members = [i for i in drawn if result.job(i) == job]
        colour = COLOURS[number % len(COLOURS)]
        parts += series(result, members, across, upward, colour)
        parts += legend_row(number, job_name(result, members[0]), colour)
    return "\n".join([*parts, "</svg>\n"])


def series(
    result: SweepResult, members: Sequence[int], across: Axis, upward: Axis, colour: str
) -> list[str]:
    """The points of one job, and the line through those on its front."""
    at = {i: (across.place(result.cost(i)), upward.place(result.value(i))) for i in members}
    front = [i for i in result.pareto if i in at]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(at[i] for i in front))
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for i, (x, y) in at.items():
        fill = colour if i in front else "#ffffff"
        row = result.rows[i]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" '
            f'stroke-width="1.5"><title>{escape(describe(result, i))}</title></circle>'
        )
        side, shift = ("end", -8) if x > (LEFT + WIDTH) / 2 else ("start", 8)
        parts.append(text(x + shift, y - 6, row.gpus, anchor=side))
    return parts


def describe(result: SweepResult, index: int) -> str:
    """A row in a line, shown when the pointer rests on its point."""
    row = result.rows[index]
    return (
        f"{row.model} on {row.gpus}, {row.global_batch_seqs:,} x {row.seq_tokens:,} tokens: "
        f"{row.tokens_per_s:,.0f} tokens/s, {row.label}"
    )


def job_name(result: SweepResult, index: int) -> str:
    """What the rows of a job have in common."""
    row = result.rows[index]
    if result.wanted == "seq_tokens":
        return row.model
    batch = f"{row.global_batch_seqs:,} x {row.seq_tokens:,} tokens per step"
    return batch if result.wanted == "num_params" else f"{row.model}, {batch}"


def legend_row(number: int, name: str, colour: str) -> list[str]:
    """One line below the plot."""
    y = HEIGHT + LEGEND_ROW * number
    return [
        f'<circle cx="{LEFT}" cy="{y}" r="5" fill="{colour}"/>',
        text(LEFT + 12, y + 4, name),
    ]


def frame(across: Axis, upward: Axis, x_name: str, y_name: str) -> list[str]:
    """Axes, grid, labelled values and the names of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts: list[str] = []
    for tick in across.ticks:
        x = across.place(tick)
        parts.append(rule(x, TOP, x, bottom, "grid"))
        parts.append(text(x, bottom + 18, short(tick), anchor="middle"))
    for tick in upward.ticks:
        y = upward.place(tick)
        parts.append(rule(LEFT, y, right, y, "grid"))
        parts.append(text(LEFT - 8, y + 4, short(tick), anchor="end"))
    middle = (TOP + bottom) / 2
    return [
        *parts,
        rule(LEFT, bottom, right, bottom, "axis"),
        rule(LEFT, TOP, LEFT, bottom, "axis"),
        text((LEFT + right) / 2, bottom + 38, x_name, anchor="middle"),
        f'<g transform="rotate(-90 20 {middle})">{text(20, middle, y_name, anchor="middle")}</g>',
    ]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis that holds all values: from zero, or logarithmic where they differ by much."""
    low, high = min(values), max(values)
    if low > 0 and high >= LOG_FROM * low:
        low, high = math.log10(low) - 0.05, math.log10(high) + 0.05
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(low), math.ceil(high) + 1)
            for digit in (1, 2, 5)
            if low <= math.log10(digit * 10.0**power) <= high
        ]
        return Axis(
            lambda value: start + (math.log10(value) - low) / (high - low) * (end - start), ticks
        )
    high = 1.08 * high if high > 0 else 1.0
    step = 10.0 ** math.floor(math.log10(high))
    step *= next(
        factor for factor in (0.1, 0.2, 0.5, 1.0) if high / (factor * step) <= 8 or factor == 1.0
    )
    ticks = [k * step for k in range(math.floor(high / step) + 1)]
    return Axis(lambda value: start + value / high * (end - start), ticks)


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    """A label."""
    of_class = f' class="{css}"' if css else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_class}>{escape(content)}</text>'
    )


def rule(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def short(value: float) -> str:
    """A number on an axis.

    >>> short(1500.0), short(2e6), short(0.5), short(0)
    ('1.5 k', '2 M', '0.5', '0')
    """
    for scale, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def plot_html(result: SweepResult) -> str:
    """The plot, the table and the answers as one page without scripts or links."""
    from .sweep_table import table_cells

    columns, rows = table_cells(result, list(range(len(result.rows))))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    plans = "\n".join(f"<li>{escape(row.label or row.reason)}</li>" for row in result.rows)
    answers = "\n".join(f"<p>{escape(answer.text)}</p>" for answer in result.answers)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f"<title>forerun sweep</title><style>{PAGE_STYLE}</style></head>\n<body>"
        f"<h1>Sweep: {result.question.replace('-', ' ')}</h1>\n{answers}\n{plot_svg(result)}"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n"
        f"<ol>\n{plans}\n</ol></body></html>\n"
    )
