"""Layouts of 8-bit linears, stored activations and 8-bit moments, for process groups.

A family is compared with the single process of the same settings: scales of whole tensors follow
what a rank holds of them, so that layouts agree up to the rounding of 8 bits, and exactly where
nothing 8-bit is cut.
"""

from __future__ import annotations

from typing import Any

import families
import msgspec
import torch
from families import PP, SPLIT_BATCH, VOCAB
from torch import Tensor

from forerun.executors.build import build
from forerun.executors.torch_compat import DTensor
from forerun.model import Layer, Model
from forerun.plan import Plan

STEPS = 6
WIDE = Model(
    name="wide-llama",
    hidden=128,
    vocab=VOCAB,
    layers=(Layer(repeat=2, heads=4, kv_heads=2, head_dim=32, ffn_hidden=256),),
)
COAT: dict[str, Any] = {"compute": "fp8", "recipe": "coat", "activations": "fp8"}
STORED: dict[str, Any] = {"compute": "fp32", "activations": "fp8"}
LOW: dict[str, Any] = {"compute": "fp8", "recipe": "coat"}
HALO: dict[str, Any] = {"compute": "int8", "recipe": "halo2-xh"}
GATHERED: dict[str, Any] = {"compute": "int8", "recipe": "halo2-hq-xh"}
FP32: dict[str, Any] = {"compute": "fp32"}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "coat": (COAT, "adamw_fp8"),
    "stored": (STORED, "adamw"),
    "low": (LOW, "adamw_fp8"),
    "halo": (HALO, "adamw"),
    "gathered": (GATHERED, "adamw"),
    "moments": (FP32, "adamw_fp8"),
    "blocks": (FP32, "adamw_fp8_block"),
}
"""Precision and optimiser by the first word of a family's name."""
FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {name: {} for name in SETTINGS},
    2: {
        "coat zero3": {"mesh": {"dp_shard": 2}, "zero": 3} | SPLIT_BATCH,
        "coat tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True},
        "coat 1f1b": {"mesh": {"pp": 2}, "schedule": "1f1b"} | PP,
        "gathered zero3": {"mesh": {"dp_shard": 2}, "zero": 3} | SPLIT_BATCH,
        "halo tp-sp": {"mesh": {"tp": 2}, "sequence_parallel": True},
        "gathered 1f1b": {"mesh": {"pp": 2}, "schedule": "1f1b"} | PP,
        "gathered zero1 full": {"mesh": {"dp_shard": 2}, "zero": 1, "recompute": "full"},
        "stored ddp": {"mesh": {"dp_replicate": 2}},
        "moments ddp": {"mesh": {"dp_replicate": 2}},
        "moments zero3": {"mesh": {"dp_shard": 2}, "zero": 3},
        "coat zero3 selective": {"mesh": {"dp_shard": 2}, "zero": 3, "recompute": "selective"},
        "low zero3 full": {"mesh": {"dp_shard": 2}, "zero": 3, "recompute": "full"},
        "blocks zero1": {"mesh": {"dp_shard": 2}, "zero": 1},
    },
    4: {
        "coat tp2-sp x zero3": {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3,
                                "sequence_parallel": True},
        "coat pp2 x zero3": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 3} | PP,
        "gathered tp2-sp x zero3": {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3,
                                    "sequence_parallel": True},
        "gathered pp2 x zero3": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 3} | PP,
        "gathered hsdp": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                          "micro_batch_seqs": 1},
        "coat hsdp": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                      "micro_batch_seqs": 1},
        "stored tp2 x ddp2": {"mesh": {"tp": 2, "dp_replicate": 2}},
        "moments pp2 x ddp2": {"mesh": {"pp": 2, "dp_replicate": 2}} | PP,
    },
}  # fmt: skip


SLOW = (
    "stored ddp",
    "gathered 1f1b",
    "gathered zero1 full",
    "coat zero3 selective",
    "low zero3 full",
    "blocks zero1",
    *FAMILIES[4],
)
"""Families that the default run of the tests leaves out."""


def names(world: int, slow: bool) -> list[tuple[str, str]]:
    """(model, family) of the default run, or all of them; tests are the single process."""
    return [
        ("wide", family)
        for family in (FAMILIES.get(world, {}) if world > 1 else ())
        if slow or family not in SLOW
    ]


def plan_of(family: str, world: int) -> Plan:
    """The plan of a family."""
    precision, optimizer = SETTINGS[family.split()[0]]
    plan = families.make_plan(WIDE, **FAMILIES[world][family])
    settings = tuple(
        msgspec.structs.replace(s, techniques={**s.techniques, "precision": precision})
        for s in plan.phase.settings
    )
    return msgspec.structs.replace(
        plan,
        phases=(msgspec.structs.replace(plan.phase, settings=settings),),
        workload=msgspec.structs.replace(plan.workload, optimizer=optimizer),
    )


def run(family: str, world: int) -> dict[str, Any]:
    """Losses, gradients and collectives of some steps, and the optimiser's states."""
    trainer = build(plan_of(family, world), device=torch.device("cpu"))
    found = families.train(trainer, STEPS)
    states: dict[str, dict[str, Tensor]] = {}
    for piece in trainer.pieces:
        for name, parameter in piece.named_parameters():
            kept = trainer.optimizer.state[parameter]
            states[name] = {key: _local(value) for key, value in kept.items()}
    return found | {"states": states, "coordinates": trainer.coordinates}


def _local(value: Tensor) -> Tensor:
    local = value.to_local() if isinstance(value, DTensor) else value
    dequantize = getattr(local, "dequantize", None)  # torchao's states
    flat = dequantize() if dequantize is not None and type(local) is not Tensor else local
    return flat.detach().clone()
