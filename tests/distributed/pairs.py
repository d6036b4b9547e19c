"""Every technique of the catalog as a part of a tiny plan on two processes, and their pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import expert_families
import families
import msgspec
from low_precision import WIDE

from forerun.catalogs import names
from forerun.errors import InputError
from forerun.plan import Plan


@dataclass(frozen=True)
class Use:
    """How a plan uses a technique."""

    techniques: dict[str, dict[str, Any]] = field(default_factory=dict)
    phase: dict[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    routed: bool = False
    """Whether it is about routed experts, which the model then has."""


USES: dict[str, Use] = {
    "adamw-fp8": Use(optimizer="adamw_fp8"),
    "adamw-fp8-block": Use(optimizer="adamw_fp8_block"),
    "adamw-offload": Use(optimizer="adamw_offload"),
    "adamw4bit": Use(optimizer="adamw4bit"),
    "adamw8bit": Use(optimizer="adamw8bit"),
    "attention": Use({"attention": {"kernel": "unfused"}}),
    "co2": Use({"local-sgd": {"period": 2, "outer": "co2"}}),
    "diloco": Use({"local-sgd": {"period": 2, "outer": "diloco", "delay": 1}}),
    "expert-placement": Use(expert_families.PERMUTED["more"], {"mesh": {"ep": 2}}, routed=True),
    "gptq": Use({"lora": {"rank": 8, "base": "gptq3_g32"}}),
    "halo": Use({"precision": {"compute": "int8", "recipe": "halo2"}}),
    "local-sgd": Use({"local-sgd": {"period": 2, "outer": "average"}}),
    "lora": Use({"lora": {"rank": 8, "base": "nf4"}}),
    "low-precision": Use({"precision": {"compute": "fp8", "recipe": "coat"}}),
    "offload": Use({"offload": {"activations": 0.5}}),
    "precision": Use({"precision": {"compute": "bf16"}}),
    "recompute": Use({"recompute": {"mode": "full"}}),
    "sequence-parallel": Use(phase={"mesh": {"tp": 2}, "sequence_parallel": True}),
    "storage": Use({"precision": {"activations": "fp8"}}),
    "zero": Use(phase={"mesh": {"dp_shard": 2}, "zero": 3}),
}
"""One way to use each; a technique that is not here is used by its name, without settings."""
WORLD = 2


def use_of(technique: str) -> Use:
    """How the test's plans use a technique."""
    return USES.get(technique) or Use({technique: {}})


def pairs() -> list[tuple[str, str]]:
    """All pairs of the catalog, each technique with itself included: that is it alone."""
    known = names("techniques")
    return [(name, name) for name in known] + list(combinations(known, 2))


def plan_of(first: str, second: str) -> Plan:
    """The plan that uses both; raises InputError where a plan cannot even say so."""
    uses = [use_of(name) for name in dict.fromkeys((first, second))]
    optimizers = [use.optimizer for use in uses if use.optimizer]
    if len(optimizers) > 1:
        raise InputError("optimizer", ", ".join(optimizers), "a workload has one optimiser",
                         "choose one")  # fmt: skip
    bases = [str(use.techniques["lora"]["base"]) for use in uses if "lora" in use.techniques]
    if len(bases) > 1:
        raise InputError("lora.base", ", ".join(bases), "frozen weights are stored in one way",
                         "choose one")  # fmt: skip
    techniques: dict[str, dict[str, Any]] = {"precision": {"compute": "fp32"}}
    phase: dict[str, Any] = {"mesh": {}}
    for use in uses:
        for name, settings in use.techniques.items():
            techniques[name] = {**techniques.get(name, {}), **settings}
        phase |= {**use.phase, "mesh": {**phase["mesh"], **use.phase.get("mesh", {})}}
    mesh = phase["mesh"]
    if "tp" in mesh:
        mesh["dp_shard"] = 1  # two processes: what ZeRO would shard over is one rank
    elif "dp_shard" not in mesh:
        mesh["dp_replicate"] = WORLD
    model = expert_families.MOE if any(use.routed for use in uses) else WIDE
    plan = families.make_plan(model, **phase)
    settings = tuple(msgspec.structs.replace(s, techniques=techniques) for s in plan.phase.settings)
    workload = msgspec.structs.replace(plan.workload, optimizer=(optimizers or ["adamw"])[0])
    return msgspec.structs.replace(
        plan,
        phases=(msgspec.structs.replace(plan.phase, settings=settings),),
        workload=workload,
    )


def executed() -> list[tuple[str, str]]:
    """The pairs that are not refused."""
    from forerun.executors.build import check_supported

    found: list[tuple[str, str]] = []
    for pair in pairs():
        try:
            check_supported(plan_of(*pair))
        except InputError:
            continue
        found.append(pair)
    return found
