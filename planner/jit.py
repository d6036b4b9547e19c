"""Inner loops that numba compiles when it is there (the extra `fast`), else run as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


@cache
def has_numba() -> bool:
    """Whether numba is installed; asking does not import it."""
    return find_spec("numba") is not None


def compiled(function: F, signature: str) -> F:
    """`function` compiled for one signature and cached on disk; itself without numba.

    Call it inside the function that needs the loop: importing numba takes a third of a second. The
    signature is given because numba caches recursive functions only then.
    """
    if not has_numba():
        return function
    import numba

    return cast("F", numba.njit(signature, cache=True)(function))
