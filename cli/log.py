"""Lines of the log, on stderr: notes and warnings beside the result."""

from __future__ import annotations

import click

from ..errors import InputError
from ..plan import Plan
from .jobs import Job


def say(line: str) -> None:
    """Print a line of the log to stderr."""
    click.echo(line, err=True)


def say_job(job: Job) -> None:
    """Print notes and warnings of a job to stderr."""
    for note in job.notes:
        say(f"note: {note}")
    for warning in job.warnings:
        say(f"warning: {warning}")


def say_not_executed(plan: Plan) -> None:
    """Say what `forerun run` would refuse in a plan, so that nobody finds out on the cluster."""
    from ..executors.support import check_executed

    try:
        check_executed(plan)
    except InputError as error:
        say(f"note: forerun run does not execute this plan yet: {error}")
