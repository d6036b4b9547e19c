"""Predicted peaks of pipelines against counted live tensors, every schedule on two ranks."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pipeline_memory
import pytest

from forerun.costmodel import estimate
from forerun.costmodel.diff import NOT_LIVE


def counted(folder: Path) -> list[int]:
    """Bytes of the fullest rank, case by case."""
    here = Path(__file__).parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[1] / "src")}
    command = [sys.executable, str(here / "pipeline_memory.py")]
    ranks = [subprocess.Popen([*command, str(r), "2", str(folder)], env=env) for r in range(2)]
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0]
    peaks = [json.loads((folder / f"peaks{rank}.json").read_text()) for rank in range(2)]
    return [max(pair) for pair in zip(*peaks, strict=True)]


@pytest.mark.slow
def test_predicted_peaks_are_those_counted(tmp_path: Path) -> None:
    errors: dict[tuple[str, str, bool], float] = {}
    for case, peak in zip(pipeline_memory.cases(), counted(tmp_path), strict=True):
        terms = estimate(pipeline_memory.make_plan(*case)).memory_terms_bytes
        errors[case] = sum(n for name, n in terms.items() if name not in NOT_LIVE) / peak - 1
    assert max(map(abs, errors.values())) < 0.08, errors
    for schedule in {case[0] for case in errors}:
        own = [abs(error) for case, error in errors.items() if case[0] == schedule]
        assert statistics.median(own) < 0.05, schedule
