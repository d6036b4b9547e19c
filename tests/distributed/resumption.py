"""Checkpoints within a process group: written by one layout, read by the same and by others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import expert_families
import families
import torch
import torch.distributed as dist
from torch import Tensor

from forerun.executors.build import build
from forerun.executors.checkpoints import folder, reader
from forerun.executors.checkpoints.folder import Checkpoint
from forerun.executors.checkpoints.shards import named_parameters
from forerun.executors.checkpoints.writer import Writer
from forerun.executors.trainer import Trainer
from forerun.plan import Plan

SAME = {1: ("accumulation",), 2: ("1f1b",), 4: ("ddp4",)}
"""Families of the default run that go on in their own layout; `ddp4` sums over more than two."""

CHAIN = {
    2: {
        "llama": ("zero3", "tp-sp", "zigzag zero3", "zb-v"),
        "moe": ("ep2 ddp", "zero3", "ep2 zero2"),
    },
    4: {"gpt": ("tp2 x ddp2", "pp2x2 x zero3", "tp2-sp x zero3")},
}
"""Layouts of the default run that hand a training on, a step each."""

LONG_CHAIN = {
    1: ("plain", "accumulation", "recompute full"),
    2: ("zero3", "tp-sp", "interleaved", "ddp", "zb-v", "zero1", "tp", "1f1b", "ring full"),
    4: ("tp2 x ddp2", "pp2x2 x zero3", "tp2-sp x zero3", "pp4", "hsdp zero3", "tp2 x pp2", "ddp4",
        "pp2 x zero1", "cp2 x hsdp"),
}  # fmt: skip
LONG_EXPERT_CHAIN = {4: ("hsdp ep2", "ep2 x tp2-sp", "ep2 x fsdp2")}
"""The same of a mixture of experts."""

DDP4 = {"mesh": {"dp_replicate": 4}, "micro_batch_seqs": 1}


def plan_of(model: str, family: str, world: int) -> Plan:
    if family == "ddp4":
        return families.make_plan(families.MODELS[model], **DDP4)
    kind = families if model in families.MODELS else expert_families
    return kind.plan_of(world, model, family)


def facts(plan: Plan) -> Checkpoint:
    """The document of a checkpoint of a plan."""
    return Checkpoint(
        step=0, model=plan.model.name, model_digest=folder.model_digest(plan.model), plan_digest="",
        label=plan.label, seed=7, seq_tokens=families.SEQ, global_batch_seqs=families.BATCH,
        learning_rate=1e-3, precision="fp32", data_digest="", torch="", date="",
    )  # fmt: skip


def steps(trainer: Trainer, first: int, last: int) -> list[float]:
    """Losses of the steps from `first` to before `last`."""
    losses: list[float] = []
    for step in range(first, last):
        batch = families.replica_rows(trainer.plan, trainer.coordinates, step)
        losses.append(trainer.global_loss(trainer.forward_backward(batch)))
        trainer.optimizer_step()
    return losses


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Whole parameters and moments of this rank's pieces, by name."""
    found = {name: full.clone() for name, full in trainer.named_parameters_full().items()}
    for name, parameter in named_parameters(trainer):
        for key, value in trainer.optimizer.state[parameter].items():
            whole = trainer._full(name, value) if value.dim() else value
            found[f"{name}.{key}"] = whole.clone()
    return found


def save(trainer: Trainer, place: Path, step: int, group: Any) -> str:
    """Write a checkpoint and wait for it; what went wrong."""
    writer = Writer(place, facts(trainer.plan), 2, group)
    writer.save(trainer, step, [0.5] * step)
    (outcome,) = writer.wait()
    writer.close()
    return outcome.problem


def resumed(plan: Plan, place: Path, step: int, group: Any) -> tuple[Trainer, list[float]]:
    """A new trainer that goes on from a step, and the losses that were kept."""
    trainer = build(plan, device=torch.device("cpu"))
    found, _ = reader.find([place], plan.model, group)
    assert found is not None and found[1].step == step
    batch = families.replica_rows(plan, trainer.coordinates, 0)
    losses = reader.load(trainer, *found, group, lambda: trainer.forward_backward(batch))
    return trainer, losses


def same_layout(model: str, family: str, world: int, place: Path) -> dict[str, Any]:
    """Five steps at once against three and two after a resumption."""
    group = dist.new_group(backend="gloo")
    plan = plan_of(model, family, world)
    trainer = build(plan, device=torch.device("cpu"))
    steps(trainer, 0, 3)
    problem = save(trainer, place, 3, group)
    losses = steps(trainer, 3, 5)
    again, kept = resumed(plan, place, 3, group)
    return {
        "problem": problem,
        "kept": kept,
        "losses": (losses, steps(again, 3, 5)),
        "equal": _equal(everything(trainer), everything(again)),
    }


def chain(model: str, layouts: tuple[str, ...], world: int, place: Path) -> dict[str, Any]:
    """One training, handed from layout to layout; what each starts with is what was left."""
    group = dist.new_group(backend="gloo")
    losses: list[float] = []
    equal: list[bool] = []
    before: list[dict[str, Tensor]] = [{}] * world
    for step, family in enumerate(layouts):
        plan = plan_of(model, family, world)
        if step == 0:
            trainer = build(plan, device=torch.device("cpu"))
        else:
            trainer, _ = resumed(plan, place, step, group)
            known = {name: value for part in before for name, value in part.items()}
            mine = everything(trainer)
            equal.append(_equal({name: known[name] for name in mine}, mine))
        losses += steps(trainer, step, step + 1)
        assert save(trainer, place, step + 1, group) == ""
        mine = everything(trainer)
        dist.all_gather_object(before, mine, group=group)
    return {"losses": losses, "equal": equal}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def selected(world: int, slow: bool) -> tuple[list[tuple[str, str]], dict[str, tuple[str, ...]]]:
    """(model, family) of what goes on in its layout, and layouts by model of what is handed on."""
    if not slow:
        return [("gpt", family) for family in SAME[world]], CHAIN.get(world, {})
    every = [(model, family) for model in families.MODELS for family in families.FAMILIES[world]]
    layouts = LONG_CHAIN.get(world)
    chains = {model: layouts for model in families.MODELS} if layouts else {}
    if world in LONG_EXPERT_CHAIN:
        chains["moe"] = LONG_EXPERT_CHAIN[world]
    return every, chains


def tasks(
    world: int, place: Path, slow: bool
) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """What a rank does, by (model, what)."""
    found: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}
    same, chains = selected(world, slow)
    for name, family in same:
        own = place / name / family.replace(" ", "-")
        found[name, f"resume {family}"] = partial(same_layout, name, family, world, own)
    for name, layouts in chains.items():
        found[name, "chain"] = partial(chain, name, layouts, world, place / name / "chain")
    return found
