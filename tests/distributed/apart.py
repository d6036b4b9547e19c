"""Replicas that train apart, as tasks of a process group, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import resumption
import torch
import torch.distributed as dist
from torch import nn

from forerun.executors.build import build
from forerun.executors.local_sgd import Outer
from forerun.executors.marks import Marks
from forerun.executors.measure.comm import CollectiveCounter
from forerun.executors.measure.rounds import count_round
from forerun.local_sgd import LocalSgd
from forerun.plan import Plan

TOY_STEPS, RATE, REPLICAS = 19, 0.1, 2
SHAPES = {"blocks.0.w": (5,), "blocks.1.w": (3, 2), "blocks.2.w": (4,), "norm.weight": (2,)}
TOYS: dict[str, dict[str, Any]] = {
    "average": {"period": 3, "outer": "average"},
    "classic diloco": {"period": 4},
    "plain outer step": {"period": 3, "learning_rate": 0.5, "momentum": 0.0},
    "streaming": {"period": 6, "fragments": 3, "delay": 1, "alpha": 0.25},
    "late": {"period": 5, "delay": 4},
    "co2": {"period": 3, "outer": "co2", "momentum": 0.6},
    "co2 clipped": {"period": 2, "outer": "co2", "penalty": 1.5, "clip": 0.02},
    "co2 at once": {"period": 3, "outer": "co2", "delay": 0, "learning_rate": 0.8},
}
"""Settings of the outer optimiser that are simulated as well."""

Arrays = dict[str, np.ndarray]


def beginning() -> Arrays:
    """Where all replicas start."""
    made = np.random.default_rng(1)
    return {name: made.normal(size=shape) for name, shape in SHAPES.items()}


def gradient(x: Arrays, replica: int, step: int) -> Arrays:
    """Of a quadratic loss that differs by replica and step."""
    made = np.random.default_rng([replica, step])
    curve = {name: made.uniform(0.2, 1.0, size=value.shape) for name, value in x.items()}
    return {n: curve[n] * (value - made.normal(size=value.shape)) for n, value in x.items()}


def simulate(settings: LocalSgd) -> list[Arrays]:
    """The parameters of every replica after the steps, in float64 and written out at length."""
    x = [beginning() for _ in range(REPLICAS)]
    old = beginning()
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    coming: dict[int, Arrays] = {}
    num, late = settings.fragments, settings.steps_late
    names_of = [[n for i, n in enumerate(SHAPES) if min(i, 3) % num == f] for f in range(num)]
    names_of = [[n for n in names if n != "norm.weight"] for names in names_of]
    names_of[-1].append("norm.weight")

    def use(fragment: int) -> None:
        mean = coming.pop(fragment)
        penalty = settings.penalty or 1.0
        if settings.outer == "co2" and settings.penalty is None and late:
            gone = sum(np.sum(momentum[n] ** 2) for n in mean) ** 0.5 * settings.outer_rate
            penalty = 1.0 + gone / sum(np.sum(mean[n] ** 2) for n in mean) ** 0.5
        for n, d in mean.items():
            mu, rate = settings.outer_momentum, settings.outer_rate
            if settings.outer == "average":
                old[n] = old[n] - d
            elif settings.outer == "diloco":
                momentum[n] = mu * momentum[n] + d
                old[n] = old[n] - rate * (d + mu * momentum[n])
            else:
                u = mu * momentum[n] + d / penalty
                momentum[n] = np.clip(u, -settings.clip, settings.clip)
                old[n] = old[n] - rate * momentum[n]
            for own in x:
                own[n] = settings.mixing * own[n] + (1 - settings.mixing) * old[n]

    for step in range(1, TOY_STEPS + 1):
        for replica, own in enumerate(x):
            for n, g in gradient(own, replica, step).items():
                own[n] = own[n] - RATE * g
        for f, names in enumerate(names_of):
            since = (step - (f + 1) * settings.period // num) % settings.period
            if since == 0:
                sent = {n: old[n] - np.mean([own[n] for own in x], axis=0) for n in names}
                if late == settings.period and f in coming:
                    use(f)
                elif late == settings.period:
                    for own in x:
                        own |= {n: old[n].copy() for n in names}
                coming[f] = sent
            if since == late < settings.period and f in coming:
                use(f)
    return x


def toy(settings: LocalSgd) -> Arrays:
    """This rank's parameters after the same steps, by the outer optimiser itself."""
    named = {name: nn.Parameter(torch.tensor(v).float()) for name, v in beginning().items()}
    group = dist.group.WORLD
    assert group is not None
    outer = Outer(
        settings, named, dict.fromkeys(named, 1), group, None, torch.device("cpu"), Marks()
    )
    for step in range(1, TOY_STEPS + 1):
        now = {name: p.detach().numpy().astype(float) for name, p in named.items()}
        with torch.no_grad():
            for name, g in gradient(now, dist.get_rank(), step).items():
                named[name].sub_(torch.tensor(RATE * g))
        outer.after_step()
    return {name: p.detach().numpy() for name, p in named.items()}


