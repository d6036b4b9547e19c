"""Models with routed experts, and the layouts they are run in."""

from __future__ import annotations

from typing import Any

import msgspec
from context_families import CLIPPED
from families import PP, SPLIT_BATCH, V22, VOCAB, make_plan

from forerun.experts import Experts
from forerun.model import LatentAttention, Layer, Model
from forerun.plan import Plan

ROUTED = Layer(repeat=3, heads=4, kv_heads=2, head_dim=8,
               experts=Experts(num_experts=8, top_k=2, ffn_hidden=24))  # fmt: skip
MOE = Model(
    name="tiny-moe",
    hidden=32,
    vocab=VOCAB,
    layers=(Layer(repeat=1, heads=4, kv_heads=2, head_dim=8, ffn_hidden=64), ROUTED),
)
MLA = Model(
    name="tiny-mla-moe",
    hidden=32,
    vocab=VOCAB,
    layers=(
        Layer(
            repeat=4, heads=4, kv_heads=4, head_dim=12,
            latent=LatentAttention(q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
                                   qk_rope_head_dim=4, v_head_dim=8),
            experts=Experts(num_experts=8, top_k=2, ffn_hidden=16, shared_ffn_hidden=24,
                            scores="sigmoid", routed_scale=1.5),
        ),
    ),
)  # fmt: skip


def with_capacity(model: Model, **changes: Any) -> Model:
    """The model with other settings of its experts."""
    replace = msgspec.structs.replace
    layers = [
        layer if layer.experts is None else
        replace(layer, experts=replace(layer.experts, **changes))
        for layer in model.layers
    ]  # fmt: skip
    return replace(model, layers=tuple(layers))


MODELS = {
    "moe": MOE,
    "mla": MLA,
    "capacity": with_capacity(MOE, capacity_factor=1.0),
    "positions": with_capacity(MOE, capacity_factor=0.75, drop="position"),
}

GLOBAL = {
    "workload": {
        "balance_loss": "global-batch",
        "balance_loss_coef": 0.5,
        "router_z_loss_coef": 0.3,
    }
}
LOCAL = {"workload": {"balance_loss": "micro-batch", "balance_loss_coef": 0.5}}
TWICE = {"more": {"expert-placement": {"slots": [[7, 0, 3, 5, 1], [2, 4, 6, 0, 7]]}}}
"""Two experts on both ranks."""
PERMUTED = {"more": {"expert-placement": {"slots": [[7, 0, 3, 5], [2, 4, 6, 1]]}}}
SP, FULL = {"sequence_parallel": True}, {"recompute": "full"}
OFFLOAD = {"more": {"offload": {"states": "experts"}}}
STATES = {"more": {"offload": {"states": "optimizer"}}}


def mesh(**degrees: int) -> dict[str, Any]:
    return {"mesh": degrees}


