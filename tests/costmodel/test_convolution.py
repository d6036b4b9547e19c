"""Convolution blocks: GEMMs over pixels, kept bytes by hand, and what cannot divide them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from forerun.catalogs import load_model
from forerun.costmodel.graph import volume
from forerun.costmodel.liveness import liveness
from forerun.costmodel.operators import KINDS
from forerun.errors import InputError
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.plan import Plan
from forerun.planner import Pins
from forerun.planner.space import enumerate_grid
from forerun.vision import ConvBlock, Convolution

from .stacks import assert_bound_holds, degrees, piece, whole

MakePlan = Callable[..., Plan]

MULTIPLY_ADDS = {"resnet-50": 4.09, "resnet-101": 7.80, "resnet-152": 11.51}
"""1e9 per image, forward: torchvision's table of weights."""


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_published_multiply_adds(name: str) -> None:
    flops = load_model(name).flops_per_sample(1)
    assert flops / 6 == pytest.approx(MULTIPLY_ADDS[name] * 1e9, rel=0.001)


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_graphs_agree_with_the_model(name: str) -> None:
    model = load_model(name)
    params, flops = whole(name, 1)
    assert params == model.num_params
    assert 3 * flops == pytest.approx(model.flops_per_sample(1))


def test_saved_bytes_of_a_bottleneck() -> None:
    """Second block of the first stage, 56 x 56, 256 -> 64 -> 64 -> 256 channels, 16-bit.

    The input, each convolution's output, the two ReLUs' outputs inside; fp32 mean and deviation of
    each norm. The block's output is kept as the next one's input.
    """
    graph, sizes = piece("resnet-50", "layer", group=2, micro_batch_seqs=5)
    features = 5 * 56**2 * 2 * (256 + 64 + 64 + 256 + 64 + 64)
    assert float(liveness(graph, sizes).saved[0]) == features + 8 * (64 + 64 + 256)


def test_the_stem_reads_the_image_once_and_has_no_input_gradient() -> None:
    graph, sizes = piece("resnet-50", "layer", micro_batch_seqs=2)
    stem = graph.operators[0]
    kind, shape = KINDS[stem.kind], [volume(axes, sizes) for axes in stem.price_axes]
    assert kind.forward_flops(shape)[0] == kind.backward_flops(shape)[0]
    image, out, weights = 2 * 224**2 * 3, 2 * 112**2 * 64, 64 * 3 * 49
    assert kind.forward_bytes(shape, 2)[0] == 2 * (image + out + weights)


def test_tensor_parallelism_is_refused_in_one_line() -> None:
    problems = layout_problems(
        load_model("resnet-50"), Mesh(tp=2), seq_tokens=1, zero=0, sequence_parallel=False,
        schedule="1f1b", num_microbatches=1,
    )  # fmt: skip
    (problem,) = problems
    assert "convolutions" in str(problem)
    assert "\n" not in str(problem)


def test_the_search_leaves_tensor_parallelism_out(make_plan: MakePlan) -> None:
    plan = make_plan("resnet-50", seq_tokens=1, dp_replicate=8)
    grid = enumerate_grid(plan.model, plan.cluster, plan.workload, Pins())
    assert len(grid) > 0
    assert set(grid.tp.tolist()) == {1}


@given(options=degrees(tp=(1,), pp=(1, 2)))
@settings(max_examples=10)
def test_bound_never_exceeds_the_simulator(make_plan: MakePlan, options: dict[str, Any]) -> None:
    plan = make_plan("resnet-50", "2x8xA100", seq_tokens=1, global_batch_seqs=128, **options)
    assert_bound_holds(plan)


POINT = Convolution(in_channels=8, out_channels=16, kernel=1)


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"path": ()}, "conv.path"),
        ({"path": (POINT, POINT)}, "conv.path.in_channels"),
        ({"path": (POINT,), "residual": True}, "conv.shortcut"),
    ],
)
def test_impossible_blocks_are_refused(block: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        ConvBlock(size=8, **block)


def test_depthwise_convolutions_have_one_channel_per_group() -> None:
    depthwise = Convolution(in_channels=32, out_channels=32, kernel=3, groups=32)
    assert depthwise.num_params == 32 * (9 + 2)
    assert depthwise.forward_flops(14) == 2 * 14**2 * 32 * 9


def test_a_layer_is_a_convolution_in_name_and_sizes() -> None:
    model = load_model("resnet-50")
    with pytest.raises(InputError, match=r"layers\.conv"):
        replace(model, layers=(replace(model.layers[0], kind="encoder"),))
