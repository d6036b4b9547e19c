"""Plans for one process, of small models of every kind that is executed."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from forerun.catalogs import load_cluster
from forerun.executors.build import build
from forerun.executors.trainer import Trainer
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages
from forerun.workload import Workload

SEQ, BATCH, VOCAB = 32, 4, 256
CPU = torch.device("cpu")


def _model(name: str, hidden: int, tied: bool = False, **layer: Any) -> Model:
    norm = layer.get("norm", "rmsnorm")
    return Model(
        name=name, hidden=hidden, vocab=VOCAB, layers=(Layer(repeat=2, head_dim=32, **layer),),
        tied_embeddings=tied, positions="rope" if norm == "rmsnorm" else "learned",
        max_positions=SEQ,
    )  # fmt: skip


LLAMA = _model("llama", 128, heads=4, kv_heads=2, ffn_hidden=352)
GPT = _model("gpt", 160, True, heads=5, kv_heads=5, ffn_hidden=640, mlp="gelu", norm="layernorm",
             bias=True)  # fmt: skip
NEMOTRON = _model("nemotron", 256, heads=8, kv_heads=2, ffn_hidden=512, mlp="squared_relu",
                  norm="layernorm")  # fmt: skip
GEMMA = _model("gemma", 128, True, heads=4, kv_heads=1, ffn_hidden=256, mlp="geglu")
MODELS = {model.name: model for model in (LLAMA, GPT, NEMOTRON, GEMMA)}


def plan_of(
    model: Model = LLAMA,
    precision: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    *,
    seqs: int = BATCH,
    **techniques: dict[str, Any],
) -> Plan:
    """A plan for this process alone."""
    cluster = load_cluster("1xcpu")
    named = {"precision": precision or {"compute": "fp32"}, **techniques}
    phase = Phase(
        steps=1, seq_tokens=SEQ, micro_batch_seqs=seqs, num_microbatches=1,
        mesh=Mesh(), stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(Setting(layers=(0, model.num_layers - 1), techniques=named),),
    )  # fmt: skip
    workload = Workload(seq_tokens=SEQ, global_batch_seqs=seqs, seed=7, learning_rate=1e-3)
    workload = msgspec.structs.replace(workload, optimizer=optimizer)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


def trainer_of(plan: Plan) -> Trainer:
    return build(plan, device=CPU)


def tokens(step: int, count: int = BATCH) -> Tensor:
    """The batch of a step, (count, SEQ + 1): arithmetic series."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(VOCAB, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (start + stride * torch.arange(SEQ + 1)) % VOCAB


def train(trainer: Trainer, steps: int, first: int = 0) -> list[float]:
    """Losses of some steps."""
    losses: list[float] = []
    for step in range(first, first + steps):
        losses.append(float(trainer.forward_backward(tokens(step))))
        trainer.optimizer_step()
    return losses
