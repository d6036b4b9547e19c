"""Layouts of adapters beside frozen weights, as they come and in few bits, for process groups."""

from __future__ import annotations

from typing import Any

import families
import torch
from families import PP
from low_precision import WIDE

from forerun.costmodel.simulate import Simulation
from forerun.executors.build import build
from forerun.plan import Plan

STEPS = 3
LORA: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "qv": {"rank": 4, "targets": "qv"},
    "nf4": {"rank": 4, "base": "nf4"},
    "gptq": {"rank": 4, "base": "gptq3_g32"},
}
"""Settings by the first word of a family's name; a second one may be bf16."""
TP_SP = {"mesh": {"tp": 2}, "sequence_parallel": True}
FSDP = {"mesh": {"dp_shard": 2}, "zero": 3}
FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {},
    2: {
        "lora tp": {"mesh": {"tp": 2}},
        "nf4 tp-sp": TP_SP,
        "gptq zero3": FSDP,
        "nf4 bf16 zero3": FSDP,
        "lora zb-h1": {"mesh": {"pp": 2}, "schedule": "zb-h1"} | PP,
        "gptq tp": {"mesh": {"tp": 2}, "recompute": "full"},
        "qv ddp": {"mesh": {"dp_replicate": 2}},
        "gptq bf16 1f1b": {"mesh": {"pp": 2}} | PP,
        "nf4 cp": {"mesh": {"cp": 2}},
        "lora ulysses": {"mesh": {"cp": 2, "ulysses": 2}},
    },
    4: {
        "nf4 tp2-sp x zero3": {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3,
                               "sequence_parallel": True},
        "gptq pp2 x zero3": {"mesh": {"pp": 2, "dp_shard": 2}, "zero": 3} | PP,
        "lora hsdp": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3,
                      "micro_batch_seqs": 1},
    },
}  # fmt: skip
CHAIN = ("gptq zero3", "gptq tp", "gptq zero3")
"""Layouts of two processes that hand a training on, a step each."""
SLOW = ("gptq tp", "qv ddp", "gptq bf16 1f1b", "nf4 cp", "lora ulysses", *FAMILIES[4])
"""Families that the default run of the tests leaves out."""


def names(world: int, slow: bool) -> list[tuple[str, str]]:
    """(model, family) of the default run, or all of them; tests are the single process."""
    return [("wide", f"adapters {f}") for f in FAMILIES.get(world, {}) if slow or f not in SLOW]


def plan_of(family: str, world: int) -> Plan:
    """The plan of a family; of one process that of its settings."""
    kind, *words = family.removeprefix("adapters ").split()
    dtype = "bf16" if "bf16" in words else "fp32"
    layout = FAMILIES[world][family.removeprefix("adapters ")] if world > 1 else {}
    return families.make_plan(WIDE, dtype=dtype, more={"lora": LORA[kind]}, **layout)


def run(family: str, world: int) -> dict[str, Any]:
    """Losses, gradients and collectives of some steps, and what was predicted of these."""
    plan = plan_of(family, world)
    found = families.train(build(plan, device=torch.device("cpu")), STEPS)
    return found | {"predicted": Simulation(plan, plan.phase).wire_bytes()}