QUICK: dict[int, dict[tuple[str, str], dict[str, Any]]] = {
    1: {
        ("moe", "plain"): {},
        ("mla", "full, global balance"): FULL | SPLIT_BATCH | GLOBAL,
        ("capacity", "offload"): OFFLOAD,
        ("mla", "offload optimizer"): STATES,
    },
    2: {
        ("moe", "ep2 ddp, global balance"): mesh(dp_replicate=2, ep=2) | SPLIT_BATCH | FULL
        | GLOBAL,
        ("mla", "ep2 zero3"): mesh(dp_shard=2, ep=2) | {"zero": 3} | FULL,
        ("moe", "tp"): mesh(tp=2) | SPLIT_BATCH | LOCAL,
        ("mla", "ep2 over tp"): mesh(tp=2, ep=2) | SP | {"recompute": "selective"},
        ("capacity", "ep2 zero1"): mesh(dp_shard=2, ep=2) | {"zero": 1} | SPLIT_BATCH,
        ("moe", "clip ep2 zero3, replicas"): mesh(dp_shard=2, ep=2) | {"zero": 3} | TWICE
        | SPLIT_BATCH | CLIPPED,
        ("moe", "zero3"): mesh(dp_shard=2) | {"zero": 3},
    },
    4: {
        ("mla", "ep2 x tp2-sp"): mesh(dp_replicate=2, tp=2, ep=2) | SP | GLOBAL,
        ("moe", "ep2 x pp2 zb-h1"): mesh(dp_replicate=2, pp=2, ep=2)
        | {"schedule": "zb-h1"} | PP | FULL | GLOBAL,
        ("capacity", "ep4 over tp2"): mesh(dp_shard=2, tp=2, ep=4) | SP | {"zero": 2},
    },
}  # fmt: skip
SLOW: dict[int, dict[tuple[str, str], dict[str, Any]]] = {
    1: {
        ("mla", "plain"): {},
        ("positions", "accumulation"): SPLIT_BATCH,
        ("moe", "selective, micro balance"): {"recompute": "selective"} | LOCAL,
    },
    2: {
        ("moe", "ep2 ddp"): mesh(dp_replicate=2, ep=2),
        ("moe", "ep2 zero2"): mesh(dp_shard=2, ep=2) | {"zero": 2} | SPLIT_BATCH,
        ("moe", "ep2 placed"): mesh(dp_replicate=2, ep=2) | PERMUTED,
        ("mla", "ep2 ddp, replicas"): mesh(dp_replicate=2, ep=2) | TWICE | SPLIT_BATCH,
        ("mla", "ep2 over tp, replicas"): mesh(tp=2, ep=2) | SP | TWICE,
        ("mla", "tp, z-loss"): mesh(tp=2) | GLOBAL,
        ("moe", "tp-sp"): mesh(tp=2) | SP | FULL | GLOBAL,
        ("capacity", "tp-sp"): mesh(tp=2) | SP,
        ("capacity", "tp"): mesh(tp=2),
        ("capacity", "ep2 over tp"): mesh(tp=2, ep=2) | SP | FULL,
        ("positions", "ep2 placed"): mesh(dp_replicate=2, ep=2) | PERMUTED,
        ("mla", "gpipe"): mesh(pp=2) | {"schedule": "gpipe"} | PP | LOCAL,
        ("moe", "interleaved"): mesh(pp=2, vpp=2) | {"schedule": "interleaved"} | PP | FULL
        | GLOBAL,
        ("moe", "ep2 zero1, offload"): mesh(dp_shard=2, ep=2) | {"zero": 1} | OFFLOAD,
        ("moe", "ep2 zero1, offload optimizer"): mesh(dp_shard=2, ep=2) | {"zero": 1} | STATES,
        ("moe", "zb-h1, global balance"): mesh(pp=2) | {"schedule": "zb-h1"} | PP | GLOBAL,
        ("mla", "zb-v full"): {"mesh": V22, "schedule": "zb-v"} | PP | FULL,
        ("capacity", "dualpipev"): {"mesh": V22, "schedule": "dualpipev"} | PP,
        ("moe", "clip ep2 ddp, replicas"): mesh(dp_replicate=2, ep=2) | TWICE | CLIPPED,
        ("mla", "clip ep2 zero3"): mesh(dp_shard=2, ep=2) | {"zero": 3} | CLIPPED,
        ("moe", "clip tp"): mesh(tp=2) | CLIPPED,
        ("mla", "clip ep2 over tp"): mesh(tp=2, ep=2) | SP | CLIPPED,
        ("moe", "bf16 ep2 zero3"): mesh(dp_shard=2, ep=2) | {"zero": 3, "dtype": "bf16"},
    },
    4: {
        ("moe", "ep4"): mesh(dp_replicate=4, ep=4) | GLOBAL,
        ("mla", "ep2 x ddp2"): mesh(dp_replicate=4, ep=2) | LOCAL,
        ("mla", "ep4 zero2"): mesh(dp_shard=4, ep=4) | {"zero": 2, "micro_batch_seqs": 1},
        ("moe", "hsdp ep2"): mesh(dp_replicate=2, dp_shard=2, ep=2) | {"zero": 3},
        ("mla", "hsdp ep4"): mesh(dp_replicate=2, dp_shard=2, ep=4) | {"zero": 3},
        ("mla", "hsdp ep2, replicas"): mesh(dp_replicate=2, dp_shard=2, ep=2) | {"zero": 2}
        | TWICE,
        ("moe", "fsdp2 x ep2, replicas"): mesh(dp_shard=4, ep=2) | {"zero": 1} | TWICE,
        ("moe", "ep2 x fsdp2"): mesh(dp_shard=4, ep=2) | {"zero": 3},
        ("moe", "ep2 x tp2"): mesh(dp_replicate=2, tp=2, ep=2) | GLOBAL,
        ("moe", "ep2 x tp2-sp"): mesh(dp_shard=2, tp=2, ep=2) | {"zero": 3} | SP | FULL,
        ("mla", "ep4 over tp2"): mesh(dp_replicate=2, tp=2, ep=4) | SP | GLOBAL,
        ("capacity", "ep2 x tp2-sp"): mesh(dp_shard=2, tp=2, ep=2) | {"zero": 3} | SP,
        ("capacity", "ep2 x pp2"): mesh(dp_replicate=2, pp=2, ep=2) | PP,
        ("moe", "ep2 x pp2"): mesh(dp_shard=2, pp=2, ep=2) | {"zero": 1} | PP | FULL | GLOBAL,
        ("moe", "ep2 x pp2 zb-h1 x zero1"): mesh(dp_shard=2, pp=2, ep=2)
        | {"zero": 1, "schedule": "zb-h1"} | PP | FULL | GLOBAL,
        ("moe", "clip ep2 x pp2 zb-h1"): mesh(dp_replicate=2, pp=2, ep=2)
        | {"schedule": "zb-h1"} | PP | CLIPPED,
        ("moe", "clip hsdp ep2, replicas"): mesh(dp_replicate=2, dp_shard=2, ep=2) | {"zero": 2}
        | TWICE | CLIPPED,
        ("mla", "ep2 x pp2x2 x zero3"): mesh(dp_shard=2, pp=2, vpp=2, ep=2)
        | {"zero": 3, "schedule": "interleaved"} | PP,
    },
}  # fmt: skip


def names(world: int, slow: bool = False) -> list[tuple[str, str]]:
    """(model, family) of the default run, or all of them."""
    return list(QUICK.get(world, {})) + (list(SLOW.get(world, {})) if slow else [])


def plan_of(world: int, model: str, family: str) -> Plan:
    """The plan of a family."""
    every = QUICK.get(world, {}) | SLOW.get(world, {})
    return make_plan(MODELS[model], **every[model, family])
