"""Hardware and stacks: complete, sourced, and physically plausible."""

from __future__ import annotations

import pytest

from forerun.catalogs import entries, load_hardware, load_stack, names
from forerun.cluster import DTYPE_BYTES

GPUS = [name for name in names("hardware") if name != "cpu"]


@pytest.mark.parametrize("name", names("hardware"))
def test_every_document(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == hardware.device.name == name
    assert hardware.source and hardware.device.source
    for link in (hardware.intra_node, hardware.inter_node, hardware.host):
        assert link is None or (link.source and link.latency_s > 0 and link.bytes_per_s > 0)
    stack = load_stack(hardware.stack, hardware.family)
    assert set(hardware.device.peak_flops_per_s) <= set(stack.gemm_efficiency)


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_plausible(name: str) -> None:
    hardware = load_hardware(name)
    device, peak = hardware.device, hardware.device.peak_flops_per_s
    assert 10 < peak["fp32"] / 1e12 < 200
    assert peak["fp16"] == peak.get("bf16", peak["fp16"])
    assert peak.get("fp8", 2 * peak["fp16"]) == pytest.approx(2 * peak["fp16"], rel=0.02)
    assert 0.7e12 < device.memory_bytes_per_s < 9e12
    assert 16 <= device.memory_bytes / 2**30 <= 288
    assert hardware.inter_node is not None and hardware.host is not None
    assert hardware.intra_node.bytes_per_s >= hardware.inter_node.bytes_per_s
    assert hardware.devices_per_domain >= hardware.devices_per_node


def test_denominators_of_mfu() -> None:
    """Dense bf16 peaks that published tables divide by."""
    for name, tera in (("A100", 312), ("A800", 312), ("H100", 989.4), ("H200", 989.4)):
        assert load_hardware(name).device.peak_flops_per_s["bf16"] == tera * 1e12


def test_rack_domains() -> None:
    for name in ("GB200", "GB300"):
        hardware = load_hardware(name)
        assert (hardware.devices_per_node, hardware.devices_per_domain) == (4, 72)


def test_cpu_has_the_memory_of_this_machine() -> None:
    psutil = pytest.importorskip("psutil")
    memory = load_hardware("cpu").device.memory_bytes
    assert 0 < memory <= psutil.virtual_memory().total


@pytest.mark.parametrize("stack", entries("stacks"), ids=names("stacks"))
def test_stacks_are_fractions(stack: dict[str, float]) -> None:
    for field, value in stack.items():
        if field.endswith("_efficiency") and isinstance(value, float):
            assert 0 < value <= 1, field
    gemm = stack["gemm_efficiency"]
    assert isinstance(gemm, dict)
    assert set(gemm) <= set(DTYPE_BYTES)
    assert all(0 < fraction <= 1 for fraction in gemm.values())
    assert stack["source"]


def test_gloo_does_not_overlap() -> None:
    assert not load_stack("gloo-cpu").can_overlap


def test_stacks_follow_the_device_family() -> None:
    assert load_stack("pytorch-fsdp", "h100").name == "pytorch-fsdp-h100"
    assert load_stack("pytorch", "a100").name == "pytorch-fsdp-a100"
    assert load_stack("pytorch-fsdp", "v100").name == "pytorch-fsdp"
    assert load_stack("megatron", "h100").name == "megatron-h100"
