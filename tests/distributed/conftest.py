"""Process groups for the tests: one per number of ranks, which runs all of its families in turn."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
Results = list[dict[tuple[str, str], dict[str, Any]]]


def run_group(world: int, selection: str, folder: Path) -> Results:
    """The results of all ranks, rank 0 first."""
    source = FOLDER.parents[1] / "src"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, str(FOLDER / "worker.py")]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(folder), selection], env=env)
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world
    return [pickle.loads((folder / f"rank{r}.pickle").read_bytes()) for r in range(world)]


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Results]:
    """`group(world, selection)`: the results of that process group, started on first use."""

    @cache
    def started(world: int, selection: str) -> Results:
        return run_group(world, selection, tmp_path_factory.mktemp(f"group{world}"))

    return started
