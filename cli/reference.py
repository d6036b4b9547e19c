"""The written reference: docs/commands.md from the commands themselves, README.md from a real demo.

`python -m forerun.cli.reference` writes the first, with `--demo` the second too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from .. import document
from .main import cli

ROOT = Path(__file__).resolve().parent.parent
DEMO_BLOCK = re.compile(r"(?<=<!-- demo output -->\n```text\n).*?(?=```\n)", re.DOTALL)


def commands_markdown() -> str:
    """The text of docs/commands.md: every command with its arguments and options."""
    parts = ["# Commands\n", f"{_paragraph(cli.help)}\n"]
    parts += [_section(name, command) for name, command in every_command()]
    return "\n".join(parts)


def every_command() -> list[tuple[str, click.Command]]:
    """All commands in order, those of a group after it, with their full names."""

    def below(prefix: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield f"{prefix}{name}", command
            if isinstance(command, click.Group):
                yield from below(f"{prefix}{name} ", command)

    return list(below("", cli))


def _section(name: str, command: click.Command) -> str:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    words = ["SOLVER"] if isinstance(command, click.Group) else map(_usage, arguments)
    usage = " ".join(["forerun", name, *words, "[OPTIONS]"])
    lines = [f"## {name}\n", f"    {usage}\n", f"{_paragraph(command.help)}\n"]
    return "\n".join([*lines, *(_option(option) for option in options), ""])


def _usage(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required or argument.nargs == -1 else f"[{name}]"


def _option(option: click.Option) -> str:
    """One line: how it is written, what it does, what it is when not given."""
    spelled = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = ""
    if isinstance(option.type, click.Choice):
        value = f" `{'|'.join(option.type.choices)}`"
    elif not option.is_flag:
        value = f" `{option.metavar or (option.name or '').upper()}`"
    default = f" Default: {_default(option)}." if option.show_default else ""
    return f"- {spelled}{value}: {option.help or 'See above.'}{default}"


def _default(option: click.Option) -> str:
    if option.is_flag and option.secondary_opts:
        return option.opts[0] if option.default else option.secondary_opts[0]
    return str(option.default)


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def demo_output() -> str:
    """What `forerun demo` prints, story and table, on this machine now."""
    done = subprocess.run(
        [sys.executable, "-m", "forerun", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    return "\n".join(["$ make demo", *lines]).rstrip() + "\n"


def with_demo_output(readme: str, output: str) -> str:
    """The README with `output` in its marked block."""
    replaced, count = DEMO_BLOCK.subn(lambda _: output, readme)
    if count != 1:
        raise ValueError(f"README.md has {count} demo blocks, not one")
    return replaced


def main() -> None:
    """Write the files."""
    document.write_bytes(ROOT / "docs" / "commands.md", commands_markdown().encode())
    if "--demo" in sys.argv[1:]:
        readme = ROOT / "README.md"
        text = with_demo_output(readme.read_text(encoding="utf-8"), demo_output())
        document.write_bytes(readme, text.encode())


if __name__ == "__main__":
    main()
