"""Layers that keep some of their tensors: priced as the solver says, chosen by the search, written
in plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster, load_model
from forerun.choices import TENSORS
from forerun.costmodel import bound_layouts, estimate
from forerun.costmodel.layer_tensors import layer_tensors
from forerun.costmodel.layout import Layouts
from forerun.costmodel.options import Options
from forerun.costmodel.pieces import Piece
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.document import from_json, to_json
from forerun.errors import InputError
from forerun.plan import Plan
from forerun.planner import Pins, search
from forerun.planner.activations import Setting, layer_types
from forerun.planner.activations.policies import policies
from forerun.planner.activations.portfolio import keep_sets
from forerun.planner.activations.problem import Limits
from forerun.planner.activations.relax import lower_hull
from forerun.planner.grid_plans import plan_at
from forerun.planner.space import enumerate_grid
from forerun.workload import Workload

BF16 = Options(compute="bf16")
CLUSTER = load_cluster("8xH100")
WORK = Workload(seq_tokens=4096, global_batch_seqs=32)


@pytest.fixture(autouse=True)
def no_user_profile(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FORERUN_DATA", str(tmp_path))


def layout(tp: int = 1, mbs: int = 1) -> Layouts:
    """One row of a node of eight."""
    columns = {
        "micro_batch_seqs": mbs, "num_microbatches": 8, "dp_replicate": 1, "dp_shard": 8 // tp,
        "tp": tp, "pp": 1, "vpp": 1, "zero": 1, "sequence_parallel": int(tp > 1), "schedule": 1,
        "cp": 1, "ulysses": 1, "ep": 1,
    }  # fmt: skip
    return Layouts(**{name: np.array([value]) for name, value in columns.items()})


def busy_s(piece: Piece) -> float:
    """Seconds of a micro-batch through a layer."""
    parts = [
        piece.forward_s, piece.backward_s, piece.recompute_s, piece.host_forward_s,
        piece.host_backward_s, *piece.comm_forward_s.values(), *piece.comm_backward_s.values(),
    ]  # fmt: skip
    return float(sum(part.sum() for part in parts))


@pytest.mark.parametrize(
    ("name", "tp"), [("llama-3.1-8b", 1), ("gpt3-175b", 8), ("mixtral-8x7b", 1)]
)
def test_the_price_of_a_set_is_that_of_the_solver(name: str, tp: int) -> None:
    """Bytes exactly; seconds but for how they overlap with the host and with communication."""
    model, layouts = load_model(name), layout(tp)
    prices = Prices(CLUSTER.pools[0], None, 8)
    setting = Setting(model=model, layouts=layouts, seq_tokens=4096, prices=prices, options=BF16)
    whole = pieces(model, layouts, 4096, prices, BF16).layers[0]
    (layer,) = layer_types(setting, [model.num_layers])
    found = policies(layer, Limits(device_bytes=float("inf")))
    seconds = found.backward_s + found.forward_s
    for index in lower_hull(found.stored_bytes, seconds):
        keep = tuple(
            tensor.name
            for tensor, code in zip(layer.tensors, found.codes[index], strict=True)
            if code == 1
        )
        options = replace(BF16, recompute=TENSORS, keep=keep)
        piece = pieces(model, layouts, 4096, prices, options).layers[0]
        assert float(piece.live.saved[0]) == pytest.approx(float(found.stored_bytes[index]))
        extra_s = busy_s(piece) - busy_s(whole)
        assert extra_s == pytest.approx(seconds[index], abs=5e-3 * busy_s(whole))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v3"])
def test_the_ends_are_no_recompute_and_full_recompute(name: str) -> None:
    model, layouts, prices = load_model(name), layout(), Prices(CLUSTER.pools[0], None, 8)

    def priced(**settings) -> tuple[Piece, ...]:
        options = replace(BF16, **settings)
        return pieces(model, layouts, 4096, prices, options).layers

    names = {
        name
        for group in range(len(model.layers))
        for name in layer_tensors(model, group, BF16, CLUSTER.pools[0], sequence_parallel=False)
    }
    for all_of_it, none in zip(
        priced(recompute=TENSORS, keep=tuple(sorted(names))), priced(), strict=True
    ):
        assert all_of_it.recompute_s.sum() == 0.0
        assert busy_s(all_of_it) == pytest.approx(busy_s(none))
        assert all_of_it.live.saved[0] >= none.live.saved[0]
    for nothing, full in zip(priced(recompute=TENSORS), priced(recompute="full"), strict=True):
        assert nothing.live.saved[0] == full.live.saved[0] == full.boundary_bytes[0]
        assert nothing.recompute_s[0] <= full.recompute_s[0]  # not what no backward needs


SMALL = load_model("llama-3.1-8b")
SMALL = msgspec.structs.replace(SMALL, layers=(msgspec.structs.replace(SMALL.layers[0], repeat=4),))
NAMES = layer_tensors(SMALL, 0, BF16, CLUSTER.pools[0], sequence_parallel=False)
GRID = enumerate_grid(SMALL, CLUSTER, WORK, Pins(zero=1, cp=1))


@settings(max_examples=8)
@given(
    sets=st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=2),
    which=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_bounds_hold_for_whatever_layers_keep(
    sets: list[set[str]], which: list[int], seed: int
) -> None:
    kept = [
        BF16, replace(BF16, recompute="full"),
        *(replace(BF16, recompute=TENSORS, keep=tuple(sorted(names))) for names in sets),
    ]  # fmt: skip
    rows = np.random.default_rng(seed).integers(0, len(GRID), 4)
    grid = GRID.take(rows)
    capacity = 0.4 * CLUSTER.pools[0].device.memory_bytes
    bounds = bound_layouts(SMALL, CLUSTER, WORK, grid, kept, capacity, np.inf, "even")
    for row in range(len(grid)):
        layers = [kept[k % len(kept)] for k in which]
        cost = estimate(plan_at(SMALL, CLUSTER, WORK, grid, row, layers))
        peak = cost.peak_memory_bytes.median
        assert bounds.memory_bytes[row] <= peak * (1 + 1e-9)
        if peak <= capacity:
            assert bounds.time_s[row] <= cost.step_s.median * (1 + 1e-9)


def test_few_sets_serve_all_prices_of_memory() -> None:
    """What layers keep out of the portfolio costs little more than out of the whole frontier."""
    model = load_model("llama-3.1-8b")
    prices = Prices(CLUSTER.pools[0], None, 8)
    setting = Setting(model=model, layouts=layout(), seq_tokens=4096, prices=prices, options=BF16)
    (layer,) = layer_types(setting, [32])
    sets = keep_sets([[layer]], 5)
    found = policies(layer, Limits(device_bytes=float("inf")))
    seconds = found.backward_s + found.forward_s
    points = [(float(np.max(found.stored_bytes)), 0.0)]
    for keep in (*sets, ()):
        piece = pieces(
            model, layout(), 4096, prices, replace(BF16, recompute=TENSORS, keep=keep)
        ).layers[0]
        points.append((float(piece.live.saved[0]), float(piece.recompute_s[0])))
    hull = [int(i) for i in lower_hull(found.stored_bytes, seconds)]
    for a, b in itertools.pairwise(hull):
        price = (seconds[b] - seconds[a]) / (found.stored_bytes[a] - found.stored_bytes[b])
        best = float(np.min(seconds + price * found.stored_bytes))
        assert min(s + price * stored for stored, s in points) <= 1.02 * best + 1e-5


def test_search_keeps_tensors_where_memory_is_short() -> None:
    """It gains over whole layers, its plans say what to keep, and say so again when read."""
    model = load_model("llama-3.1-8b")
    work = Workload(seq_tokens=8192, global_batch_seqs=64)
    pins = Pins(tp=1, cp=1, pp=1, zero=2, micro_batch=1)
    best = search(model, CLUSTER, work, pins, keep=1).plans[0]
    full = msgspec.structs.replace(pins, recompute="full")
    whole = search(model, CLUSTER, work, full, keep=1).plans[0]
    assert best.estimate.step_s.median < 0.97 * whole.estimate.step_s.median
    recompute = [s.techniques.get("recompute", {}) for s in best.plan.phase.settings]
    assert any(r.get("mode") == TENSORS for r in recompute)
    again = from_json(Plan, to_json(best.plan), "plan")
    assert to_json(again) == to_json(best.plan)
    assert again.label == best.label


def plan_keeping(recompute: dict[str, object]) -> Plan:
    plan = plan_at(SMALL, CLUSTER, WORK, GRID, 0, [BF16])
    setting = plan.phase.settings[0]
    setting = msgspec.structs.replace(
        setting, techniques={**setting.techniques, "recompute": recompute}
    )
    phase = msgspec.structs.replace(plan.phase, settings=(setting,))
    return msgspec.structs.replace(plan, phases=(phase,))


@pytest.mark.parametrize(
    ("recompute", "message"),
    [
        ({"mode": "tensors"}, "recompute.keep=None: not a list of tensors' names"),
        ({"mode": "tensors", "keep": ["qq"]}, "recompute.keep=qq: unknown name; did you mean q"),
        ({"mode": "full", "keep": ["q"]}, "mode full names no tensors; use mode tensors"),
        ({"mode": "some"}, "recompute=some: unknown mode"),
    ],
)
def test_names_that_layers_do_not_have_are_refused(
    recompute: dict[str, object], message: str
) -> None:
    plan = plan_keeping(recompute)
    with pytest.raises(InputError) as refused:
        plan.check()
        estimate(plan)
    assert message in str(refused.value)
