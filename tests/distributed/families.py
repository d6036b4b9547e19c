"""Tiny models, the layouts they are run in, and the plain loop they are compared with."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from forerun.cluster import Cluster, Device, Link, Pool
from forerun.executors import init
from forerun.executors.decoder import Decoder
from forerun.executors.measure.comm import CollectiveCounter
from forerun.executors.trainer import Trainer
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.stack import Stack
from forerun.workload import Workload

SEQ, STEPS, BATCH, VOCAB = 32, 10, 8, 256
SPLIT_BATCH = {"micro_batch_seqs": 2}

LLAMA = Model(
    name="tiny-llama",
    hidden=32,
    vocab=VOCAB,
    layers=(Layer(repeat=4, heads=4, kv_heads=2, head_dim=8, ffn_hidden=64),),
)
GPT = Model(
    name="tiny-gpt",
    hidden=32,
    vocab=VOCAB,
    layers=(
        Layer(repeat=4, heads=4, kv_heads=4, head_dim=8, ffn_hidden=64, mlp="gelu",
              norm="layernorm", bias=True),
    ),
    tied_embeddings=True,
    positions="learned",
    max_positions=SEQ,
)  # fmt: skip
MODELS = {"llama": LLAMA, "gpt": GPT}


def cluster(num_devices: int) -> Cluster:
    """A cluster of CPU processes; its rates are not used here."""
    device = Device(name="cpu", kind="cpu", memory_bytes=2**30, memory_bytes_per_s=1e10,
                    peak_flops_per_s={"fp32": 1e11})  # fmt: skip
    link = Link(latency_s=1e-5, bytes_per_s=1e9)
    pool = Pool(name="cpu", device=device, devices_per_node=num_devices, intra_node=link,
                host=link, disk=link,
                stack=Stack(name="torch", gemm_efficiency={"fp32": 1.0}))  # fmt: skip
    return Cluster(name="cpus", pools=(pool,))


def make_plan(
    model: Model,
    *,
    recompute: str = "none",
    dtype: str = "fp32",
    micro_batch_seqs: int = 0,
    mesh: dict[str, int] | None = None,
    more: dict[str, dict[str, Any]] | None = None,
    **phase: Any,
) -> Plan:
    """A plan of one phase on CPU processes; micro_batch_seqs 0 = the whole replica at once."""
    degrees = Mesh(**(mesh or {}))
    micro = micro_batch_seqs or BATCH // degrees.dp
    last = model.num_layers - 1
    plan = Plan(
        model=model,
        cluster=cluster(degrees.world),
        workload=Workload(seq_tokens=SEQ, global_batch_seqs=BATCH, steps=STEPS, seed=7,
                          learning_rate=1e-3),
        phases=(
            Phase(
                steps=STEPS,
                seq_tokens=SEQ,
                micro_batch_seqs=micro,
                num_microbatches=BATCH // degrees.dp // micro,
                mesh=degrees,
                stages=even_stages(model.num_layers, degrees.num_stages, "cpu"),
                settings=(
                    Setting(
                        layers=(0, last), techniques=techniques(dtype, recompute) | (more or {})
                    ),
                ),
                **phase,
            ),
        ),
    )  # fmt: skip
    plan.check()
    return plan


PP = {"micro_batch_seqs": 2}
KEEP = {"recompute": {"mode": "tensors", "keep": ["x1", "o", "lse", "v"]}}
HALF: dict[str, Any] = {"activations": 0.5}
TOKENS = {"offload": HALF | {"rest": "recompute"}}
FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "plain": {},
        "accumulation": SPLIT_BATCH,
        "recompute full": {"recompute": "full"},
        "recompute selective": {"recompute": "selective"},
        "bf16": {"dtype": "bf16"},
        "bf16 accumulation": {"dtype": "bf16"} | SPLIT_BATCH,
        "elementwise": {"recompute": "elementwise"},
        "per_op": {"recompute": "per_op"},
        "tensors": {"more": KEEP},
        "offload disk": {"more": {"offload": HALF | {"tier": "disk"}}} | SPLIT_BATCH,
        "offload full": {"recompute": "full", "more": {"offload": {"activations": 1.0}}},
        "offload tokens": {"more": TOKENS} | SPLIT_BATCH,
        "offload optimizer": {"more": {"offload": {"states": "optimizer"}}},
    },
    2: {
        "ddp": {"mesh": {"dp_replicate": 2}},
        "ddp accumulation": {"mesh": {"dp_replicate": 2}} | SPLIT_BATCH,
        "zero1": {"mesh": {"dp_shard": 2}, "zero": 1} | SPLIT_BATCH,
        "zero2": {"mesh": {"dp_shard": 2}, "zero": 2} | SPLIT_BATCH,
        "zero3": {"mesh": {"dp_shard": 2}, "zero": 3} | SPLIT_BATCH,
        "zero3 recompute full": {"mesh": {"dp_shard": 2}, "zero": 3, "recompute": "full"},
        "tp": {"mesh": {"tp": 2}},
        "tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True},
        "tp-sp selective": {"mesh": {"tp": 2}, "sequence_parallel": True, "recompute": "selective"},
        "tp-sp full accumulation": {"mesh": {"tp": 2}, "sequence_parallel": True,
                                    "recompute": "full"} | SPLIT_BATCH,
        "gpipe": {"mesh": {"pp": 2}, "schedule": "gpipe"} | PP,
        "1f1b": {"mesh": {"pp": 2}, "schedule": "1f1b"} | PP,
        "interleaved": {"mesh": {"pp": 2, "vpp": 2}, "schedule": "interleaved"} | PP,
        "1f1b full": {"mesh": {"pp": 2}, "schedule": "1f1b", "recompute": "full"} | PP,
        "zero3 tensors": {"mesh": {"dp_shard": 2}, "zero": 3, "more": KEEP},
        "zero3 offload": {"mesh": {"dp_shard": 2}, "zero": 3,
                          "more": {"offload": {"activations": 1.0, "states": "optimizer"}}},
        "tp tensors offload": {"mesh": {"tp": 2}, "more": KEEP | {"offload": HALF}},
        "tp-sp per_op": {"mesh": {"tp": 2}, "sequence_parallel": True, "recompute": "per_op"},
        "tp-sp tokens": {"mesh": {"tp": 2}, "sequence_parallel": True, "more": TOKENS},
        "1f1b elementwise offload": {"mesh": {"pp": 2}, "schedule": "1f1b",
                                     "recompute": "elementwise",
                                     "more": {"offload": {"activations": 1.0}}} | PP,
        "gpipe tokens": {"mesh": {"pp": 2}, "schedule": "gpipe", "more": TOKENS} | PP,
        "interleaved offload": {"mesh": {"pp": 2, "vpp": 2}, "schedule": "interleaved",
                                "more": {"offload": HALF}} | PP,
        "bf16 zero3 tensors": {"mesh": {"dp_shard": 2}, "zero": 3, "dtype": "bf16", "more": KEEP},
        "bf16 ddp": {"mesh": {"dp_replicate": 2}, "dtype": "bf16"},
        "bf16 zero3": {"mesh": {"dp_shard": 2}, "zero": 3, "dtype": "bf16"},
        "bf16 tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True, "dtype": "bf16"},
        "bf16 1f1b": {"mesh": {"pp": 2}, "schedule": "1f1b", "dtype": "bf16"} | PP,
    },
    4: {
        "tp2 x ddp2": {"mesh": {"tp": 2, "dp_replicate": 2}} | SPLIT_BATCH,
        "tp2-sp x zero3": {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3, "sequence_parallel": True},
        "pp2 x zero1": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 1} | PP,
        "pp2 x zero3 gpipe": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 3,
                              "schedule": "gpipe"} | PP,
        "pp2x2 x zero3": {"mesh": {"pp": 2, "vpp": 2, "dp_shard": 2}, "zero": 3,
                          "schedule": "interleaved"} | PP,
        "pp2 x ddp2": {"mesh": {"pp": 2, "dp_replicate": 2}} | PP,
        "hsdp zero3": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                       "micro_batch_seqs": 1},
        "hsdp zero1": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 1,
                       "micro_batch_seqs": 1},
        "tp2 x pp2": {"mesh": {"tp": 2, "pp": 2}} | PP,
        "tp2-sp x pp2": {"mesh": {"tp": 2, "pp": 2}, "sequence_parallel": True} | PP,
        "pp4": {"mesh": {"pp": 4}} | PP,
        "tp2-sp x zero3 tensors": {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3,
                                   "sequence_parallel": True, "more": KEEP},
        "pp2 x zero1 offload": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 1,
                                "more": {"offload": {"activations": 1.0, "states": "optimizer"}}}
        | PP,
    },
}  # fmt: skip


SLOW = (
    "gpt accumulation", "gpt recompute selective", "gpt bf16 accumulation",
    "gpt ddp accumulation", "gpt zero1", "gpt zero2", "gpt zero3 recompute full",
    "gpt tp-sp selective", "gpt tp-sp full accumulation", "gpt gpipe", "gpt 1f1b full",
    "gpt bf16 ddp", "gpt bf16 zero3", "gpt bf16 1f1b", "gpt pp2 x zero3 gpipe",
    "gpt pp2x2 x zero3", "gpt pp2 x ddp2", "gpt hsdp zero1", "gpt tp2 x pp2", "gpt tp2-sp x zero3",
    "gpt pp4", "gpt elementwise", "gpt per_op", "gpt offload disk", "gpt offload full",
    "gpt offload optimizer", "gpt zero3 tensors", "gpt zero3 offload", "gpt tp-sp per_op",
    "gpt 1f1b elementwise offload", "gpt gpipe tokens", "gpt interleaved offload",
    "gpt bf16 zero3 tensors", "gpt tp2-sp x zero3 tensors", "gpt pp2 x zero1 offload",
    "llama tp-sp per_op", "llama gpipe tokens", "llama hsdp zero1",
    "llama tp2-sp x pp2", "llama pp2 x zero3 gpipe",
)  # fmt: skip
"""Families left to the long run: each part of them is in a family of the default run."""


def names(world: int, slow: bool = False) -> list[tuple[str, str]]:
    """(model, family) of the default run or of the long one."""
    every = [(model, family) for model in MODELS for family in FAMILIES[world]]
    return [name for name in every if (" ".join(name) in SLOW) == slow]


def tokens(step: int) -> Tensor:
    """The global batch of a step, (BATCH, SEQ + 1): arithmetic series, which are soon learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    start_B = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    stride_B = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (start_B + stride_B * torch.arange(SEQ + 1)) % VOCAB