STREAM: dict[str, Any] = {"period": 4, "fragments": 2, "delay": 1}
WAYS: dict[str, dict[str, Any]] = {
    "average": {"period": 2, "outer": "average"},
    "streaming": STREAM,
    "streaming 4 bits": STREAM | {"bits": 4},
    "streaming 8 bits": STREAM | {"bits": 8},
    "co2": {"period": 2, "outer": "co2"},
}
"""How replicas of a model meet."""
INSIDE: dict[int, dict[str, dict[str, Any]]] = {
    2: {"single": {"mesh": {"dp_replicate": 2}}},
    4: {
        "fsdp": {"mesh": {"dp_replicate": 2, "dp_shard": 2}, "zero": 3},
        "tp, clipped": {"mesh": {"dp_replicate": 2, "tp": 2}, "clip_norm": 0.5},
    },
}
"""What a replica is, by the ranks of all."""
STEPS = 7
CASES: dict[int, tuple[tuple[str, str], ...]] = {
    2: tuple(("single", way) for way in WAYS),
    4: (
        ("fsdp", "streaming"),
        ("fsdp", "streaming 4 bits"),
        ("fsdp", "co2"),
        ("tp, clipped", "streaming 8 bits"),
        ("tp, clipped", "co2"),
    ),
}
"""What is trained, by the ranks of all."""


def plan_of(inside: str, way: str | None, world: int, **more: Any) -> Plan:
    """A plan of two replicas of the tiny model."""
    techniques = {"local-sgd": WAYS[way]} if way is not None else None
    return families.make_plan(families.LLAMA, more=techniques, **INSIDE[world][inside], **more)


def train(plan: Plan) -> dict[str, Any]:
    """Losses and parameters after some steps, and the bytes of a round."""
    trainer = build(plan, device=torch.device("cpu"))
    losses = resumption.steps(trainer, 0, STEPS)
    whole = {name: full.clone() for name, full in trainer.named_parameters_full().items()}
    batch = families.replica_rows(plan, trainer.coordinates, STEPS)

    def step() -> None:
        trainer.forward_backward(batch)
        trainer.optimizer_step()

    counted = count_round(trainer.outer, step, lambda: CollectiveCounter(trainer.mesh))
    return {"losses": losses, "parameters": whole, "bytes": counted.bytes_on_wire()}


def as_one() -> dict[str, Any]:
    """Meetings after every step, whose outer step changes nothing, against synchronous steps."""
    sgd: dict[str, Any] = {"workload": {"optimizer": "sgd"}}
    every = {"local-sgd": {"period": 1, "learning_rate": 1.0, "momentum": 0.0}}
    mesh = INSIDE[2]["single"]
    found: dict[str, Any] = {}
    for name, more in (("apart", every), ("synchronous", None)):
        plan = families.make_plan(families.LLAMA, more=more, **mesh, **sgd)
        trainer = build(plan, device=torch.device("cpu"))
        losses = resumption.steps(trainer, 0, STEPS)
        found[name] = losses, trainer.named_parameters_full()
    return found


KEPT = {"streaming 4 bits": 6, "co2": 3}
"""After how many steps a checkpoint is written: a fragment is on its way then."""


def resume(way: str, step: int, place: Path) -> dict[str, Any]:
    """Three more steps without an interruption, and after a resumption."""
    group = dist.new_group(backend="gloo")
    plan = plan_of("single", way, 2)
    trainer = build(plan, device=torch.device("cpu"))
    resumption.steps(trainer, 0, step)
    problem = resumption.save(trainer, place, step, group)
    losses = resumption.steps(trainer, step, step + 3)
    again, _ = resumption.resumed(plan, place, step, group)
    assert again.outer is not None and any(f.exchange for f in again.outer.fragments)
    return {
        "problem": problem,
        "losses": (losses, resumption.steps(again, step, step + 3)),
        "equal": resumption._equal(resumption.everything(trainer), resumption.everything(again)),
    }


def tasks(world: int, place: Path) -> dict[tuple[str, str], Callable[[], dict[str, Any]]]:
    """What a rank does, by ("apart", what)."""
    found: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}
    for inside, way in CASES.get(world, ()):
        found["apart", f"{inside}, {way}"] = partial(_train, inside, way, world)
    if world == 2:
        for name, settings in TOYS.items():
            found["apart", name] = partial(toy, LocalSgd(**settings))
        found["apart", "as one"] = as_one
        for way, step in KEPT.items():
            found["apart", f"resume {way}"] = partial(resume, way, step, place / "apart" / way)
    return found


def _train(inside: str, way: str, world: int) -> dict[str, Any]:
    return train(plan_of(inside, way, world))
