"""Saved tensors of real layers: the ledger of the cost model, and what is known to be best."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from forerun.catalogs import load_model, resolve_gpus
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import Layouts, local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.options import Options
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.costmodel.techniques import apply, offload
from forerun.mesh import Mesh
from forerun.planner.activations import LayerType, Limits, Problem, first_stage, solve
from forerun.planner.activations.stage import _layout

UNFUSED = {"model": "gpt-22b", "seq": 2048, "attention": "unfused"}


@cache
def stage(
    model: str, seq: int, tp: int = 1, sp: bool = False, attention: str = "flash"
) -> tuple[LayerType, ...]:
    cluster = resolve_gpus("8xA100-80GB").cluster
    mesh = Mesh(tp=tp, dp_replicate=8 // tp)
    return first_stage(
        load_model(model), cluster, mesh, seq_tokens=seq, sequence_parallel=sp, attention=attention
    )


def costs(model: str, seq: int, tp: int, sp: bool, options: Options):
    pool = resolve_gpus("8xA100-80GB").cluster.pools[0]
    layouts: Layouts = _layout(Mesh(tp=tp, dp_replicate=8 // tp), 1, sp)
    return pieces(load_model(model), layouts, seq, Prices(pool, None, 8), options)


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (4, True)])
@pytest.mark.parametrize("mode", ["none", "selective", "elementwise", "full"])
@pytest.mark.parametrize(("model", "attention"), [("llama-2-7b", "flash"), ("gpt-22b", "unfused")])
def test_at_least_as_good_as_every_recompute_mode(
    model: str, attention: str, mode: str, tp: int, sp: bool
) -> None:
    """With the bytes of a mode of the cost model the choice adds no more seconds."""
    options = Options(compute="bf16", recompute=mode, attention=attention)
    piece = costs(model, 2048, tp, sp, options).layers[0]
    layers = stage(model, 2048, tp, sp, attention)
    num = layers[0].count
    if mode == "none":
        assert layers[0].needed_bytes == pytest.approx(float(piece.live.saved[0]))
    limits = Limits(device_bytes=num * float(piece.live.saved[0]) * (1 + 1e-9))
    found = solve(Problem(layers=layers, limits=limits))
    again = float(piece.recompute_s[0])
    if tp > 1:  # collectives that run again
        plain = costs(model, 2048, tp, sp, replace(options, recompute="none")).layers[0]
        again += float(piece.comm_backward_s["tp"][0] - plain.comm_backward_s["tp"][0])
    assert found.extra_s <= num * again * (1 + 1e-3) + 1e-12


def core_bytes() -> float:
    """Scores, 5 a s^2 b bytes, and the core's output, 2 s b h: what its second run brings back."""
    model = load_model("gpt-22b")
    return 5.0 * model.layers[0].heads * 2048**2 + 2.0 * 2048 * model.hidden


CHEAP = {"attention_norm", "mlp_norm", "gelu"}
"""Their outputs cost 2 bytes of traffic for each byte that is not kept, the core's 2.6."""


def without_links(names: Iterable[str]) -> set[str]:
    """Operators that run again, without the collectives between them."""
    return {name for name in names if not name.endswith(".enter")}


def test_selective_recompute_of_megatron() -> None:
    """Korthikanti et al. 2022, section 5: attention's core is dropped, no linear layer runs again.

    A limit below 34 s b h + 5 a s^2 b bytes per layer by what the core makes; norms and GELU, which
    are a little cheaper, go with the cores, in fewer seconds than those of all cores alone.
    """
    layers = stage(**UNFUSED)
    limits = Limits(device_bytes=layers[0].count * (layers[0].needed_bytes - core_bytes()))
    found = solve(Problem(layers=layers, limits=limits), gap=0.0)
    again = [without_links(use.runs_again) for use in found.policies]
    assert set().union(*again) == CHEAP | {"attention_core"}
    cores = sum(use.layers for use in found.policies if "attention_core" in use.runs_again)
    assert cores > layers[0].count / 2
    options = Options(compute="bf16", recompute="selective", attention="unfused")
    whole = float(costs("gpt-22b", 2048, 1, False, options).layers[0].recompute_s[0])
    assert found.extra_s < layers[0].count * whole


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_less_than_all_cores_are_the_first_to_go(part: float) -> None:
    """Once norms and GELU have gone, as many cores as the limit asks for."""
    layers = stage(**UNFUSED)
    count = layers[0].count
    cheap = sum(2.0 * 2048 * width for width in norms_and_gelu())
    limits = Limits(device_bytes=count * (layers[0].needed_bytes - cheap - part * core_bytes()))
    found = solve(Problem(layers=layers, limits=limits), gap=0.0)
    cores = sum(use.layers for use in found.policies if "attention_core" in use.runs_again)
    assert count * part - 1 <= cores <= count * part + 1
    assert all(
        without_links(use.runs_again) <= CHEAP | {"attention_core"} for use in found.policies
    )


