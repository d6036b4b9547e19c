"""Linears below 16 bits by shape: the choice is the best of all, and bounds allow for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.cluster import Cluster
from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.by_shape import uses
from forerun.costmodel.layout import Layouts
from forerun.costmodel.linears import named_linears
from forerun.costmodel.operator_times import operator_s
from forerun.costmodel.options import Options
from forerun.costmodel.piece_graphs import graph_and_sizes
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.costmodel.techniques.precision import BY_SHAPE
from forerun.errors import InputError
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages
from forerun.workload import Workload

from .graphs import layouts_of

FREE = Options(compute="fp8", linears=BY_SHAPE)
H100 = load_cluster("8xH100")
CAPTURED = Options(compute="fp8", linears=BY_SHAPE, runtime="graphs")
"""Layers launched as a whole: casts cost next to nothing but their traffic."""
LINEARS = ("wq", "wk", "wv", "wo", "gate", "up", "down")
GROUPS = (("wq", "wk", "wv"), ("wo",), ("gate", "up"), ("down",))


def model_of(hidden: int, ffn: int) -> Model:
    heads = max(1, hidden // 64)
    layer = Layer(repeat=4, heads=heads, kv_heads=heads, head_dim=hidden // heads, ffn_hidden=ffn)
    return Model(name="shape", hidden=hidden, vocab=1024, layers=(layer,))


def layer_s(model: Model, layouts: Layouts, seq: int, options: Options) -> float:
    """Seconds of one micro-batch through one layer, launches of the host left out."""
    prices = Prices(H100.pools[0], None, 8)
    graph, sizes = graph_and_sizes(model, model.layers[0], layouts, seq, prices, options)
    total = 0.0
    for op in graph.operators:
        if op.kind != "edge":
            forward, backward, _ = operator_s(op, sizes, prices, options)
            total += float(forward[0] + backward[0])
    return total


def chosen(model: Model, layouts: Layouts, seq: int, options: Options = FREE) -> tuple[str, ...]:
    """The linears that run in 8 bits."""
    (own,) = named_linears(model, H100, layouts, seq, [options])
    if own.compute == "bf16":
        return ()
    return LINEARS if own.linears is None else own.linears


def free_choice(model: Model, layouts: Layouts, seq: int) -> tuple[str, ...]:
    """The choice that leaves launches out."""
    prices = Prices(H100.pools[0], None, 8)
    graph, sizes = graph_and_sizes(model, model.layers[0], layouts, seq, prices, FREE)
    worth = uses(graph, lambda op: operator_s(op, sizes, prices, FREE))
    return tuple(name for name in LINEARS if worth[name][0])


@settings(max_examples=12)
@given(
    hidden=st.sampled_from([256, 1024, 2048, 4096]),
    ffn=st.sampled_from([512, 4096, 14336]),
    seq=st.sampled_from([128, 1024, 8192]),
    tp=st.sampled_from([1, 4]),
)
def test_no_other_choice_is_faster(hidden: int, ffn: int, seq: int, tp: int) -> None:
    """Against all subsets of every group of linears that read one input: the groups are apart.
    Launches are free here; operators' times are what is compared."""
    model, layouts = model_of(hidden, ffn), layouts_of(tp=tp)
    best = free_choice(model, layouts, seq)
    wide = layer_s(model, layouts, seq, Options(compute="bf16"))
    own = layer_s(model, layouts, seq, replace(FREE, linears=best)) if best else wide
    for group in GROUPS:
        others = [name for name in best if name not in group]
        for count in range(len(group) + 1):
            for some in combinations(group, count):
                linears = tuple(name for name in LINEARS if name in (*others, *some))
                other = wide
                if linears:
                    other = layer_s(model, layouts, seq, replace(FREE, linears=linears))
                assert own <= other * (1 + 1e-9), (best, linears)


