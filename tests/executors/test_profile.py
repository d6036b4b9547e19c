"""Profiling a machine: grids, clocks, merging of ranks, and a whole small profile."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from forerun.catalogs import load_model
from forerun.cluster import Profile
from forerun.costmodel.layers import decoder_layer, embedding, head
from forerun.costmodel.operators import KINDS
from forerun.costmodel.options import Options
from forerun.document import from_json, to_json
from forerun.errors import InputError, RunFailed
from forerun.executors.profiling import grids, profile_machine
from forerun.executors.profiling.runner import (
    Findings,
    Request,
    Timing,
    device_name,
    merge_operators,
    run_request,
)

GRID: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((16, 32, 32), (512, 256, 256)),
    "linear_wgrad": ((16, 32, 32), (512, 256, 256)),
    "attention": ((8, 64, 32), (8, 256, 32)),
    "rmsnorm": ((64, 32), (2048, 256)),
    "swiglu": ((1024,), (1048576,)),
    "rope": ((1024,), (1048576,)),
    "add": ((1024,), (1048576,)),
    "embedding": ((64, 32, 256), (2048, 128, 256)),
    "cross_entropy": ((16, 256), (2048, 256)),
    "adamw": ((1024, 8), (1048576, 8)),
    "grouped_linear": ((64, 32, 32, 4), (1024, 128, 128, 8)),
    "routing": ((64, 8), (2048, 8)),
    "permute": ((1024, 2), (65536, 2)),
    "unpermute": ((1024, 2), (65536, 2)),
}


@pytest.fixture(scope="module")
def profile() -> Profile:
    """A profile of a tiny grid, by two real processes."""
    request = Request(
        device="cpu", quick=True, grid=GRID, busy=(1, 2), dtypes=("fp32",), budget_s=0.6, host=False
    )
    labels: list[tuple[float, str]] = []
    found = run_request(request, on_progress=lambda done, label: labels.append((done, label)))
    assert [done for done, _ in labels] == sorted(done for done, _ in labels)
    assert "operators fp32, 2 busy" in [label for _, label in labels]
    return found


def test_profile_round_trips(profile: Profile) -> None:
    assert from_json(Profile, to_json(profile), "profile") == profile
    assert profile.device == "cpu"
    assert profile.environment["threads_per_process"] == "1"
    assert profile.memory["process_bytes"] > 50e6  # torch itself
    assert 0 < profile.spread < 5


def test_profile_holds_every_operator_at_each_level(profile: Profile) -> None:
    found = {(curve.operator, curve.busy): curve for curve in profile.operators}
    assert set(found) == {(name, busy) for name in GRID for busy in (1, 2)}
    for (name, _), curve in found.items():
        assert set(curve.sizes) == {tuple(float(x) for x in size) for size in GRID[name]}
        assert all(len(size) == len(curve.axes) for size in curve.sizes)
        backward = name not in ("linear_wgrad", "add", "adamw")
        assert len(curve.backward_s) == (len(curve.sizes) if backward else 0)


def test_every_size_has_its_time(profile: Profile) -> None:
    for curve in profile.operators:
        assert len(curve.forward_s) == len(curve.sizes)
        for value in (*curve.forward_s, *curve.backward_s):
            assert 0 < value < 60, (curve.operator, value)


def test_collectives_have_a_time_for_every_message(profile: Profile) -> None:
    assert {curve.collective for curve in profile.collectives} == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p",
    }  # fmt: skip
    for curve in profile.collectives:
        assert curve.group == 2 and curve.groups == 1
        assert curve.message_bytes == tuple(float(n) for n in grids.message_sizes(quick=True))
        assert all(0 < seconds < 60 for seconds in curve.seconds)


def test_meetings_of_ranks_are_measured(profile: Profile) -> None:
    (curve,) = profile.waits
    assert (curve.group, curve.groups) == (2, 1)
    assert len(curve.seconds) == len(grids.wait_calls(quick=True))
    assert list(curve.compute_s) == sorted(curve.compute_s)
    assert all(0 < seconds < 60 for seconds in curve.seconds)


def test_a_failing_worker_is_named_and_leaves_nobody_behind() -> None:
    request = Request(device="cpu", quick=True, grid={"no_such": ((1,),)}, busy=(1,))
    with pytest.raises(RunFailed, match=r"worker 0 ended with code 1 .*no_such"):
        run_request(request)
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [command for command in commands if "profiling.worker" in command]


def _executed() -> set[str]:
    """Operator kinds of the decoders that run here, and of what surrounds their layers."""
    kinds = {"linear_wgrad", "accumulate", "copy", "cast", "adamw"}
    options = Options(compute="bf16")
    names = ("tiny-1m", "gpt-3.6b", "nemotron4-15b", "tiny-moe-4m", "tiny-mla-moe-2m")
    for name in names:
        model = load_model(name)
        for graph in (
            decoder_layer(
                model, model.layers[-1], sequence_parallel=True, fused=False, options=options
            ),
            embedding(model, sequence_parallel=True),
            head(model, sequence_parallel=True, fused=False),
        ):
            kinds |= {op.kind for op in graph.operators}
    return kinds - {"edge"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("busy", [1, 2, 4])
@pytest.mark.parametrize("quick", [False, True])
def test_cpu_grid_covers_the_cost_model(dtype: str, busy: int, quick: bool) -> None:
    grid = grids.cpu_grid(dtype, busy, quick)
    assert set(grid) - set(grids.COPY_OPERATORS) <= set(KINDS)
    assert _executed() - (set() if dtype == "fp32" else {"adamw"}) <= set(grid)
    for name, points in grid.items():
        assert len(points) == len(set(points)) > 1, name
        assert all(size >= 1 for point in points for size in point)
    for m, n, k in grid["linear"]:
        assert m <= 8192 and n <= 32768 and k <= 2048
    for rows, width in grid["rmsnorm"]:
        assert rows * width <= 2**22


def test_cuda_grid_covers_the_cost_model() -> None:
    assert _executed() <= set(grids.cuda_grid("fp32"))
    assert max(m for m, _, _ in grids.cuda_grid("bf16")["linear"]) == 32768


def test_merging_takes_means_and_drops_sizes_that_a_rank_skipped() -> None:
    def timing(size: int, forward_s: float) -> Timing:
        return Timing(
            operator="add", dtype="fp32", busy=2, axes=("elements",), size=(size,),
            forward_s=forward_s,
        )  # fmt: skip

    first = Findings(timings=[timing(8, 1.0), timing(64, 5.0)])
    second = Findings(timings=[timing(8, 3.0)])
    (curve,) = merge_operators([first, second])
    assert curve.sizes == ((8.0,),)
    assert curve.forward_s == (2.0,)
    assert curve.backward_s == ()


@pytest.mark.parametrize(
    ("cuda_name", "memory_bytes", "expected"),
    [
        ("NVIDIA H200", 150.1e9, "H200-SXM-141GB"),
        ("NVIDIA H100 80GB HBM3", 85.0e9, "H100-SXM-80GB"),
        ("NVIDIA H100 PCIe", 85.0e9, "H100-PCIe-80GB"),
        ("NVIDIA A100-PCIE-40GB", 42.3e9, "A100-PCIe-40GB"),
        ("NVIDIA GeForce RTX 4090", 25.3e9, "RTX4090-24GB"),
        ("Some New GPU", 99e9, "Some New GPU"),
    ],
)
def test_cuda_names_are_those_of_the_catalog(
    cuda_name: str, memory_bytes: float, expected: str
) -> None:
    environment = {"device": cuda_name, "device_memory_bytes": str(int(memory_bytes))}
    assert device_name("cuda", environment) == expected


def test_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"device=tpu: unknown device; give cpu, cuda or auto"):
        profile_machine(device="tpu")


def test_cuda_without_a_gpu_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match="device=cuda: this machine has no usable CUDA device"):
        profile_machine(device="cuda")


def test_clock_counts_work_and_not_waiting() -> None:
    from forerun.executors.profiling.timing import CpuClock

    waiting = CpuClock().samples(lambda: time.sleep(0.01), 0.03)
    assert max(waiting) < 0.005


def test_ring_frees_the_oldest_output() -> None:
    import weakref

    import torch

    from forerun.executors.profiling.timing import Ring

    first = torch.ones(1)
    watched = weakref.ref(first)
    ring = Ring([first, torch.ones(1)])
    del first
    ring.push(torch.ones(1))
    assert watched() is None
    assert len(ring.outputs) == 2


def test_parent_needs_no_torch() -> None:
    code = "import sys, forerun.executors.profiling as p; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