def norms_and_gelu() -> tuple[int, ...]:
    """Elements per token of what norms and GELU make."""
    model = load_model("gpt-22b")
    return model.hidden, model.hidden, 4 * model.hidden


def test_memo_at_long_sequences() -> None:
    """At 512K tokens attention is too dear to run again: its output and the input go to the host.

    MEMO (arXiv 2407.12117): over 90 % of the forward is attention, everything can be moved behind
    it, and nothing has to be made again.
    """
    layers = stage("llama-2-7b", 512 * 1024, 8, True)
    limits = Limits(device_bytes=0.0, copy_bytes_per_s=20e9)
    found = solve(Problem(layers=layers, limits=limits))
    for use in found.policies:
        assert "attention_core" not in use.runs_again
        kinds = {t.name: t.choice for t in use.tensors}
        assert kinds["x"] == kinds["o"] == "offload"
    slow = solve(Problem(layers=layers, limits=replace(limits, copy_bytes_per_s=2e9)))
    fast_host = found.host_bytes / found.keep_all_bytes
    assert slow.host_bytes / slow.keep_all_bytes < fast_host
    assert all("attention_core" not in use.runs_again for use in slow.policies)


def test_eight_bits_halve_what_they_may_store() -> None:
    layers = stage("llama-2-7b", 8192)
    keep = Problem(layers=layers, limits=Limits(device_bytes=0.0)).keep_all_bytes
    wide = Problem(layers=layers, limits=Limits(device_bytes=0.5 * keep))
    small = replace(wide, limits=replace(wide.limits, compress=True))
    assert solve(small).extra_s <= solve(wide).extra_s
    compressed = {
        t.name: t.stored_bytes / t.bytes
        for use in solve(small).policies for t in use.tensors if t.choice == "compress"
    }  # fmt: skip
    assert not {"q", "k", "v", "o"} & set(compressed)  # attention's tensors stay in 16 bits
    assert all(0.5 <= share <= 0.5626 for share in compressed.values())


def test_the_same_problem_gives_the_same_document() -> None:
    layers = stage("llama-2-7b", 8192)
    limits = Limits(device_bytes=15e9, copy_bytes_per_s=2e10, compress=True)
    documents = [solve(Problem(layers=layers, limits=limits)).document(0.0) for _ in range(2)]
    assert json.dumps(documents[0]) == json.dumps(documents[1])


@pytest.mark.parametrize(("model", "seq"), [("mixtral-8x7b", 4096), ("t5-base", 512)])
def test_other_layers_are_covered(model: str, seq: int) -> None:
    layers = stage(model, seq)
    keep = Problem(layers=layers, limits=Limits(device_bytes=0.0)).keep_all_bytes
    found = solve(Problem(layers=layers, limits=Limits(device_bytes=0.5 * keep)), time_limit_s=20)
    assert found.device_bytes <= 0.5 * keep
    assert 0 < found.extra_s <= found.recompute_all_s
    assert np.isfinite(found.gap)


def test_a_policy_is_a_plans_settings() -> None:
    """What the solver stores on device and host is what the graph under its settings saves."""
    model, layers = load_model("llama-2-7b"), stage("llama-2-7b", 8192, tp=8)
    sizes = local_sizes(model, model.layers[0], _layout(Mesh(tp=8), 1, False), 8192)
    keep_all = Problem(layers=layers, limits=Limits(device_bytes=float("inf"))).keep_all_bytes
    seen: set[str] = set()
    for share, rate in ((0.75, 0.0), (0.4, 0.0), (0.2, 0.0), (0.5, 2e10), (0.1, 2e10)):
        limits = Limits(device_bytes=share * keep_all, copy_bytes_per_s=rate)
        for use in solve(Problem(layers=layers, limits=limits)).policies:
            chosen = use.techniques()
            options = replace(
                Options(compute="bf16"),
                recompute=chosen.get("recompute", {}).get("mode", "none"),
                keep=tuple(chosen.get("recompute", {}).get("keep", ())),
                offload=chosen.get("offload", {}).get("activations", 0.0),
            )
            plain = decoder_layer(
                model, model.layers[0], sequence_parallel=False, fused=True, options=options
            )
            graph = apply(plain, options)
            live = liveness(graph, sizes)
            parted = offload.part(graph, sizes, live, options)
            stored = use.device_bytes + use.host_bytes
            assert float(live.saved[0]) == pytest.approx(stored, rel=1e-9)
            assert float(parted.moved[0]) == pytest.approx(use.host_bytes, abs=8)
            again = {op.name for op in graph.operators if op.recomputed}
            assert again == set(use.runs_again)
            seen |= set(chosen)
    assert seen == {"recompute", "offload"}
