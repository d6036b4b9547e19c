"""Tiny models, the layouts they are run in, and the plain loop they are compared with."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import context_families
import selections
import torch
from context_families import CLIPPED
from plain_loop import LEARNING_RATE, SEED, train_plainly, whole_model
from torch import Tensor

from forerun.cluster import Cluster, Device, Link, Pool
from forerun.executors.data import Rows
from forerun.executors.decoder import Decoder
from forerun.executors.measure.comm import CollectiveCounter
from forerun.executors.measure.memory import LiveTensors
from forerun.executors.trainer import Trainer
from forerun.lengths import Lengths
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, Stage, even_stages, techniques
from forerun.stack import Stack
from forerun.workload import Workload

SEQ, STEPS, BATCH, VOCAB = 32, selections.STEPS["slow"], 8, 256
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
LENGTHS = Lengths.of("documents", [1, 3, 6, 9, 14, 32], "made up")
MODELS = {"llama": LLAMA, "gpt": GPT}


def cluster(num_devices: int) -> Cluster:
    """A cluster of CPU processes; its rates are not used here."""
    device = Device(name="cpu", kind="cpu", memory_bytes=2**30, memory_bytes_per_s=1e10,
                    peak_flops_per_s={"fp32": 1e11})  # fmt: skip
    link = Link(latency_s=1e-5, bytes_per_s=1e9)
    pool = Pool(name="cpu", device=device, devices_per_node=num_devices, intra_node=link,
                host=link, disk=link,
                stack=Stack(name="torch", gemm_efficiency={"fp32": 1.0}, can_overlap=False,
                            exchanges_counts=True))  # fmt: skip
    return Cluster(name="cpus", pools=(pool,))


def make_plan(
    model: Model,
    *,
    recompute: str = "none",
    dtype: str = "fp32",
    runtime: str = "eager",
    micro_batch_seqs: int = 0,
    mesh: dict[str, int] | None = None,
    cut: tuple[int, ...] = (),
    clip_norm: float | None = None,
    cp_kind: str | None = None,
    packed: bool = False,
    more: dict[str, dict[str, Any]] | None = None,
    workload: dict[str, Any] | None = None,
    **phase: Any,
) -> Plan:
    """A plan of one phase on CPU processes; micro_batch_seqs 0 = the whole replica at once, `cut`:
    layers of every stage where they are not as equal as can be.

    `more` are further techniques, `workload` further settings of it.
    """
    degrees = Mesh(**(mesh or {}))
    micro = micro_batch_seqs or BATCH // degrees.dp
    last = model.num_layers - 1
    stages = even_stages(model.num_layers, degrees.num_stages, "cpu")
    if cut:
        ends = [sum(cut[: i + 1]) for i in range(len(cut))]
        firsts = [end - size for end, size in zip(ends, cut, strict=True)]
        pairs = zip(firsts, ends, strict=True)
        stages = tuple(Stage(pool="cpu", layers=(first, end - 1)) for first, end in pairs)
    chosen = techniques(dtype, recompute)
    if runtime != "eager":
        chosen["runtime"] = {"mode": runtime}
    if cp_kind is not None:
        chosen["context-parallel"] = {"kind": cp_kind}
    plan = Plan(
        model=model,
        cluster=cluster(degrees.world),
        workload=Workload(seq_tokens=SEQ, global_batch_seqs=BATCH, steps=STEPS, seed=SEED,
                          learning_rate=LEARNING_RATE, clip_norm=clip_norm,
                          lengths=LENGTHS if packed else None, **(workload or {})),
        phases=(
            Phase(
                steps=STEPS,
                seq_tokens=SEQ,
                micro_batch_seqs=micro,
                num_microbatches=BATCH // degrees.dp // micro,
                mesh=degrees,
                stages=stages,
                settings=(Setting(layers=(0, last), techniques=chosen | (more or {})),),
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
ONE = {"micro_batch_seqs": 1}
V22 = {"pp": 2, "vpp": 2}
ORDERS = {
    "0": ("0F1", "0F0", "0F2", "0F3", "0B1", "0I0", "0I2", "0W2", "0W0", "0B3"),
    "1": ("1F1", "1I1", "1F0", "1I0", "1W0", "1W1", "1F2", "1B2", "1F3", "1I3", "1W3"),
}
"""Micro-batches out of order, whole and split backwards of one stage."""
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
        "compiled": {"runtime": "compiled"},
        "compiled recompute full": {"runtime": "compiled", "recompute": "full"},
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
        "zb-h1 tensors offload": {"mesh": {"pp": 2}, "schedule": "zb-h1",
                                  "more": KEEP | {"offload": HALF}} | PP,
        "zb-v offload": {"mesh": V22, "schedule": "zb-v",
                         "more": {"offload": {"activations": 1.0, "tier": "disk"}}} | PP,
        "interleaved offload": {"mesh": {"pp": 2, "vpp": 2}, "schedule": "interleaved",
                                "more": {"offload": HALF}} | PP,
        "bf16 zero3 tensors": {"mesh": {"dp_shard": 2}, "zero": 3, "dtype": "bf16", "more": KEEP},
        "bf16 ddp": {"mesh": {"dp_replicate": 2}, "dtype": "bf16"},
        "compiled zero3": {"mesh": {"dp_shard": 2}, "zero": 3, "runtime": "compiled"},
        "bf16 zero3": {"mesh": {"dp_shard": 2}, "zero": 3, "dtype": "bf16"},
        "bf16 tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True, "dtype": "bf16"},
        "bf16 1f1b": {"mesh": {"pp": 2}, "schedule": "1f1b", "dtype": "bf16"} | PP,
        "zb-h1": {"mesh": {"pp": 2}, "schedule": "zb-h1"} | PP,
        "zb-h2": {"mesh": {"pp": 2}, "schedule": "zb-h2"} | PP,
        "interleaved-zb": {"mesh": V22, "schedule": "interleaved-zb"} | PP,
        "zb-v": {"mesh": V22, "schedule": "zb-v"} | PP,
        "dualpipev": {"mesh": V22, "schedule": "dualpipev"} | PP,
        "orders uneven": {"mesh": {"pp": 2}, "schedule": "zb-h1", "orders": ORDERS,
                          "cut": (3, 1)} | PP,
        "zb-h1 full": {"mesh": {"pp": 2}, "schedule": "zb-h1", "recompute": "full"} | PP,
        "zb-v selective": {"mesh": V22, "schedule": "zb-v", "recompute": "selective"} | PP,
        "bf16 zb-v": {"mesh": V22, "schedule": "zb-v", "dtype": "bf16"} | PP,
        "clip ddp": {"mesh": {"dp_replicate": 2}} | CLIPPED,
        "clip zero3": {"mesh": {"dp_shard": 2}, "zero": 3} | CLIPPED,
        "clip tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True} | CLIPPED,
        "clip 1f1b": {"mesh": {"pp": 2}} | PP | CLIPPED,
        "clip zb-v": {"mesh": V22, "schedule": "zb-v"} | PP | CLIPPED,
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
        "pp4 zb-h2": {"mesh": {"pp": 4}, "schedule": "zb-h2"} | PP,
        "pp2 zb-h1 x ddp2": {"mesh": {"pp": 2, "dp_replicate": 2}, "schedule": "zb-h1"} | ONE,
        "pp2x2 zb-v x zero3": {"mesh": V22 | {"dp_shard": 2}, "zero": 3, "schedule": "zb-v"} | ONE,
        "pp2x2 dualpipev x zero1": {"mesh": V22 | {"dp_shard": 2}, "zero": 1,
                                    "schedule": "dualpipev"} | ONE,
        "tp2 x pp2x2 zb-v": {"mesh": V22 | {"tp": 2}, "schedule": "zb-v"} | PP,
        "tp2-sp x pp2x2 interleaved-zb full": {
            "mesh": V22 | {"tp": 2}, "schedule": "interleaved-zb", "sequence_parallel": True,
            "recompute": "full"} | PP,
        "clip tp2-sp x pp2x2 zb-v": {"mesh": V22 | {"tp": 2}, "sequence_parallel": True,
                                     "schedule": "zb-v"} | PP | CLIPPED,
        "clip pp2 x zero1": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 1} | PP | CLIPPED,
        "clip hsdp zero3": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                            "micro_batch_seqs": 1} | CLIPPED,
    },
    8: {
        "clip pp2x2 zb-v x hsdp": {"mesh": V22 | {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                                   "schedule": "zb-v"} | ONE | CLIPPED,
        "tp2-sp x pp2 zb-h1 x zero3": {"mesh": {"pp": 2, "tp": 2, "dp_shard": 2}, "zero": 3,
                                       "schedule": "zb-h1", "sequence_parallel": True} | ONE,
        "pp4 zb-h1 x ddp2": {"mesh": {"pp": 4, "dp_replicate": 2}, "schedule": "zb-h1"} | ONE,
    },
}  # fmt: skip
for _world, _families in context_families.FAMILIES.items():
    FAMILIES.setdefault(_world, {}).update(_families)

SLOW = (
    "gpt accumulation", "gpt recompute selective", "gpt bf16 accumulation",
    "gpt ddp accumulation", "gpt zero1", "gpt zero2", "gpt zero3 recompute full",
    "gpt tp-sp selective", "gpt tp-sp full accumulation", "gpt gpipe", "gpt 1f1b full",
    "gpt bf16 ddp", "gpt bf16 zero3", "gpt bf16 1f1b", "gpt pp2 x zero3 gpipe",
    "gpt pp2x2 x zero3", "gpt pp2 x ddp2", "gpt hsdp zero1", "gpt tp2 x pp2", "gpt tp2-sp x zero3",
    "gpt elementwise", "gpt per_op", "gpt offload disk", "gpt offload full",
    "gpt offload optimizer", "gpt zero3 tensors", "gpt zero3 offload", "gpt tp-sp per_op",
    "gpt zb-h1 tensors offload", "gpt zb-v offload", "llama zb-v offload",
    "gpt 1f1b elementwise offload", "gpt gpipe tokens", "gpt interleaved offload",
    "gpt bf16 zero3 tensors", "gpt tp2-sp x zero3 tensors", "gpt pp2 x zero1 offload",
    "llama tp-sp per_op", "llama gpipe tokens", "gpt tensors", "llama elementwise",
    "llama per_op", "llama offload disk", "llama offload full", "gpt offload tokens",
    "llama offload optimizer", "gpt tp tensors offload", "gpt tp-sp tokens", "llama zero3 tensors",
    "llama interleaved offload", "llama bf16 zero3 tensors", "llama pp2 x zero1 offload",
    "gpt compiled", "llama compiled", "gpt compiled recompute full",
    "llama compiled recompute full", "gpt compiled zero3", "llama compiled zero3",
    "gpt pp4", "llama hsdp zero1", "llama tp2-sp x pp2", "llama pp2 x zero3 gpipe",
    "gpt zb-h1", "gpt zb-h2", "gpt interleaved-zb", "gpt orders uneven", "gpt zb-h1 full",
    "gpt zb-v selective", "llama zb-v selective", "llama zb-h2", "gpt bf16 zb-v", "llama clip ddp",
    "gpt clip ddp", "gpt clip zero3", "llama clip tp-sp", "llama clip 1f1b", "llama clip zb-v",
    "gpt pp4 zb-h2", "gpt pp2 zb-h1 x ddp2", "llama pp2x2 zb-v x zero3",
    "gpt pp2x2 dualpipev x zero1", "gpt tp2 x pp2x2 zb-v", "llama tp2 x pp2x2 zb-v",
    "gpt tp2-sp x pp2x2 interleaved-zb full", "llama clip tp2-sp x pp2x2 zb-v",
    "gpt clip pp2 x zero1", "llama clip pp2 x zero1", "gpt clip hsdp zero3",
    "gpt ddp", "gpt tp", "gpt interleaved", "gpt dualpipev", "gpt bf16 tp-sp",
    "gpt clip zb-v", "gpt tp2 x ddp2", "gpt hsdp zero3", "gpt pp2 x zero1",
    "gpt pp2x2 zb-v x zero3", "gpt clip tp2-sp x pp2x2 zb-v",
    "llama ddp", "llama tp-sp selective", "llama 1f1b full", "llama bf16 tp-sp", "llama bf16 1f1b",
    "llama interleaved-zb", "llama zb-h1 full", "llama tp2 x ddp2", "llama tp2-sp x zero3",
    "llama pp2 x zero1", "llama pp2x2 x zero3", "llama tp2 x pp2", "llama pp4",
    *(f"{model} {family}" for model in MODELS for family in FAMILIES[8]),
)  # fmt: skip
"""Families left to the long run: each part of them is in a family of the default run."""


def names(world: int, slow: bool = False) -> list[tuple[str, str]]:
    """(model, family) of the default run, or all of them."""
    every = [(model, family) for model in MODELS for family in FAMILIES[world]]
    return [name for name in every if slow or not is_slow(world, *name)]


def is_slow(world: int, model: str, family: str) -> bool:
    """Whether a family of a model is left to the long run."""
    name = f"{model} {family}"
    of_context = family in context_families.FAMILIES.get(world, {})
    return name not in context_families.QUICK if of_context else name in SLOW


def plan_of(world: int, model: str, family: str) -> Plan:
    """The plan of a family."""
    return make_plan(MODELS[model], **FAMILIES[world][family])


def tokens(step: int) -> Tensor:
    """The global batch of a step, (BATCH, SEQ + 1): arithmetic series, which are soon learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    start_B = torch.randint(VOCAB, (BATCH, 1), generator=generator)
    stride_B = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (start_B + stride_B * torch.arange(SEQ + 1)) % VOCAB


