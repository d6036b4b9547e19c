"""forerun catalog: what the catalogs know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .options import common_options


@click.command("catalog")
@click.argument("kind", metavar="hardware|models|techniques|lengths|workloads")
@click.argument("name", required=False)
@common_options
def command(as_json: bool, kind: str, name: str | None) -> None:
    """List the entries of one KIND, or show the entry NAME."""
    from ..catalogs import entries, entry
    from . import render

    found = [entry(kind, name)] if name else entries(kind)
    if kind == "techniques":
        found = with_evidence(found)
    if as_json:
        render.print_json({"entries": found})
    elif name:
        for line in lines_of(found[0]):
            render.print_line(line)
    else:
        for item in found:
            render.print_line(summary(item))


def with_evidence(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Techniques with what was measured of them here (`forerun probe`), where anything was."""
    from ..catalogs import load_evidence
    from ..document import to_raw

    listed: dict[str, list[Any]] = {}
    for own in load_evidence():
        listed.setdefault(own.technique, []).append({**to_raw(own), "harmless": own.harmless})
    return [
        {**item, "measured_here": listed[item["name"]]} if item["name"] in listed else item
        for item in found
    ]


def summary(item: Mapping[str, Any]) -> str:
    """An entry in one line: its name, then where it comes from."""
    source = " ".join(str(item.get("source", "")).split())
    measured = item.get("measured_here")
    if measured:
        source = f"measured here: {', '.join(own['setting'] for own in measured)}"
    short = source if len(source) <= 70 else source[:67] + "..."
    return f"{item.get('name', '?'):28} {short}".rstrip()


def lines_of(value: Mapping[str, Any], prefix: str = "") -> list[str]:
    """An entry as `path = value` lines.

    >>> lines_of({"name": "x", "link": {"latency_s": 1e-6}})
    ['name = x', 'link.latency_s = 1e-06']
    """
    lines: list[str] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += lines_of(item, f"{prefix}{key}.")
        elif isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping):
            for index, part in enumerate(item):
                lines += lines_of(part, f"{prefix}{key}[{index}].")
        else:
            lines.append(f"{prefix}{key} = {item}")
    return lines
