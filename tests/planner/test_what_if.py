"""What more would buy."""

from __future__ import annotations

import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.planner import Pins, search, what_if
from forerun.workload import Workload


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


def test_more_never_slows_and_the_most_valuable_comes_first() -> None:
    workload = Workload(seq_tokens=4096, global_batch_seqs=64)
    cluster = load_cluster("2x8xA100-80GB")
    best = search(load_model("llama-2-13b"), cluster, workload, keep=1).plans[0]
    changes = what_if(best, Pins())
    assert {change.change for change in changes} == {
        "network between nodes twice as fast", "links within a node twice as fast",
        "8 GiB more per device", "32 devices",
    }  # fmt: skip
    gains = [change.gain for change in changes]
    assert gains == sorted(gains, reverse=True) and min(gains) >= -1e-9
    assert changes[0].change == "32 devices" and 0.5 < changes[0].gain < 1.2
    for change in changes:
        assert change.step_s == pytest.approx(best.estimate.step_s.median / (1 + change.gain))


def test_processes_of_a_cpu_have_no_more() -> None:
    workload = Workload(seq_tokens=64, global_batch_seqs=4)
    best = search(load_model("tiny-1m"), load_cluster("2xcpu"), workload, keep=1).plans[0]
    assert {change.change for change in what_if(best, Pins())} == {
        "links within a node twice as fast"
    }
