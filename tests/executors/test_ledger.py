"""The cost model's memory ledger against the storages that a real step makes."""

from __future__ import annotations

import pytest
import torch

from forerun.catalogs import load_cluster
from forerun.costmodel import estimate
from forerun.executors.build import build
from forerun.executors.measure.memory import LiveTensors
from forerun.experts import Experts
from forerun.mesh import Mesh
from forerun.model import LatentAttention, Layer, Mlp, Model, Norm
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.workload import Workload

pytestmark = pytest.mark.usefixtures("one_rank")
SEQ = 64


def _model(mlp: Mlp, norm: Norm, *, kv_heads: int, tied: bool, bias: bool) -> Model:
    layer = Layer(
        repeat=3, heads=4, kv_heads=kv_heads, head_dim=16, ffn_hidden=176, mlp=mlp, norm=norm,
        bias=bias,
    )  # fmt: skip
    positions = "rope" if norm == "rmsnorm" else "learned"
    return Model(
        name=f"{mlp}-{norm}", hidden=64, vocab=384, layers=(layer,), tied_embeddings=tied,
        positions=positions, max_positions=SEQ,
    )  # fmt: skip


LLAMA = _model("swiglu", "rmsnorm", kv_heads=2, tied=False, bias=False)
GPT = _model("gelu", "layernorm", kv_heads=4, tied=True, bias=True)
NEMOTRON = _model("squared_relu", "layernorm", kv_heads=4, tied=False, bias=False)


EXPERTS = Experts(num_experts=8, top_k=2, ffn_hidden=96)
CAPACITY = Experts(num_experts=8, top_k=2, ffn_hidden=96, capacity_factor=1.25)
SHARED = Experts(num_experts=8, top_k=2, ffn_hidden=96, shared_ffn_hidden=80, scores="sigmoid")
NARROW = LatentAttention(
    q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
EVEN = LatentAttention(
    q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24
)


def _routed(name: str, experts: Experts, latent: LatentAttention | None, mlp: Mlp) -> Model:
    head_dim, kv_heads = (16, 2) if latent is None else (24, 4)
    layer = Layer(
        repeat=3, heads=4, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp, experts=experts,
        latent=latent,
    )  # fmt: skip
    return Model(name=name, hidden=64, vocab=384, layers=(layer,))


MOE = _routed("moe", EXPERTS, None, "swiglu")
MLA = _routed("mla-shared", SHARED, NARROW, "swiglu")
LONG = (_routed("moe-gelu", EXPERTS, None, "gelu"), _routed("capacity", CAPACITY, EVEN, "swiglu"))
"""Left to the long run."""


def _plan(model: Model, compute: str, recompute: str, num_microbatches: int) -> Plan:
    cluster = load_cluster("1xcpu")
    phase = Phase(
        steps=1,
        seq_tokens=SEQ,
        micro_batch_seqs=4,
        num_microbatches=num_microbatches,
        mesh=Mesh(),
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(
            Setting(layers=(0, model.num_layers - 1), techniques=techniques(compute, recompute)),
        ),
    )
    workload = Workload(seq_tokens=SEQ, global_batch_seqs=4 * num_microbatches)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def _counted_bytes(plan: Plan) -> int:
    trainer = build(plan, device=torch.device("cpu"))
    batch = plan.workload.global_batch_seqs
    tokens = torch.arange(batch * (SEQ + 1)).remainder(256).view(batch, SEQ + 1)
    for _ in range(2):
        trainer.forward_backward(tokens)
        trainer.optimizer_step()
    parameters = [p for piece in trainer.pieces for p in piece.parameters()]
    live = LiveTensors()
    trainer.observer = live
    with live:
        live.hold(parameters, "parameters")
        states = trainer.optimizer.state.values()
        live.hold([v for s in states for v in s.values() if torch.is_tensor(v)], "optimizer")
        trainer.forward_backward(tokens)
        trainer.optimizer_step()
    return sum(live.peak().values())


@pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model, id=model.name) for model in (LLAMA, GPT, NEMOTRON, MOE, MLA)),
        *(pytest.param(model, id=model.name, marks=pytest.mark.slow) for model in LONG),
    ],
)
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(
    ("compute", "recompute"),
    [("fp32", "none"), ("fp32", "selective"), ("fp32", "full"), ("bf16", "none")],
)
def test_predicted_peak_is_the_counted_one(
    model: Model, num_microbatches: int, compute: str, recompute: str
) -> None:
    plan = _plan(model, compute, recompute, num_microbatches)
    terms = estimate(plan).memory_terms_bytes
    predicted = sum(n for t, n in terms.items() if t not in ("fragmentation", "context"))
    assert predicted == pytest.approx(_counted_bytes(plan), rel=0.05)