@pytest.mark.parametrize("seq", [128, 2048, 16384])
def test_the_price_of_a_free_choice_is_that_of_the_best(seq: int) -> None:
    """Operators alone; the host's launches are counted without casts in the free one."""
    model, layouts = model_of(2048, 8192), layouts_of()
    prices = Prices(H100.pools[0], None, 8)
    own = replace(FREE, linears=free_choice(model, layouts, seq))
    if not own.linears:
        own = Options(compute="bf16")
    free, named = (pieces(model, layouts, seq, prices, o).layers[0] for o in (FREE, own))
    assert float(free.forward_s[0]) == pytest.approx(float(named.forward_s[0]), rel=1e-9)
    assert float(free.backward_s[0]) == pytest.approx(float(named.backward_s[0]), rel=1e-9)
    assert free.host_forward_s[0] <= named.host_forward_s[0] * (1 + 1e-9)
    assert free.live.saved == named.live.saved


def test_small_matmuls_stay_in_16_bits_and_large_ones_do_not() -> None:
    assert chosen(model_of(256, 512), layouts_of(), 128) == ()
    assert chosen(model_of(8192, 28672), layouts_of(), 8192) == LINEARS


def test_launches_count_where_the_host_is_behind() -> None:
    """Few tokens: the layer waits for its launches, unless they are captured."""
    model = load_model("llama-3.1-8b")
    eager, captured = (chosen(model, layouts_of(), 1024, o) for o in (FREE, CAPTURED))
    assert set(eager) < set(captured)


def test_matches_torchaos_inequality() -> None:
    """For one linear alone: `wo`, whose input nobody else reads."""
    model, layouts, seq = load_model("llama-2-7b"), layouts_of(), 4096
    prices = Prices(H100.pools[0], None, 8)
    graph, sizes = graph_and_sizes(model, model.layers[0], layouts, seq, prices, FREE)

    def time_of(op):
        return operator_s(op, sizes, prices, FREE)

    by_name = {op.name: op for op in graph.operators}
    wo = by_name["wo"]
    gain = sum(float(x[0]) for x in time_of(replace(wo, compute=None))[:2]) - sum(
        float(x[0]) for x in time_of(wo)[:2]
    )
    casts = time_of(by_name["o.quantize"]), time_of(by_name["wo.quantize_weight"])
    paid = sum(float(part[0]) for cast in casts for part in cast[:2])
    assert bool(uses(graph, time_of)["wo"][0]) == (gain > paid)


def plan_with(model: Model, cluster: Cluster, options: Options, seq: int) -> Plan:
    mesh = Mesh(dp_shard=cluster.num_devices)
    phase = Phase(
        steps=1, seq_tokens=seq, micro_batch_seqs=1, num_microbatches=2, mesh=mesh, zero=3,
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(
            Setting(layers=(0, model.num_layers - 1), techniques=options.techniques()),
        ),
    )  # fmt: skip
    workload = Workload(seq_tokens=seq, global_batch_seqs=2 * mesh.dp)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


@pytest.mark.parametrize("seq", [256, 2048, 8192])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "llama-3.1-8b"])
def test_bounds_of_a_free_choice_are_below_the_named_plan(name: str, seq: int) -> None:
    model = load_model(name)
    plan = plan_with(model, H100, FREE, seq)
    layouts = Layouts.of(plan.phase)
    bound = bound_layouts(model, H100, plan.workload, layouts, FREE)
    (own,) = named_linears(model, H100, layouts, seq, [FREE])
    found = estimate(plan_with(model, H100, own, seq))
    assert bound.time_s[0] <= found.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= found.peak_memory_bytes.median * (1 + 1e-9)
    assert np.isfinite(bound.time_s).all()


def test_plans_name_their_linears_and_survive_a_round_trip() -> None:
    options = Options(compute="fp8", recipe="coat", linears=("gate", "up"))
    plan = plan_with(model_of(1024, 4096), H100, options, 1024)
    precision = plan.phase.technique("precision")
    assert precision == {"compute": "fp8", "recipe": "coat", "linears": ["gate", "up"]}
    assert Options.of(plan.phase) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(compute="fp8", linears=("gates",)),
            "^precision.linears=gates:.*did you mean gate",
        ),
        (Options(compute="bf16", linears=("gate",)), "^precision.linears=gate: all matmuls run in"),
    ],
)
def test_linears_that_make_no_sense_are_refused(options: Options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(plan_with(model_of(1024, 4096), H100, options, 1024))
