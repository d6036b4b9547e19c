"""Vision transformers, image-text towers and diffusion transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from forerun.catalogs import load_model
from forerun.costmodel import estimate
from forerun.costmodel.liveness import liveness
from forerun.errors import InputError
from forerun.plan import Plan
from forerun.vision import Patches

from .graphs import forward_flops
from .stacks import assert_bound_holds, degrees, piece, whole

MakePlan = Callable[..., Plan]

MULTIPLY_ADDS = {  # 1e9 per sample, forward, as published
    "vit-b-16": 17.56,  # torchvision's table of weights
    "vit-l-16": 61.55,
    "vit-h-14": 167.29,
    "dit-b-2": 23.01,  # arXiv 2212.09748, table 4 ("Gflops")
    "dit-l-2": 80.71,
    "dit-xl-2": 118.64,
}


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_published_multiply_adds(name: str) -> None:
    """Forward and backward are three times the forward, a multiply-add two FLOPs."""
    flops = load_model(name).flops_per_sample(1)
    assert flops / 6 == pytest.approx(MULTIPLY_ADDS[name] * 1e9, rel=0.001)


@pytest.mark.parametrize("name", ["vit-l-16", "vit-h-14", "clip-vit-l-14", "dit-xl-2"])
def test_graphs_agree_with_the_model(name: str) -> None:
    """All but the product that compares samples (one with itself here)."""
    model = load_model(name)
    params, flops = whole(name, 512)
    assert params == model.num_params
    assert flops == pytest.approx(model.flops_per_sample(512) / 3, abs=2 * model.projection)


def test_saved_bytes_of_a_vit_layer() -> None:
    """Per token, 16-bit: 16 h + 4 f; fp32: 4 a and 16 of two norms' means and deviations."""
    graph, sizes = piece("vit-l-16", "layer", micro_batch_seqs=3)
    saved = float(liveness(graph, sizes).saved[0])
    assert saved == 3 * 197 * (16 * 1024 + 4 * 4096 + 4 * 16 + 16)


def test_saved_bytes_of_a_dit_layer() -> None:
    """Beside a plain layer's: both normed inputs and both branches, and 16 h per sample."""
    h, f = 1152, 4608
    graph, sizes = piece("dit-xl-2", "layer")
    plain = 16 * h + 4 * f + 4 * 16 + 16
    assert float(liveness(graph, sizes).saved[0]) == 256 * (plain + 8 * h) + 16 * h


def test_modulation_works_once_per_sample() -> None:
    graph, sizes = piece("dit-xl-2", "layer", micro_batch_seqs=2)
    linear = next(op for op in graph.operators if op.name == "modulation")
    only = dataclasses.replace(graph, operators=(linear,))
    assert forward_flops(only, sizes, ("linear",)) == 2 * 2 * 6 * 1152**2


def test_the_workload_s_length_changes_nothing(make_plan: MakePlan) -> None:
    """Images have their own number of tokens."""
    results = [
        estimate(make_plan("vit-l-16", seq_tokens=n, global_batch_seqs=64, dp_replicate=8))
        for n in (1, 197, 8192)
    ]
    assert len({result.step_s.median for result in results}) == 1
    assert results[0].mfu == pytest.approx(results[2].mfu)
    assert results[0].peak_memory_bytes == results[2].peak_memory_bytes


@given(
    options=degrees(tp=(1, 2, 4)), model=st.sampled_from(["vit-l-16", "clip-vit-l-14", "dit-l-2"])
)
@settings(max_examples=12)
def test_bound_never_exceeds_the_simulator(
    make_plan: MakePlan, options: dict[str, Any], model: str
) -> None:
    plan = make_plan(model, "2x8xA100", seq_tokens=77, global_batch_seqs=128, **options)
    assert_bound_holds(plan)


def test_patches_must_divide_the_image() -> None:
    with pytest.raises(InputError, match=r"patches\.patch"):
        Patches(size=224, patch=15)


def test_modulation_needs_a_vector() -> None:
    with pytest.raises(InputError, match="no conditioning vector"):
        replace(load_model("dit-xl-2"), conditioning=None)
