"""Graphs of traced operators, against numbers worked out by hand for a two-operator module."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from forerun.catalogs import load_cluster
from forerun.costmodel import estimate, traced
from forerun.costmodel.layout import Layouts
from forerun.costmodel.liveness import liveness
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.traced import Traced, TracedOperator, TracedTensor, TracedWeight, TracedWork
from forerun.workload import Workload

ROWS, WIDTH, BATCH, FP32 = 10, 8, 4, 4
X = TracedTensor(name="x", elements=(0, ROWS * WIDTH), dtype="compute")
Y = TracedTensor(name="y", elements=(0, ROWS * WIDTH), dtype="compute")
Z = TracedTensor(name="z", elements=(0, ROWS * WIDTH), dtype="compute")
MASK = TracedTensor(name="mask", elements=(16, 0), dtype="int8")
MATMUL = TracedOperator(
    name="0.mm", module="fc", kind="linear", sizes=((0, ROWS), (WIDTH, 0), (WIDTH, 0)),
    inputs=(X,), outputs=(Y,), saves=(X,),
    weights=(TracedWeight(name="fc.weight", elements=WIDTH * WIDTH),),
)  # fmt: skip
MASKED = TracedOperator(
    name="1.mul", module="", kind="copy", sizes=((8, ROWS * WIDTH),), inputs=(Y,), outputs=(Z,),
    saves=(MASK,), backward=(TracedWork(kind="copy", sizes=((8, ROWS * WIDTH),)),),
)  # fmt: skip
BLOCK = (MATMUL, MASKED)
MODEL = Model(
    name="mine", hidden=1, vocab=1, positions="none",
    layers=(Layer(kind="traced", repeat=3, heads=1, kv_heads=1, head_dim=1, ffn_hidden=1,
                  operators=BLOCK),),
    traced=Traced(target="mine:build", tokens=False, seq_tokens=ROWS, prefix=(), suffix=(),
                  blocks=("0", "1", "2"), flops_per_sample=3 * 6 * ROWS * WIDTH**2),
)  # fmt: skip


def make_plan(recompute: str = "none", gpus: str = "2xcpu", zero: int = 0, **degrees: int) -> Plan:
    cluster = load_cluster(gpus)
    mesh = Mesh(**degrees)
    phase = Phase(
        steps=1,
        seq_tokens=ROWS,
        micro_batch_seqs=BATCH,
        num_microbatches=1,
        mesh=mesh,
        zero=zero,  # pyright: ignore[reportArgumentType]
        stages=even_stages(3, 1, cluster.pools[0].name),
        settings=(Setting(layers=(0, 2), techniques=techniques("fp32", recompute)),),
    )
    workload = Workload(seq_tokens=ROWS, global_batch_seqs=BATCH * mesh.dp)
    return Plan(model=MODEL, cluster=cluster, workload=workload, phases=(phase,))


def graph_and_sizes(recompute: str = "none", compute: str = "fp32") -> tuple[Any, Any]:
    graph = apply(traced.graph("layer", BLOCK), Options(compute=compute, recompute=recompute))
    return graph, traced.sizes(BLOCK, Layouts.of(make_plan(dp_replicate=2).phase))


def test_flops_saved_bytes_and_parameters_by_hand() -> None:
    graph, sizes = graph_and_sizes()
    forward, backward = traced.flops(BLOCK, sizes)
    assert forward[0] == 2 * BATCH * ROWS * WIDTH**2
    assert backward[0] == 2 * forward[0], "the gradients of input and weight"
    assert liveness(graph, sizes).saved[0] == BATCH * ROWS * WIDTH * FP32 + 16
    assert graph.num_params(sizes)[0] == WIDTH**2
    assert MODEL.num_params == 3 * WIDTH**2
    assert MODEL.flops_per_token(ROWS) * ROWS * BATCH == 3 * (forward + backward)[0]


def test_precision_and_recompute_are_the_same_rewrites_as_everywhere() -> None:
    graph, sizes = graph_and_sizes(compute="bf16")
    assert liveness(graph, sizes).saved[0] == BATCH * ROWS * WIDTH * 2 + 16, "masks stay bytes"
    graph, sizes = graph_and_sizes("full")
    assert liveness(graph, sizes).saved[0] == BATCH * ROWS * WIDTH * FP32, "the input alone"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_states_and_traffic_are_those_of_any_model(zero: int) -> None:
    shards = 2 if zero else 1
    got = estimate(make_plan(zero=zero, dp_shard=shards, dp_replicate=2 // shards))
    states = 3 * WIDTH**2 * FP32
    assert got.memory_terms_bytes["parameters"] == states / shards
    assert got.memory_terms_bytes["optimizer"] == 2 * states / shards
    if zero == 0:
        assert got.bytes_on_wire == {"all_reduce@dp": states}
    else:
        assert got.bytes_on_wire["reduce_scatter@dp"] == states


def test_full_recompute_takes_time_and_saves_memory() -> None:
    kept, again = (estimate(make_plan(mode, dp_replicate=2)) for mode in ("none", "full"))
    assert kept.time_terms_s["recompute"] == 0 < again.time_terms_s["recompute"]
    assert again.memory_terms_bytes["activations"] < kept.memory_terms_bytes["activations"]


def test_backward_works_are_priced() -> None:
    """Twice the recorded work, more backward time; nothing else moves."""
    twice = msgspec.structs.replace(MASKED, backward=MASKED.backward * 2)
    layer = msgspec.structs.replace(MODEL.layers[0], operators=(MATMUL, twice))
    plan = make_plan(dp_replicate=2)
    more = msgspec.structs.replace(plan, model=msgspec.structs.replace(MODEL, layers=(layer,)))
    before, after = estimate(plan).time_terms_s, estimate(more).time_terms_s
    assert after["backward"] > before["backward"]
    assert after["forward"] == pytest.approx(before["forward"])


def test_an_empty_part_costs_nothing() -> None:
    graph = apply(traced.graph("embedding", ()), Options(compute="fp32"))
    sizes = traced.sizes((), Layouts.of(make_plan(dp_replicate=2).phase))
    live = liveness(graph, sizes)
    assert np.all(live.saved == 0) and np.all(live.backward_peak == 0)
