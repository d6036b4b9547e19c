"""predict's layout: exactly what was typed, absent axes 1 or off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forerun import InputError, Plan, Workload, load_cluster, load_model
from forerun.cli.layout import fixed_plan
from forerun.planner import Pins


def plan(
    model: str = "tiny-1m", gpus: str = "4xcpu", seqs: int = 16, seq: int = 64, **pins: Any
) -> Plan:
    workload = Workload(seq_tokens=seq, global_batch_seqs=seqs)
    return fixed_plan(load_model(model), load_cluster(gpus), workload, Pins(**pins))


def test_defaults_are_one_or_off_and_dp_takes_the_rest() -> None:
    phase = plan().phase
    assert phase.mesh.shape() == {"pp": 1, "dp_replicate": 4, "dp_shard": 1, "cp": 1, "tp": 1}
    assert (phase.zero, phase.sequence_parallel, phase.recompute) == (0, False, "none")
    assert (phase.micro_batch_seqs, phase.num_microbatches) == (1, 4)
    assert phase.schedule == "1f1b"


def test_precision_is_bf16_on_gpus_and_fp32_on_cpus() -> None:
    assert plan().phase.compute_dtype == "fp32"
    assert plan(gpus="4xH100").phase.compute_dtype == "bf16"
    assert plan(gpus="4xH100", precision="fp32").phase.compute_dtype == "fp32"


def test_dp_is_what_tp_and_pp_leave() -> None:
    mesh = plan(tp=2, pp=2).phase.mesh
    assert (mesh.tp, mesh.pp, mesh.dp) == (2, 2, 1)


def test_zero_shards_over_all_of_dp_unless_told() -> None:
    assert plan(zero=3).phase.mesh.dp_shard == 4
    hybrid = plan(zero=3, dp_shard=2).phase.mesh
    assert (hybrid.dp_replicate, hybrid.dp_shard) == (2, 2)


def test_vpp_makes_1f1b_interleaved() -> None:
    phase = plan(pp=2, vpp=2).phase
    assert phase.schedule == "interleaved"
    assert [stage.layers for stage in phase.stages] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_every_axis_given_stands_in_the_plan() -> None:
    phase = plan(
        tp=2, sp=True, dp=2, zero=2, micro_batch=2, recompute="full", precision="bf16"
    ).phase
    assert phase.label == "zero2-2_tp2-sp_mbs2x4_ac-full_bf16"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tp": 3, "gpus": "3xcpu", "seqs": 3}, "tp"),  # 3 does not divide 4 heads
        ({"tp": 8, "gpus": "8xcpu"}, "tp"),  # nor 8 the 2 key-value heads
        ({"tp": 3}, "mesh"),  # nor 3 the 4 devices
        ({"pp": 8, "gpus": "8xcpu"}, "pp"),  # four layers
        ({"pp": 2, "vpp": 4}, "pp"),
        ({"vpp": 2}, "vpp"),
        ({"dp": 2}, "dp"),
        ({"dp": 8}, "dp"),
        ({"dp_shard": 3, "zero": 3}, "dp-shard"),
        ({"dp_shard": 2}, "zero"),
        ({"seqs": 6}, "global-batch"),
        ({"micro_batch": 3}, "micro-batch"),
        ({"sp": True}, "sp"),
        ({"tp": 2, "sp": True, "seq": 63}, "sp"),
        ({"cp": 3}, "mesh"),
        ({"cp": 2, "seq": 62}, "cp"),  # 2 * 2 blocks of a balanced ring
        ({"cp": 2, "cp_kind": "usp"}, "cp-kind"),
        ({"ep": 2}, "ep"),
        ({"pp": 4, "seqs": 2}, "num_microbatches"),
        ({"pp": 2, "vpp": 2, "schedule": "1f1b"}, "vpp"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(**options)
    assert caught.value.field == field
    assert caught.value.remedy


def test_pipelines_go_through_pools_of_unlike_devices() -> None:
    """A stage on each; every pool needs whole stages."""
    phase = plan(gpus="2xH100+2xA100-80GB", pp=2, stages=(3, 1)).phase
    first, last = phase.stages
    assert (first.layers, last.layers) == ((0, 2), (3, 3))
    assert "h100" in first.pool.lower()
    assert "a100" in last.pool.lower()
    with pytest.raises(InputError, match="ranks lie in a pool of 2 devices"):
        plan(gpus="2xH100+2xA100-80GB")
    with pytest.raises(InputError, match="are 2 stages"):
        plan(gpus="4xH100", pp=4, stages=(3, 1))


def test_context_and_expert_parallelism_reach_the_plan() -> None:
    phase = plan(cp=4, cp_kind="usp", gpus="8xcpu").phase
    assert (phase.mesh.cp, phase.mesh.ulysses, phase.mesh.dp) == (4, 2, 2)
    phase = plan(cp=2, cp_kind="ulysses", offload=0.5, attention="unfused").phase
    assert phase.mesh.ulysses == 2
    assert phase.technique("context-parallel") == {"kind": "ulysses"}
    assert phase.technique("offload") == {"activations": 0.5}
    assert phase.technique("attention") == {"kernel": "unfused"}


def test_documents_are_packed_and_cheaper_than_whole_sequences(
    invoke: Any, refused: Any, tmp_path: Path
) -> None:
    job = ["predict", "--model", "llama-3.1-8b", "--gpus", "8xH100", "--seq-len", "65536"]
    job += ["--global-batch", "8", "--cp", "8", "--zero", "3", "--cp-kind", "lightseq", "--json"]
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("512\n2048\n\n16384\n")
    whole = json.loads(invoke(*job).stdout)
    packed = json.loads(invoke(*job, "--lengths", lengths).stdout)
    assert packed["label"] == whole["label"] + "_packed"
    assert packed["estimate"]["step_s"]["median"] < whole["estimate"]["step_s"]["median"]
    assert packed["estimate"]["bytes_on_wire"] == whole["estimate"]["bytes_on_wire"]
    lengths.write_text("512\nmany\n")
    assert "line 2" in refused([*job, "--lengths", lengths], 2)
    assert "lengths=prose" in refused([*job, "--lengths", "prose"], 2)
