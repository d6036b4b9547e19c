"""Process groups for the tests: one per number of ranks, which runs all of its families in turn."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import running  # noqa: E402

Results = list[dict[tuple[str, str], dict[str, Any]]]


@cache
def traced_models() -> dict[str, bytes]:
    """The modules of one's own as models, by file: traced once, and not by every rank."""
    import families
    import modules

    from forerun import document
    from forerun.executors.trace_module import trace

    return {
        file: document.to_json(trace(target, families.SEQ))
        for target, file in modules.FILES.items()
    }


def run_group(world: int, selection: str, folder: Path) -> Results:
    """The results of all ranks, rank 0 first."""
    for file, model in traced_models().items():
        (folder / file).write_bytes(model)
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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("single") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that leaves a process or a temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert running.workers() == []
    assert list(folder.iterdir()) == []