def replica_tokens(plan: Plan, coordinates: dict[str, int], step: int) -> Tensor:
    """The contiguous slice of the global batch that a data-parallel rank trains on."""
    rank = coordinates["dp_replicate"] * plan.phase.mesh.dp_shard + coordinates["dp_shard"]
    return tokens(step).chunk(plan.phase.mesh.dp)[rank]


def train(trainer: Trainer, steps: int = STEPS) -> dict[str, Any]:
    """Losses of all steps, gradients of the first, collectives and copies of the last."""
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    copied: dict[str, float] = {}
    counter = CollectiveCounter(trainer.mesh)
    for step in range(steps):
        trainer.away.take_copied()
        with counter if step == steps - 1 else nullcontext():
            batch = replica_tokens(trainer.plan, trainer.coordinates, step)
            local = trainer.forward_backward(batch)
        losses.append(trainer.global_loss(local))
        if step == 0:
            gradients = {k: v.clone() for k, v in trainer.named_gradients().items()}
        trainer.optimizer_step()
        copied = trainer.away.take_copied()
    calls = Counter((c.kind, c.axis, c.message_bytes) for c in counter.calls if c.kind != "recv")
    return {
        "losses": losses,
        "gradients": gradients,
        "collectives": dict(calls),
        "copied": copied,
        "off_device": trainer.away.made_bytes(),
    }


def reference(model: Model, steps: int = STEPS) -> dict[str, Any]:
    """The same training as a plain loop over one plain module."""
    plan = make_plan(model)
    piece = Decoder(model, 0, model.num_layers - 1)
    with torch.no_grad():
        for name, parameter in piece.named_parameters():
            shape, seed = tuple(parameter.shape), plan.workload.seed
            parameter.copy_(init.full_parameter(name, shape, model, seed, torch.device("cpu")))
    optimizer = torch.optim.AdamW(piece.parameters(), lr=plan.workload.learning_rate,
                                  betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)  # fmt: skip
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        batch = tokens(step)
        logits = piece(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {k: p.grad.clone() for k, p in piece.named_parameters()
                         if p.grad is not None}  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}
