"""The error hierarchy: every error a user can cause is one line and carries its exit code.

A message has three parts: what was found (field and value), what is wrong with it, what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ForerunError(Exception):
    """Base of all errors that forerun raises on purpose."""

    exit_code = 1


class InputError(ForerunError):
    """The user's input is wrong (exit 2): names the field, the value and the remedy."""

    exit_code = 2

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        message = f"{field}={value}: {problem}; {remedy}"
        super().__init__(" ".join(message.splitlines()))  # a name may hold a line break

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, str]]:
        """Between processes an error keeps its parts."""
        return InputError, (self.field, str(self.value), self.problem, self.remedy)


class NoFeasiblePlan(ForerunError):
    """No plan satisfies the request (exit 3): says by how much, and the smallest change."""

    exit_code = 3

    def __init__(self, reason: str, smallest_change: str) -> None:
        self.reason, self.smallest_change = reason, smallest_change
        super().__init__(f"no feasible plan: {reason}; {smallest_change}")


class RunFailed(ForerunError):
    """A run or a write failed (exit 1): a rank was lost, memory or disk ran out."""

    exit_code = 1


class Interrupted(ForerunError):
    """Ctrl-C, or a run that was told to end (exit 130)."""

    exit_code = 130


class ToleranceExceeded(ForerunError):
    """A difference is beyond the tolerance that was asked for (exit 4)."""

    exit_code = 4


def unknown_name(field: str, value: str, known: Iterable[str]) -> InputError:
    """An InputError for a name that is not known, suggesting near ones.

    >>> str(unknown_name("gpu", "H10", ["H100", "A100"]))
    'gpu=H10: unknown name; did you mean H100 or A100?'
    """
    names = sorted(known)
    folded = {name.lower(): name for name in names}
    near = [folded[n] for n in difflib.get_close_matches(value.lower(), folded, n=3, cutoff=0.5)]
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    else:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        remedy = f"known: {shown}"
    return InputError(field, value, "unknown name", remedy)
