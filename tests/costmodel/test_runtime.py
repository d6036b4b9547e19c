"""How the host launches a layer: compiled layers keep less, and a GPU hides what it can."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from forerun.catalogs import load_cluster, load_model
from forerun.cluster import OperatorCurve, Profile
from forerun.costmodel.layers import decoder_layer
from forerun.costmodel.layout import local_sizes
from forerun.costmodel.liveness import liveness
from forerun.costmodel.options import Options
from forerun.costmodel.priced_pieces import pieces
from forerun.costmodel.prices import Prices
from forerun.costmodel.stages import Load
from forerun.costmodel.techniques import apply

from .graphs import layouts_of

SEQ = 64
LAUNCHES = {"launch": 5e-6, "fsdp_unit_forward": 0.0, "fsdp_unit_backward": 0.0,
            "layer_forward": 1e-3, "layer_backward": 2e-3, "checkpoint": 3e-3,
            "compiled_layer_forward": 1e-4, "compiled_layer_backward": 2e-4}  # fmt: skip


def profile(**fields: object) -> Profile:
    found = Profile(name="test", device="H200-SXM-141GB", date="2026-01-01", environment={})
    return msgspec.structs.replace(found, **fields)


def prices(there: Profile | None) -> Prices:
    return Prices(load_cluster("1xH200").pools[0], there)


def host_s(options: Options, there: Profile | None) -> tuple[float, float]:
    """Host time of one layer beyond its device work, forward and backward."""
    model = load_model("tiny-1m")
    layer = pieces(model, layouts_of(), SEQ, prices(there), options).layers[0]
    return float(layer.host_forward_s[0]), float(layer.host_backward_s[0])


def test_a_compiled_layer_keeps_nothing_within_an_activation_function() -> None:
    """One tensor of the ffn width less: silu of the gate."""
    model = load_model("llama-2-7b")
    layer = model.layers[0]
    sizes = local_sizes(model, layer, layouts_of(), SEQ)
    kept = [
        float(liveness(apply(decoder_layer(model, layer, sequence_parallel=False, fused=True,
                                           options=options), options), sizes).saved[0])
        for options in (Options(compute="bf16"), Options(compute="bf16", runtime="compiled"))
    ]  # fmt: skip
    assert kept[0] - kept[1] == 2 * layer.ffn_hidden * SEQ


def test_host_times_run_beside_a_gpu() -> None:
    """A tiny layer takes what the host needs for it: glue and launches, or the compiled layer's."""
    eager = host_s(Options(compute="bf16"), profile(host_s=LAUNCHES))
    assert 1e-3 < eager[0] < 2e-3 < eager[1] < 4e-3
    compiled = host_s(Options(compute="bf16", runtime="compiled"), profile(host_s=LAUNCHES))
    assert compiled[0] < 1e-4 and compiled[1] < 2e-4  # the device's own work is in the floor
    again = host_s(Options(compute="bf16", recompute="full"), profile(host_s=LAUNCHES))
    assert again[0] == pytest.approx(eager[0]) and again[1] > eager[1] + 3e-3


def test_a_measured_host_takes_the_place_of_the_stacks() -> None:
    measured = profile(host_s={"launch": 0.0, "fsdp_unit_forward": 0.0, "fsdp_unit_backward": 0.0})
    assert host_s(Options(compute="bf16"), measured)[0] == 0.0
    assert host_s(Options(compute="bf16"), None)[0] > 1e-4


def test_compiled_operators_take_their_own_curve() -> None:
    curve = OperatorCurve(operator="rope", dtype="bf16", axes=("elements",), sizes=((1e6,),),
                          forward_s=(8e-5,), backward_s=(9e-5,))  # fmt: skip
    own = msgspec.structs.replace(curve, runtime="compiled", forward_s=(2e-5,))
    size = [np.array([1e6])]
    both, eager = prices(profile(operators=(curve, own))), prices(profile(operators=(curve,)))
    assert both.operator("rope", size, "bf16", "compiled")[0] == pytest.approx(2e-5)
    assert both.operator("rope", size, "bf16")[0] == pytest.approx(8e-5)
    fused = eager.pool.stack.compiled_elementwise
    assert eager.operator("rope", size, "bf16", "compiled")[0] == pytest.approx(8e-5 * fused)


def test_matmuls_between_measured_sizes_run_at_rates_between() -> None:
    """A measured shape is returned as measured, others at a rate between those beside them."""
    points = [(4096.0, n, 4096.0) for n in (2048.0, 4096.0, 8192.0)]
    rates = np.array([600e12, 650e12, 700e12])
    work = np.array([2 * m * n * k for m, n, k in points])
    seconds = tuple((work / rates).tolist())
    curve = OperatorCurve(operator="linear", dtype="bf16", axes=("m", "n", "k"),
                          sizes=tuple(points), forward_s=seconds, backward_s=seconds)  # fmt: skip
    measured = prices(profile(operators=(curve,)))
    columns = [np.array([p[i] for p in points]) for i in range(3)]
    np.testing.assert_allclose(measured.operator("linear", columns, "bf16")[0], seconds, rtol=1e-6)
    between = [np.array([4096.0]), np.array([4224.0]), np.array([4096.0])]
    rate = 2 * 4096 * 4224 * 4096 / measured.operator("linear", between, "bf16")[0]
    assert 650e12 < rate < 660e12


def test_a_head_hides_what_the_host_takes_longer_for_than_layers_take() -> None:
    """Launches of layers go on while the device works on the head: a step takes the longer sum."""
    model = load_model("qwen2.5-0.5b")
    slow = prices(profile(host_s={"launch": 3e-5}))
    costs = pieces(model, layouts_of(), 2048, slow, Options(compute="bf16"))
    one = Load(layers=tuple(np.array([float(x.repeat)]) for x in model.layers),
               embedding=np.ones(1), head=np.ones(1))  # fmt: skip
    of_layers = sum(x.repeat * p.host_forward_s for x, p in zip(model.layers, costs.layers,
                                                               strict=True))  # fmt: skip
    assert np.all(of_layers > costs.head.spare_forward_s) and np.all(costs.head.spare_forward_s > 0)
    there, _ = one.host_s(costs)
    np.testing.assert_allclose(there, of_layers - costs.head.spare_forward_s, rtol=0.05)
    quick = profile(host_s=LAUNCHES | {"launch": 1e-6, "layer_forward": 0.0})
    fast = pieces(model, layouts_of(), 2048, prices(quick), Options(compute="bf16"))
    np.testing.assert_allclose(one.host_s(fast)[0], 0.0, atol=1e-6)
