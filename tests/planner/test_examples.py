"""The examples in the docstrings hold."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["pins", "space"])
def test_examples(name: str):
    result = doctest.testmod(import_module(f"forerun.planner.{name}"))
    assert result.attempted > 0 and result.failed == 0
