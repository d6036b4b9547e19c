"""Technique settings that the cost model knows and the executor does not: refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from forerun.catalogs import load_cluster
from forerun.errors import InputError
from forerun.executors.build import build
from forerun.experts import Experts
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages
from forerun.workload import Workload

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize(
    ("field", "techniques"),
    [
        (
            "recompute.keep",
            {
                "precision": {"compute": "fp32"},
                "recompute": {"mode": "tensors", "keep": ["atention.in"]},
            },
        ),
        (
            "recompute",
            {
                "precision": {"compute": "fp8", "recipe": "coat"},
                "recompute": {"mode": "tensors", "keep": ["attention.in"]},
            },
        ),
        (
            "offload.rest",
            {
                "recompute": {"mode": "full"},
                "offload": {"activations": 0.5, "rest": "recompute"},
            },
        ),
        ("offload", {"recompute": {"mode": "full_keep_attn"}, "offload": {"activations": 0.5}}),
        (
            "offload",
            {
                "precision": {"compute": "bf16", "activations": "fp8"},
                "offload": {"activations": 0.5},
            },
        ),
        ("precision.activations", {"precision": {"compute": "bf16", "activations": "int8"}}),
        ("precision.recipe", {"precision": {"compute": "fp8", "recipe": "blockwise"}}),
        ("precision.recipe", {"precision": {"compute": "fp8", "activations": "fp8"}}),
        ("precision", {"precision": {"compute": "mxfp8"}}),
        ("precision", {"precision": {"compute": "fp16"}}),
        ("settings.techniques", {"attention": {"kernel": "unfused"}}),
        ("runtime", {"precision": {"compute": "fp32"}, "runtime": {"mode": "graphs"}}),
        ("recompute", {"precision": {"compute": "fp32"}, "runtime": {"mode": "compiled"},
                       "recompute": {"mode": "full_keep_attn"}}),
    ],
)  # fmt: skip
def test_settings_that_are_not_executed(field: str, techniques: dict[str, Any]) -> None:
    refused(field, techniques, None)


EXPERTS = Experts(num_experts=4, top_k=2, ffn_hidden=8)


@pytest.mark.parametrize(
    ("field", "techniques"),
    [
        ("runtime", {"runtime": {"mode": "compiled"}}),
        ("recompute", {"recompute": {"mode": "elementwise"}}),
        ("recompute", {"recompute": {"mode": "per_op"}}),
        ("recompute", {"recompute": {"mode": "tensors", "keep": ["x1"]}}),
        ("offload", {"offload": {"activations": 0.5}}),
        ("offload", {"offload": {"activations": 0.5, "rest": "recompute"}}),
        ("offload", {"offload": {"states": "parameters"}}),
    ],
)  # fmt: skip
def test_what_layers_with_experts_do_not_do(field: str, techniques: dict[str, Any]) -> None:
    refused(field, {"precision": {"compute": "fp32"}} | techniques, EXPERTS)


def plan_of(
    techniques: dict[str, Any], experts: Experts | None, second: dict[str, Any] | None = None
) -> Plan:
    """Two layers, the second one with settings of its own where some are given."""
    layer = Layer(repeat=2, heads=4, kv_heads=2, head_dim=4, ffn_hidden=24, experts=experts)
    cluster = load_cluster("1xcpu")
    phase = Phase(
        steps=1, seq_tokens=8, micro_batch_seqs=2, num_microbatches=2, mesh=Mesh(),
        stages=even_stages(2, 1, cluster.pools[0].name),
        settings=(
            Setting(layers=(0, 0), techniques=techniques),
            Setting(layers=(1, 1), techniques=techniques if second is None else second),
        ),
    )  # fmt: skip
    return Plan(
        model=Model(name="tiny", hidden=16, vocab=32, layers=(layer,)),
        cluster=cluster,
        workload=Workload(seq_tokens=8, global_batch_seqs=4),
        phases=(phase,),
    )


def refused(field: str, techniques: dict[str, Any], experts: Experts | None) -> None:
    plan = plan_of(techniques, experts)
    with pytest.raises(InputError) as caught:
        build(plan, device=torch.device("cpu"))
    assert caught.value.field == field
    assert caught.value.remedy
