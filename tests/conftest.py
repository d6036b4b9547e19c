"""What tests of several rooms share: a tiny plan with made-up costs, and a folder of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings

from forerun import (
    Cluster,
    Device,
    Estimate,
    Interval,
    Layer,
    Link,
    Measurement,
    Mesh,
    Model,
    Phase,
    Plan,
    PlanFile,
    Pool,
    Profile,
    Setting,
    Stack,
    Workload,
)
from forerun.costmodel.diff import plan_digest
from forerun.measurement import RankMeasurement, StepTimes
from forerun.plan import even_stages, techniques

if not Path("/dev/nvidiactl").exists():  # without a GPU kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("same")
"""The same inputs on every run, so that a change that passes once passes again; `make test-all`
draws new ones (`--hypothesis-profile random`)."""

SHARED = ("group: Group",)
"""What tests take whose process groups are started once, in whichever file they stand."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, the tests of one file stay together, and those of
    all files that use process groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            text = (config.rootpath / path).read_text(encoding="utf-8")
            return "ranks" if any(words in text for words in SHARED) else path

    return Together(config, log)


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own: no test reads or writes the user's profiles."""
    folder = tmp_path / "user-data"
    monkeypatch.setenv("FORERUN_DATA", str(folder))
    return folder


@pytest.fixture
def profile() -> Profile:
    """A profile of this machine's CPU without curves."""
    return Profile(name="test", device="cpu", date="2026-01-01", environment={}, spread=0.05)


@pytest.fixture
def plan_file(profile: Profile) -> PlanFile:
    """Two data-parallel processes of a two-layer model; the estimate's numbers are made up."""
    model = Model(
        name="two-layers",
        hidden=32,
        vocab=256,
        layers=(Layer(repeat=2, heads=2, kv_heads=2, head_dim=16, ffn_hidden=64),),
    )
    device = Device(
        name="cpu",
        kind="cpu",
        memory_bytes=2**33,
        memory_bytes_per_s=1e10,
        peak_flops_per_s={"fp32": 1e11, "bf16": 1e11},
    )
    pool = Pool(
        name="cpu",
        device=device,
        devices_per_node=2,
        intra_node=Link(latency_s=1e-4, bytes_per_s=1e9),
        shared_cores=2,
        stack=Stack(name="test", gemm_efficiency={"fp32": 0.8, "bf16": 0.8}, can_overlap=False),
    )
    cluster = Cluster(name="2xcpu", pools=(pool,), profile=profile)
    phase = Phase(
        steps=4,
        seq_tokens=64,
        micro_batch_seqs=2,
        num_microbatches=1,
        mesh=Mesh(dp_replicate=2),
        stages=even_stages(2, 1, "cpu"),
        settings=(Setting(layers=(0, 1), techniques=techniques("fp32", "none")),),
    )
    workload = Workload(seq_tokens=64, global_batch_seqs=4, steps=4)
    plan = Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))
    plan.check()
    return PlanFile(label=plan.label, plan=plan, estimate=_estimate())


def _estimate() -> Estimate:
    memory = {"parameters": 600.0, "activations": 300.0, "fragmentation": 40.0, "context": 60.0}
    return Estimate(
        step_s=Interval(median=0.10, low=0.09, high=0.11),
        tokens_per_s=2560.0,
        model_flops_per_s_per_device=1e9,
        mfu=0.01,
        peak_memory_bytes=Interval(median=1000.0, low=900.0, high=1100.0),
        fits="yes",
        fit_probability=1.0,
        capacity_bytes=2**33,
        time_terms_s={"forward": 0.03, "backward": 0.06, "exposed.dp": 0.009, "host": 0.001},
        memory_terms_bytes=memory,
        bytes_on_wire={"all_reduce@dp": 4096.0},
        evidence={"forward": "measured"},
    )


@pytest.fixture
def measurement_of() -> Callable[..., Measurement]:
    """A function from a plan file to a run just as predicted, but for the fields given."""

    def make(plan_file: PlanFile, **changes: object) -> Measurement:
        estimate = plan_file.estimate
        step_s = estimate.step_s.median
        terms_s, terms_bytes = estimate.time_terms_s, estimate.memory_terms_bytes
        rank = RankMeasurement(
            rank=0,
            coordinates={"dp_replicate": 0},
            peak_memory_bytes=900,
            process_peak_bytes=1000,
            memory_terms_bytes=terms_bytes,
            time_terms_s=terms_s,
            bytes_on_wire=estimate.bytes_on_wire,
        )
        exact = Measurement(
            label=plan_file.label,
            plan_digest=plan_digest(plan_file.plan),
            step_s=StepTimes(median=step_s, p10=step_s, p90=step_s),
            tokens_per_s=estimate.tokens_per_s,
            peak_memory_bytes=900,
            process_peak_bytes=1000,
            time_terms_s=terms_s,
            memory_terms_bytes=terms_bytes,
            bytes_on_wire=estimate.bytes_on_wire,
            steps=(step_s,) * 4,
            loss=(5.5, 5.0, 4.5, 4.0),
            ranks=(rank,),
            environment={"torch": "none"},
        )
        return msgspec.structs.replace(exact, **changes)

    return make
