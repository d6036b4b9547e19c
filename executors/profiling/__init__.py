"""Measures a machine: operators, collectives, host times and memory, as a Profile."""

from __future__ import annotations

from .runner import profile_machine

__all__ = ["profile_machine"]