def document_ends(step: int) -> list[tuple[int, ...]]:
    """Ends of the documents packed into each sequence of a step's batch."""
    return [LENGTHS.packed(SEQ, 7, step, index) for index in range(BATCH)]


def replica_rows(plan: Plan, coordinates: dict[str, int], step: int) -> Rows:
    """The contiguous slice of the global batch that a data-parallel rank trains on."""
    dp = plan.phase.mesh.dp
    rank = coordinates["dp_replicate"] * plan.phase.mesh.dp_shard + coordinates["dp_shard"]
    rows = Rows.of(tokens(step).chunk(dp)[rank])
    if plan.workload.lengths is None:
        return rows
    ends = document_ends(step)
    most = max(map(len, ends))
    filled = torch.tensor([row + row[-1:] * (most - len(row)) for row in ends])
    return rows._replace(documents_BN=filled.chunk(dp)[rank])


def train(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Losses of all steps, gradients of the first; collectives, copies, live bytes of the last."""
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    copied: dict[str, float] = {}
    counter, live = CollectiveCounter(trainer.mesh), LiveTensors()
    for step in range(steps):
        trainer.away.take_copied()
        batch = replica_rows(trainer.plan, trainer.coordinates, step)
        counted = step == steps - 1
        if counted:
            trainer.observer = live
            hold_states(trainer, live)
        with counter if counted else nullcontext(), live if counted else nullcontext():
            local = trainer.forward_backward(batch)
        losses.append(trainer.global_loss(local))
        if step == 0:
            trainer.clip_gradients()
            gradients = {k: v.clone() for k, v in trainer.named_gradients().items()}
        with counter if step == steps - 1 else nullcontext():
            trainer.optimizer_step()
        copied = trainer.away.take_copied()
    calls = Counter((c.kind, c.axis, c.message_bytes) for c in counter.calls if c.kind != "recv")
    return {
        "losses": losses,
        "gradients": gradients,
        "collectives": dict(calls),
        "bytes_on_wire": counter.bytes_on_wire(),
        "copied": copied,
        "off_device": trainer.away.made_bytes(),
        "live_bytes": sum(live.peak().values()),
    }


def hold_states(trainer: Trainer, live: LiveTensors) -> None:
    """Tell the counter of live tensors what is there before the step."""
    parameters = [p for piece in trainer.pieces for p in piece.parameters()]
    states = [v for state in trainer.optimizer.state.values() for v in state.values()]
    live.hold(parameters, "parameters")
    live.hold([v for v in states if isinstance(v, Tensor)], "optimizer")


def plain_loss(piece: Decoder, step: int, packed: bool) -> Tensor:
    """The mean loss of a step's batch; of packed documents one by one, as if each were alone."""
    batch = tokens(step)
    if not packed:
        logits = piece(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    total = torch.zeros(())
    for row, ends in zip(batch, document_ends(step), strict=True):
        for start, end in pairwise((0, *ends)):
            logits = piece(row[None, start:end])[0]
            targets = row[start + 1 : end + 1]
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / (BATCH * SEQ)


def reference(model: Model, clip_norm: float | None = None, packed: bool = False) -> dict[str, Any]:
    """The same training as a plain loop over one plain module; gradients as they are clipped."""
    piece = whole_model(model)

    def backward_of(step: int) -> float:
        loss = plain_loss(piece, step, packed)
        loss.backward()
        return loss.item()

    return train_plainly(piece, backward_of, STEPS, clip_norm)
