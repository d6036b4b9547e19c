"""The docs say what the program does."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import click
import pytest

import forerun
from forerun.catalogs import load_technique, names
from forerun.cli.reference import commands_markdown, every_command, with_demo_output

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/commands.md", "docs/techniques.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


COMMANDS = dict(every_command())


def test_the_reference_is_generated_from_the_commands() -> None:
    assert text("docs/commands.md") == commands_markdown(), "run make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help_and_json(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    if isinstance(command, click.Group):
        return
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(option.help for option in options)
    assert {"--json", "--debug"} <= {spelling for option in options for spelling in option.opts}


def documented_lines() -> list[tuple[str, list[str]]]:
    """Every `forerun ...` line shown in the hand-written pages, in words."""
    shown: list[tuple[str, list[str]]] = []
    for page in ("README.md", "CONTRIBUTING.md"):
        lines = re.findall(r"^    (forerun .*)$|`(forerun [^`]*)`", text(page), re.MULTILINE)
        for line in (first or second for first, second in lines):
            shown.append((page, shlex.split(line, comments=True)))
    return shown


def test_documented_commands_exist_with_their_options() -> None:
    lines = documented_lines()
    assert len(lines) >= 5
    for page, (_, name, *arguments) in lines:
        if isinstance(COMMANDS.get(name), click.Group):
            name = f"{name} {arguments[0]}"
        assert name in COMMANDS, f"{page}: forerun {name}"
        known = {s for p in COMMANDS[name].params for s in (*p.opts, *p.secondary_opts)}
        given = {word for word in arguments if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{page}: forerun {name} has no {given - known}"


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        shown = set(re.findall(r"make ([a-z][a-z-]+)", text(page)))
        assert shown <= targets, f"{page}: make {shown - targets}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", text(page)):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_demo_block_takes_an_output_with_any_characters() -> None:
    readme = text("README.md")
    shown = with_demo_output(readme, "$ make demo\n\\1 step time  +3 %\n")
    assert "\\1 step time  +3 %\n```\n" in shown
    assert with_demo_output(shown, "x\n").count("\n") < shown.count("\n")
    with pytest.raises(ValueError, match="demo blocks"):
        with_demo_output("no block here", "x")


def modules_without_torch() -> list[str]:
    names = [
        found.name
        for found in pkgutil.walk_packages(forerun.__path__, "forerun.")
        if not found.name.startswith(("forerun.executors", "forerun.kernels"))
    ]
    return [name for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules_without_torch())
def test_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_technique_has_its_line_with_its_class() -> None:
    line = r"^\| `([a-z0-9-]+)` \|.*\| ([a-z-]+) \|[^|]*\|$"
    rows = re.findall(line, text("docs/techniques.md"), re.MULTILINE)
    assert dict(rows) == {name: load_technique(name).exactness for name in names("techniques")}


def test_changelog_keeps_its_form() -> None:
    headings = re.findall(r"^## (.*)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings and all(re.match(r"\[(Unreleased|\d+\.\d+\.\d+)\]", h) for h in headings)
