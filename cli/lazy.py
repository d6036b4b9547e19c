"""Groups of commands whose files are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from ..errors import unknown_name


class LazyGroup(click.Group):
    """A group with one file per command, each holding a `command`; unknown names suggest near ones.

    `package` is where the files lie below this one, `kind` what an error calls a command.
    """

    def __init__(
        self,
        *args: Any,
        names: Sequence[str],
        package: str = "",
        kind: str = "command",
        **attrs: Any,
    ) -> None:
        super().__init__(*args, **attrs)
        self.names, self.package, self.kind = tuple(names), package, kind

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which people meet them."""
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command in the file of that name."""
        if cmd_name not in self.names:
            return None
        path = f".{self.package}.{cmd_name}" if self.package else f".{cmd_name}"
        return import_module(path, __package__).command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments start with."""
        if args and not args[0].startswith("-") and args[0] not in self.names:
            raise unknown_name(self.kind, args[0], self.names)
        return super().resolve_command(ctx, args)
