"""Plans: layout rules in the user's words, stage cuts, labels, and one file that holds it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from forerun import document
from forerun.cluster import Cluster, Device, Link, Pool
from forerun.errors import InputError
from forerun.layout_rules import layout_problems
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, Stage, even_stages, techniques
from forerun.stack import Stack
from forerun.workload import Workload

from .strategies import meshes, models

MODEL = Model(
    name="m",
    hidden=64,
    vocab=256,
    layers=(Layer(repeat=8, heads=8, kv_heads=4, head_dim=8, ffn_hidden=96),),
)


def cluster(devices: int) -> Cluster:
    device = Device(
        name="d",
        kind="gpu",
        memory_bytes=2**30,
        memory_bytes_per_s=1e12,
        peak_flops_per_s={"bf16": 1e14},
    )
    pool = Pool(
        name="p",
        device=device,
        devices_per_node=devices,
        intra_node=Link(latency_s=1e-6, bytes_per_s=1e11),
        stack=Stack(name="s", gemm_efficiency={"bf16": 0.7}),
    )
    return Cluster(name="c", pools=(pool,))


def plan(**changes: Any) -> Plan:
    mesh = Mesh(dp_shard=2, tp=2, pp=2)
    fields: dict[str, Any] = {
        "steps": 2,
        "seq_tokens": 32,
        "micro_batch_seqs": 2,
        "num_microbatches": 4,
        "mesh": mesh,
        "zero": 3,
        "stages": even_stages(8, 2, "p"),
        "settings": (Setting(layers=(0, 7), techniques=techniques("bf16", "full")),),
    }
    phase = Phase(**{**fields, **changes})
    workload = Workload(seq_tokens=32, global_batch_seqs=16)
    return Plan(model=MODEL, cluster=cluster(8), workload=workload, phases=(phase,))


def problems(**changes: Any) -> list[str]:
    fields: dict[str, Any] = {
        "mesh": Mesh(),
        "seq_tokens": 32,
        "zero": 0,
        "sequence_parallel": False,
        "schedule": "1f1b",
        "num_microbatches": 4,
    }
    return [problem.field for problem in layout_problems(MODEL, **{**fields, **changes})]


def test_a_sound_plan_passes_and_reads_back(tmp_path: Path) -> None:
    sound = plan()
    sound.check()
    for ending in ("json", "toml"):
        document.write(tmp_path / f"plan.{ending}", sound)
        again = document.read(Plan, tmp_path / f"plan.{ending}")
        again.check()
        assert again == sound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": Mesh(dp_shard=2, tp=2)}, "^mesh=.*multiplies to 4, not to 8"),
        ({"num_microbatches": 8}, "^global-batch=16"),
        ({"stages": even_stages(8, 4, "p")}, "^stages=4"),
        ({"stages": even_stages(9, 2, "p")}, "^stages=9: m has 8 layers"),
        ({"stages": (Stage(pool="p", layers=(0, 3)), Stage(pool="p", layers=(5, 7)))}, "layer 4"),
        ({"stages": even_stages(8, 2, "q")}, "^pool=q: c has no such pool"),
        ({"zero": 0}, "^zero=0"),
        (
            {"settings": (Setting(layers=(0, 7), techniques=techniques("bf16", "some")),)},
            "^recompute=some",
        ),
        (
            {"settings": (Setting(layers=(0, 7), techniques=techniques("fp12", "none")),)},
            "^precision=fp12",
        ),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(**changes).check()


def test_a_plan_without_phases() -> None:
    with pytest.raises(InputError, match=r"^phases="):
        replace(plan(), phases=()).check()


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"mesh": Mesh(tp=4)}, []),
        ({"mesh": Mesh(tp=8)}, ["tp"]),  # four key-value heads
        ({"mesh": Mesh(tp=3)}, ["tp", "tp", "tp"]),  # heads, key-value heads, vocabulary
        ({"mesh": Mesh(tp=2), "sequence_parallel": True, "seq_tokens": 31}, ["sp"]),
        ({"sequence_parallel": True}, ["sp"]),
        ({"mesh": Mesh(pp=9), "num_microbatches": 9}, ["pp"]),
        ({"mesh": Mesh(pp=2), "num_microbatches": 1}, ["num_microbatches"]),
        ({"mesh": Mesh(pp=2), "num_microbatches": 1, "schedule": "gpipe"}, []),
        ({"mesh": Mesh(pp=2, vpp=2)}, ["vpp"]),
        ({"mesh": Mesh(pp=2, vpp=2), "schedule": "interleaved"}, []),
        ({"mesh": Mesh(pp=2), "schedule": "interleaved"}, ["schedule"]),
        (
            {"mesh": Mesh(pp=2, vpp=2), "schedule": "interleaved", "num_microbatches": 3},
            ["num_microbatches"],
        ),
        ({"schedule": "zb-h1"}, ["schedule"]),  # without a pipeline
        ({"mesh": Mesh(pp=2), "schedule": "zb-h1"}, []),
        ({"mesh": Mesh(pp=2, vpp=2), "schedule": "zb-h2"}, ["vpp"]),
        ({"mesh": Mesh(pp=2), "schedule": "interleaved-zb"}, ["schedule"]),
        (
            {"mesh": Mesh(pp=2, vpp=2), "schedule": "interleaved-zb", "num_microbatches": 3},
            ["num_microbatches"],
        ),
        ({"mesh": Mesh(pp=2, vpp=2), "schedule": "zb-v", "num_microbatches": 3}, []),
        ({"mesh": Mesh(pp=2), "schedule": "zb-v"}, ["schedule"]),
        (
            {"mesh": Mesh(pp=2, vpp=2), "schedule": "dualpipev", "num_microbatches": 3},
            ["num_microbatches"],
        ),
        ({"mesh": Mesh(dp_shard=2)}, ["zero"]),
        ({"mesh": Mesh(dp_replicate=2)}, []),
        ({"mesh": Mesh(cp=2), "seq_tokens": 30}, ["cp"]),
        ({"mesh": Mesh(dp_shard=2, ep=2), "zero": 1}, ["ep"]),
    ],
)
def test_layout_rules(changes: dict[str, Any], fields: list[str]) -> None:
    assert problems(**changes) == fields


@given(models, meshes, st.integers(0, 3), st.booleans(), st.integers(1, 6))
def test_no_problem_means_everything_divides(
    model: Model, mesh: Mesh, zero: int, sequence_parallel: bool, num_microbatches: int
) -> None:
    found = list(
        layout_problems(
            model,
            mesh,
            seq_tokens=60,
            zero=zero,
            sequence_parallel=sequence_parallel,
            schedule="1f1b",
            num_microbatches=num_microbatches,
        )
    )
    divides = model.vocab % mesh.tp == 0 and all(
        size % mesh.tp == 0
        for layer in model.layers
        for size in (layer.heads, layer.kv_heads, *layer.mlp_widths)
    )
    if not found:
        assert divides
        assert mesh.pp <= min(model.num_layers, num_microbatches) or mesh.pp == 1
        assert 60 % mesh.cp == 0
        assert not sequence_parallel or (60 // mesh.cp) % mesh.tp == 0
        assert mesh.dp_shard == 1 or zero
    elif not divides:
        assert any(problem.field == "tp" for problem in found)


@given(st.integers(1, 200), st.integers(1, 40))
def test_even_stages_cover_every_layer_once(num_layers: int, num_stages: int) -> None:
    if num_stages > num_layers:
        return
    stages = even_stages(num_layers, num_stages, "p")
    covered = [i for stage in stages for i in range(stage.layers[0], stage.layers[1] + 1)]
    assert covered == list(range(num_layers))
    sizes = [stage.num_layers for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_labels_tell_layouts_apart() -> None:
    layouts: list[dict[str, Any]] = [
        {},
        {"zero": 1},
        {"zero": 2},
        {"mesh": Mesh(dp_replicate=2, tp=2, pp=2), "zero": 0},
        {"mesh": Mesh(dp_replicate=2, dp_shard=2, tp=2)},
        {"mesh": Mesh(dp_shard=4, tp=2)},
        {"sequence_parallel": True},
        {"schedule": "gpipe"},
        {"mesh": Mesh(dp_shard=2, tp=2, pp=2, vpp=2), "schedule": "interleaved"},
        {"micro_batch_seqs": 4},
        {"num_microbatches": 2},
        {"settings": (Setting(layers=(0, 7), techniques=techniques("fp32", "full")),)},
        {"settings": (Setting(layers=(0, 7), techniques=techniques("bf16", "selective")),)},
    ]
    labels = [plan(**changes).label for changes in layouts]
    assert len(set(labels)) == len(labels)
    assert labels[0] == "fsdp2_tp2_pp2-1f1b_mbs2x4_ac-full_bf16"


def test_technique_settings_hold_for_their_layers() -> None:
    settings = (
        Setting(layers=(0, 3), techniques=techniques("bf16", "full")),
        Setting(layers=(4, 7), techniques=techniques("bf16", "none")),
    )
    phase = plan(settings=settings).phase
    assert phase.technique("recompute", 3) == {"mode": "full"}
    assert phase.technique("recompute", 4) == {}
