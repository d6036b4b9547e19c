"""Steps out of one arena: the same numbers, and places that are free when they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.executors.arena import StaticArena
from forerun.executors.measure.lives import lives, needs
from forerun.executors.trainer import Trainer
from forerun.model import Model
from forerun.planner.memory_reuse import caching_allocator, max_live_bytes, solve

from .small import GPT, LLAMA, counted, make_plan, make_trainer, tokens

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
TOKENS = {"offload": {"activations": 0.5, "rest": "recompute"}}


def step(trainer: Trainer, batch: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    loss = float(trainer.forward_backward(batch))
    gradients = {name: g.clone() for name, g in trainer.named_gradients().items()}
    trainer.optimizer_step()
    return loss, gradients


@pytest.mark.parametrize(
    ("model", "more"), [(LLAMA, TOKENS), (GPT, {}), (LLAMA, {"recompute": {"mode": "full"}})]
)
def test_steps_out_of_an_arena_are_bit_equal(model: Model, more: dict[str, Any]) -> None:
    plan = make_plan(model, num_microbatches=2, more=more)
    batch = tokens(plan)
    plain, ours = make_trainer(plan), make_trainer(plan)
    ours.arena = arena = StaticArena(CPU)
    for _ in range(4):
        expected, found = step(plain, batch), step(ours, batch)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], g) for name, g in expected[1].items())
    assert arena.plan is not None
    assert arena.num_bytes <= 1.01 * max_live_bytes(arena.plan.buffers)
    assert arena.use.placed_bytes > 0.9 * (arena.use.placed_bytes + arena.use.other_bytes)
    assert arena.use.occupied == 0
    assert arena.memory is None, "between steps it is not there"


def function(x: Tensor, keep: list[Tensor], more: bool = False) -> Tensor:
    y = (x * 2).sin()
    z = (y + 1).exp()
    keep.append(y)
    return (z.neg() * 3).cos() if more else z.neg() * 3


def test_a_tensor_that_lives_longer_is_not_overwritten() -> None:
    """The recorded step lets go of what a later one still holds: that one's place stays its own."""
    arena, x, held = StaticArena(CPU), torch.linspace(0, 1, 1000), list[Tensor]()
    with arena.step():
        kept: list[Tensor] = []
        function(x, kept)
        kept.clear()
        function(x, kept)
        kept.clear()
    with arena.step():
        first = function(x, held)
        second = function(x, held)
    assert torch.equal(held[0], (x * 2).sin()) and torch.equal(held[1], (x * 2).sin())
    assert torch.equal(first, second)
    assert arena.use.occupied > 0


def test_a_step_that_differs_falls_back_and_is_recorded_again() -> None:
    arena, x = StaticArena(CPU), torch.linspace(0, 1, 1000)
    with arena.step():
        function(x, [])
    with arena.step():
        assert torch.equal(function(x[:500], []), function(x[:500], []))
    assert arena.plan is None and arena.use.differing == 1
    for _ in range(2):
        with arena.step():
            result = function(x[:500], [], more=True)
    assert torch.equal(result, function(x[:500], [], more=True))
    assert arena.use.placed > 0
    for length in (10, 20, 30, 40):  # steps that never repeat go to the allocator in the end
        with arena.step():
            function(x[:length], [])
    assert arena.recordings == 3


def test_static_plans_of_measured_traces() -> None:
    plan = make_plan(LLAMA, num_microbatches=2, more=TOKENS)
    live = counted(make_trainer(plan), plan)
    buffers = lives(live.log)
    assert buffers is not None
    found = needs(live)
    assert found["static_plan_bytes"] <= 1.01 * found["max_live_bytes"]
    assert found["caching_bytes"] >= found["max_live_bytes"]
    assert solve(buffers).peak_bytes == found["static_plan_bytes"]
    assert caching_allocator(buffers).fragmentation > 0
