"""Pieces of models with other stacks than a decoder, and layouts for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.costmodel import Layouts, bound_layouts, estimate
from forerun.costmodel.graph import Graph, Sizes
from forerun.costmodel.layers.profiles import stack_graph
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.options import Options
from forerun.costmodel.techniques import apply
from forerun.model import Model
from forerun.plan import Plan

from .graphs import forward_flops, layouts_of

PRICED = ("linear", "linear_scores", "conv", "conv_stem", "attention", "attention_full")


def piece(
    model: str | Model, build: str, seq_tokens: int = 512, *, group: int = 0, **degrees: int
) -> tuple[Graph, Sizes]:
    """A piece ("embedding", "layer", "head") in bf16 under one layout, with its local sizes."""
    shape = load_model(model) if isinstance(model, str) else model
    layer = {"embedding": shape.layers[0], "head": shape.layers[-1]}.get(build, shape.layers[group])
    options = Options(compute="bf16")
    sp = bool(degrees.get("sequence_parallel", 0))
    graph = stack_graph(build, shape, layer, sp=sp, fused=True, options=options)
    return apply(graph, options), local_sizes(shape, layer, layouts_of(**degrees), seq_tokens)


def whole(model: str, seq_tokens: int) -> tuple[float, float]:
    """Parameters and forward FLOPs per sample of all graphs of a model."""
    shape = load_model(model)
    counted = [("embedding", 0, 1), ("head", 0, 1)]
    counted += [("layer", index, layer.repeat) for index, layer in enumerate(shape.layers)]
    params = flops = 0.0
    for build, group, repeat in counted:
        graph, sizes = piece(shape, build, seq_tokens, group=group)
        params += repeat * float(graph.num_params(sizes)[0])
        flops += repeat * forward_flops(graph, sizes, PRICED)
    if shape.tied_embeddings:
        params -= shape.vocab * shape.hidden
    return params, flops


@st.composite
def degrees(
    draw: st.DrawFn,
    *,
    tp: tuple[int, ...] = (1, 2),
    pp: tuple[int, ...] = (1, 2, 4),
    sp: bool = False,
) -> dict[str, int | str | bool]:
    """Options of `make_plan` on 16 devices; with `sp` some split their sequences over tp."""
    tp_degree, pp_degree = draw(st.sampled_from(tp)), draw(st.sampled_from(pp))
    dp = 16 // (tp_degree * pp_degree)
    kinds = ["gpipe", "1f1b", "interleaved"] if pp_degree > 1 else ["1f1b"]
    schedule = draw(st.sampled_from(kinds))
    zero = draw(st.sampled_from([0, 1, 2, 3]))
    return {
        "tp": tp_degree,
        "pp": pp_degree,
        "vpp": 2 if schedule == "interleaved" else 1,
        "dp_replicate": 1 if zero else dp,
        "dp_shard": dp if zero else 1,
        "zero": zero,
        "sp": draw(st.booleans()) if sp and tp_degree > 1 else False,
        "schedule": schedule,
        "micro_batch_seqs": draw(st.sampled_from([1, 2])),
        "recompute": draw(st.sampled_from(["none", "selective", "full"])),
    }


def assert_bound_holds(plan: Plan) -> None:
    """The bound of a plan's layout is not above what the simulator says."""
    result, phase = estimate(plan), plan.phase
    options = Options.of(phase, plan.workload)
    bound = bound_layouts(plan.model, plan.cluster, plan.workload, Layouts.of(phase), options)
    assert bound.time_s[0] <= result.step_s.median * (1 + 1e-9)
    assert bound.memory_bytes[0] <= result.peak_memory_bytes.median * (1 + 1e-9)
