"""The HTML report of a diff: one file without scripts or links, bars as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .render import diff_row, emulation_line, grouped, headline

BAR_WIDTH, BAR_HEIGHT, LABEL_WIDTH, VALUE_WIDTH = 420, 11, 170, 190
ROW_HEIGHT = 2 * BAR_HEIGHT + 10

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 54rem; color: #1c2733; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .9rem; text-align: right }
td:first-child, th:first-child { text-align: left } th { border-bottom: 1px solid #9aa7b4 }
svg text { font-size: 12px; fill: #1c2733 } .predicted { fill: #3b78c2 } .measured { fill: #e08a2c }
"""


def report_html(comparison: Mapping[str, Any]) -> str:
    """A diff document as one self-contained HTML page."""
    label = escape(comparison["label"])
    sections = [
        f"<h2>{title}</h2>\n{bars(group)}" for title, group in grouped(comparison["terms"]) if group
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>forerun: {label}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>Predicted against measured: {label}</h1>\n{emulation(comparison)}"
        f"{totals(comparison)}\n"
        "<p>error = predicted / measured &minus; 1; <svg width='12' height='12'><rect class="
        "'predicted' width='12' height='12'/></svg> predicted, <svg width='12' height='12'>"
        "<rect class='measured' width='12' height='12'/></svg> measured</p>\n"
        + "\n".join(sections)
        + quality(comparison.get("quality", ()))
        + "\n</body></html>\n"
    )


def quality(risks: Sequence[Mapping[str, Any]]) -> str:
    """What was used that is not exact, at what risk, and on whose evidence."""
    if not risks:
        return "<h2>quality</h2><p>exact: nothing changes results beyond rounding</p>"
    parts: list[str] = []
    for risk in risks:
        beyond = f"<br>Beyond the evidence: {escape(risk['beyond'])}" if risk["beyond"] else ""
        recalled = " (recalled)" if risk["recalled"] else ""
        parts.append(
            f"<p><b>{escape(risk['technique'])}</b> ({escape(risk['setting'])}), "
            f"{escape(risk['quality'])}: {escape(risk['title'])}.<br>{escape(risk['claim'])}<br>"
            f"{escape(risk['paper'])}{recalled}. {escape(risk['conditions'])}{beyond}</p>"
        )
    return "<h2>quality risks</h2>" + "".join(parts)


def emulation(comparison: Mapping[str, Any]) -> str:
    """That the measured side is emulated, where it is."""
    found = comparison["emulated"]
    if found is None:
        return ""
    return f"<p><b>{escape(emulation_line(found, comparison['step']['measured_s']))}</b></p>\n"


def totals(comparison: Mapping[str, Any]) -> str:
    """The table of step time and memory."""
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in diff_row(name, unit, *values))
        + "</tr>"
        for name, unit, values in headline(comparison)
    )
    return (
        f"<table><tr><th></th><th>predicted</th><th>measured</th><th>error</th></tr>{rows}</table>"
    )


def bars(terms: Sequence[Mapping[str, Any]]) -> str:
    """Two bars per term, predicted above measured, to one scale."""
    largest = max(max(t["predicted"], t["measured"]) for t in terms)
    width = LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH
    rows = "".join(bar_row(i * ROW_HEIGHT, term, largest) for i, term in enumerate(terms))
    return f"<svg width='{width}' height='{len(terms) * ROW_HEIGHT}' role='img'>{rows}</svg>"


def bar_row(top: float, term: Mapping[str, Any], largest: float) -> str:
    """The two bars of one term with its name, its values and its error."""
    name, predicted, measured, error = (
        escape(cell)
        for cell in diff_row(
            term["term"], term["unit"], term["predicted"], term["measured"], term["error"]
        )
    )
    parts = [f"<text x='0' y='{top + 16}'>{name}</text>"]
    for index, side in enumerate(("predicted", "measured")):
        length = BAR_WIDTH * max(0.0, term[side]) / largest
        parts.append(
            f"<rect class='{side}' x='{LABEL_WIDTH}' y='{top + 2 + index * BAR_HEIGHT}' "
            f"width='{length:.1f}' height='{BAR_HEIGHT - 1}'/>"
        )
    text = f"{predicted} / {measured} ({error})"
    parts.append(f"<text x='{LABEL_WIDTH + BAR_WIDTH + 8}' y='{top + 16}'>{text}</text>")
    return "".join(parts)
