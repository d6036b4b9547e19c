"""Modules of one's own in the layouts that they tell of, and the plain loop they equal."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import families
import torch
from plain_loop import SEED, train_plainly
from torch import Tensor

from forerun import Model, document
from forerun.executors import traced
from forerun.executors.build import build
from forerun.executors.measure.comm import CollectiveCounter
from forerun.executors.traced import TracedTrainer
from forerun.executors.user_module import UserModule, load, seed_everything
from forerun.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
TOKENS, OWN = "examples.divided:build", "own_batches:build"
LLAMA = f"hf:{ROOT / 'tests' / 'executors' / 'configs' / 'llama'}"
FILES = {TOKENS: "divided.json", OWN: "own.json", LLAMA: "llama.json"}
sys.path.insert(0, str(ROOT))
STEPS = 3
PP = {"micro_batch_seqs": 2}
FAMILIES: dict[int, dict[tuple[str, str], dict[str, Any]]] = {
    1: {},
    2: {
        (TOKENS, "tp"): {"mesh": {"tp": 2}},
        (TOKENS, "tp full accumulation"): {"mesh": {"tp": 2}, "recompute": "full"} | PP,
        (TOKENS, "1f1b"): {"mesh": {"pp": 2}} | PP,
        (OWN, "tp"): {"mesh": {"tp": 2}} | PP,
        (OWN, "zero3"): {"mesh": {"dp_shard": 2}, "zero": 3} | PP,
        (LLAMA, "tp"): {"mesh": {"tp": 2}},
        (LLAMA, "zero3 full"): {"mesh": {"dp_shard": 2}, "zero": 3, "recompute": "full"},
    },
    4: {
        (TOKENS, "tp2 x zero3"): {"mesh": {"tp": 2, "dp_shard": 2}, "zero": 3},
        (OWN, "tp2 x pp2x2"): {
            "mesh": {"tp": 2, "pp": 2, "vpp": 2}, "schedule": "interleaved"} | PP,
        (TOKENS, "pp2 x ddp2"): {"mesh": {"pp": 2, "dp_replicate": 2}} | PP,
    },
}  # fmt: skip


SLOW = {
    (TOKENS, "tp"), (OWN, "zero3"), (LLAMA, "zero3 full"), (TOKENS, "tp2 x zero3"),
    (TOKENS, "pp2 x ddp2"),
}  # fmt: skip
"""Left to the long run."""


def names(world: int, slow: bool) -> list[tuple[str, str]]:
    """(target, family) of the default run, or all of them."""
    return [name for name in FAMILIES.get(world, {}) if slow or name not in SLOW]


def plan_of(folder: Path, target: str, settings: dict[str, Any]) -> Plan:
    """The plan of a family of a module that was traced into a folder."""
    return families.make_plan(document.read(Model, folder / FILES[target]), **settings)


def tasks(
    world: int, folder: Path, slow: bool
) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """What a rank does, by (target, family)."""
    return {
        (target, family): partial(train, folder, target, FAMILIES[world][target, family])
        for target, family in names(world, slow)
    }


def train(folder: Path, target: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses of all steps, gradients of the first, collectives of the last."""
    plan = plan_of(folder, target, settings)
    trainer = build(plan, device=torch.device("cpu"), module=target)
    assert isinstance(trainer, TracedTrainer)
    place, shard = trainer.coordinates, plan.phase.mesh.dp_shard
    dp_rank = place["dp_replicate"] * shard + place["dp_shard"]
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    counter = CollectiveCounter(trainer.mesh)
    for step in range(STEPS):
        counter.calls.clear()
        with counter:
            batch: Any = trainer.own_batch(step, dp_rank)
            if batch is None:
                batch = families.replica_rows(plan, trainer.coordinates, step)
            loss = trainer.forward_backward(batch)
        losses.append(trainer.global_loss(loss))
        if step == 0:
            gradients = {k: v.clone() for k, v in trainer.named_gradients().items()}
        trainer.optimizer_step()
    calls = Counter((c.kind, c.axis, c.message_bytes) for c in counter.calls if c.kind != "recv")
    return {"losses": losses, "gradients": gradients, "collectives": dict(calls)}


def reference(target: str) -> dict[str, Any]:
    """The same training as a plain loop over the module."""
    seed_everything(SEED)
    user = load(target)

    def backward_of(step: int) -> float:
        loss = plain_loss(user, step)
        loss.backward()
        return loss.item()

    found = train_plainly(user.module, backward_of, STEPS)
    return found | {"gradients": {f"module.{k}": g for k, g in found["gradients"].items()}}


def plain_loss(user: UserModule, step: int) -> Tensor:
    if user.make_batch is None:
        tokens = families.tokens(step)
        logits = user.module(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    seeds = [traced.sample_seed(SEED, step, index) for index in range(families.BATCH)]
    return user.module(*user.samples(seeds, families.SEQ))
