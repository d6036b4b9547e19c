"""Small models and plans of one process, and what a real step of one keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forerun.catalogs import load_cluster
from forerun.executors.build import build
from forerun.executors.measure.memory import LiveTensors
from forerun.executors.trainer import Trainer
from forerun.experts import Experts
from forerun.mesh import Mesh
from forerun.model import LatentAttention, Layer, Mlp, Model, Norm
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.workload import Workload

SEQ, SEQS = 64, 4


def model(mlp: Mlp, norm: Norm, *, kv_heads: int, tied: bool, bias: bool, layers: int = 3) -> Model:
    layer = Layer(
        repeat=layers, heads=4, kv_heads=kv_heads, head_dim=16, ffn_hidden=176, mlp=mlp, norm=norm,
        bias=bias,
    )  # fmt: skip
    positions = "rope" if norm == "rmsnorm" else "learned"
    return Model(
        name=f"{mlp}-{norm}", hidden=64, vocab=384, layers=(layer,), tied_embeddings=tied,
        positions=positions, max_positions=SEQ,
    )  # fmt: skip


LLAMA = model("swiglu", "rmsnorm", kv_heads=2, tied=False, bias=False)
GPT = model("gelu", "layernorm", kv_heads=4, tied=True, bias=True)
NEMOTRON = model("squared_relu", "layernorm", kv_heads=4, tied=False, bias=False)
MODELS = (LLAMA, GPT, NEMOTRON)

EXPERTS = Experts(num_experts=8, top_k=2, ffn_hidden=96)
CAPACITY = Experts(num_experts=8, top_k=2, ffn_hidden=96, capacity_factor=1.25)
SHARED = Experts(num_experts=8, top_k=2, ffn_hidden=96, shared_ffn_hidden=80, scores="sigmoid")
NARROW = LatentAttention(
    q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
EVEN = LatentAttention(
    q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24
)


def routed(name: str, experts: Experts, latent: LatentAttention | None, mlp: Mlp) -> Model:
    head_dim, kv_heads = (16, 2) if latent is None else (24, 4)
    layer = Layer(
        repeat=3, heads=4, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp, experts=experts,
        latent=latent,
    )  # fmt: skip
    return Model(name=name, hidden=64, vocab=384, layers=(layer,))


ROUTED = (
    routed("moe", EXPERTS, None, "swiglu"),
    routed("mla-shared", SHARED, NARROW, "swiglu"),
)
LONG = (
    routed("moe-gelu", EXPERTS, None, "gelu"),
    routed("capacity", CAPACITY, EVEN, "swiglu"),
)
"""Left to the long run."""


def make_plan(
    model: Model,
    compute: str = "fp32",
    recompute: str = "none",
    num_microbatches: int = 1,
    more: dict[str, dict[str, Any]] | None = None,
    spared: int = 0,
    **pool: Any,
) -> Plan:
    """A plan of one process; the last `spared` layers have none of `more`."""
    import msgspec

    cluster = load_cluster("1xcpu")
    pools = (msgspec.structs.replace(cluster.pools[0], **pool),)
    chosen = techniques(compute, recompute)
    last = model.num_layers - 1
    settings = [Setting(layers=(0, last - spared), techniques=chosen | (more or {}))]
    if spared:
        settings.append(Setting(layers=(last - spared + 1, last), techniques=chosen))
    phase = Phase(
        steps=1,
        seq_tokens=SEQ,
        micro_batch_seqs=SEQS,
        num_microbatches=num_microbatches,
        mesh=Mesh(),
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=tuple(settings),
    )
    workload = Workload(seq_tokens=SEQ, global_batch_seqs=SEQS * num_microbatches)
    return Plan(
        model=model,
        cluster=msgspec.structs.replace(cluster, pools=pools),
        workload=workload,
        phases=(phase,),
    )


def tokens(plan: Plan) -> Tensor:
    """The sequences of a step."""
    batch = plan.workload.global_batch_seqs
    return torch.arange(batch * (SEQ + 1)).remainder(256).view(batch, SEQ + 1)


def make_trainer(plan: Plan) -> Trainer:
    return build(plan, device=torch.device("cpu"))


def gradients(plan: Plan) -> dict[str, Tensor]:
    """The gradients of a plan's first step."""
    trainer = make_trainer(plan)
    trainer.forward_backward(tokens(plan))
    return {name: gradient.clone() for name, gradient in trainer.named_gradients().items()}


def counted(trainer: Trainer, plan: Plan) -> LiveTensors:
    """The live tensors of a third step."""
    batch = tokens(plan)
    for _ in range(2):
        trainer.forward_backward(batch)
        trainer.optimizer_step()
    trainer.away.take_copied()
    parameters = [p for piece in trainer.pieces for p in piece.parameters()]
    live = LiveTensors()
    trainer.observer = live
    with live:
        live.hold(parameters, "parameters")
        states = trainer.optimizer.state.values()
        live.hold([v for s in states for v in s.values() if torch.is_tensor(v)], "optimizer")
        trainer.forward_backward(batch)
        trainer.optimizer_step()
    return live
