"""Plans as real training runs: build, parallelise, train, measure. Names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launch import run
    from .probing import probe
    from .tuning import tune

_LAZY = {"probe": ".probing", "run": ".launch", "tune": ".tuning"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["probe", "run", "tune"]
