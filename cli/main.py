"""The `forerun` command: finds the asked command, and turns every error into one line and a code.

A command's file is imported when it is asked for, and imports the rooms it needs inside its body,
so that `forerun --help` stays fast. Exit codes: 0 done, 1 a run or a write that failed, 2 bad
input, 3 no feasible plan, 4 a difference beyond the tolerance, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import ForerunError, Interrupted
from .lazy import LazyGroup

COMMANDS = (
    "plan", "predict", "run", "diff", "tune", "probe", "profile", "calibrate", "validate", "solve",
    "sweep", "quantize", "catalog", "demo",
)  # fmt: skip


class Commands(LazyGroup):
    """The group at the top, whose errors are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click itself would print an empty line on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command that `args` asks for and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in arguments
        try:
            code: object = super().main(
                args=arguments,
                prog_name="forerun",
                complete_var=complete_var,
                standalone_mode=False,
                **extra,
            )
            sys.stdout.flush()
        except (click.Abort, KeyboardInterrupt):  # before the command began
            fail("interrupted", Interrupted.exit_code, debug)
        except ForerunError as error:
            fail(str(error), error.exit_code, debug)
        except click.ClickException as error:
            fail(click_message(error), 2, debug)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            drop_stdout()
            sys.exit(1)
        except OSError as error:
            drop_stdout()
            fail(
                f"{error.filename or 'output'}: {error.strerror or error}; "
                "free some space or give another place",
                1,
                debug,
            )
        except MemoryError:
            fail("out of memory on this machine; ask for less, or close other programs", 1, debug)
        except Exception as error:  # a bug: still one line, the traceback on request
            fail(
                f"internal error: {type(error).__name__}: {error}; "
                "repeat with --debug and report the traceback",
                1,
                debug,
            )
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int, debug: bool) -> NoReturn:
    """Print one line to stderr (the traceback before it with --debug) and exit."""
    if debug:
        traceback.print_exc()
    click.echo(f"forerun: {' '.join(message.split())}", err=True)
    sys.exit(code)


def click_message(error: click.ClickException) -> str:
    """What click found wrong, in one line that says where to look."""
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "forerun"
    return f"{message}; see {where} --help"


def drop_stdout() -> None:
    """Point stdout at nothing: what could not be written must not fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Commands, names=COMMANDS, invoke_without_command=True)
@click.version_option(__version__, prog_name="forerun", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Plan a training run, predict it, execute it, and see how wrong the prediction was.

    Every command takes --json: stdout is then one JSON document and nothing else. Exit codes:
    0 done, 1 a run or a write failed, 2 bad input, 3 no feasible plan, 4 beyond the tolerance
    asked for, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """The console script."""
    cli.main()
