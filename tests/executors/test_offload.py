"""Offload moves what is predicted, needs what is predicted, and changes no gradient."""

from __future__ import annotations

import errno
import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from forerun.costmodel import estimate
from forerun.costmodel.techniques import offload
from forerun.errors import InputError, RunFailed
from forerun.executors import split_backward
from forerun.executors.landing import ALIGNMENT_BYTES, Landing
from forerun.executors.marks import Marks
from forerun.executors.optimizer import make_optimizer
from forerun.executors.tiered_adamw import TieredAdamW
from forerun.executors.tiers import Store, Tier, make_copier, make_tier
from forerun.model import Model

from .small import GPT, LLAMA, counted, gradients, make_plan, make_trainer, model, tokens

pytestmark = pytest.mark.usefixtures("one_rank")
CPU = torch.device("cpu")
DEEP = model("swiglu", "rmsnorm", kv_heads=2, tied=False, bias=False, layers=6)
LONG = model("swiglu", "rmsnorm", kv_heads=2, tied=False, bias=False, layers=12)
"""Whose gradients weigh more than what the peak is off by."""


@cache
def plain_gradients(model: Model) -> dict[str, Tensor]:
    return gradients(make_plan(model))


@pytest.mark.parametrize("model", [LLAMA, GPT], ids=lambda m: m.name)
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("rest", ["keep", "recompute"])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_gradients_are_bit_equal(model: Model, fraction: float, rest: str, tier: str) -> None:
    if fraction != 0.5 and (tier == "disk" or model is GPT):
        return  # neither matters to what is moved
    chosen = {"activations": fraction, "rest": rest, "tier": tier}
    found = gradients(make_plan(model, more={"offload": chosen}))
    for name, expected in plain_gradients(model).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("keep", [None, ["x1", "o", "lse", "v"]])
def test_inputs_that_wait_beyond_their_backward_are_copied(keep: list[str] | None) -> None:
    """Buffers of six layers are used again before the second half of a split backward; so is the
    memory of inputs that were made again."""
    recompute = {} if keep is None else {"recompute": {"mode": "tensors", "keep": keep}}
    plan = make_plan(DEEP, more={"offload": {"activations": 1.0}} | recompute)
    trainer = make_trainer(plan)
    (piece,) = trainer.pieces
    later = split_backward.apply(piece, piece.blocks.values())
    later.putting_off = True
    trainer.forward_backward(tokens(plan))
    assert later.waiting
    later.take()()
    found, expected = trainer.named_gradients(), plain_gradients(DEEP)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


CASES: list[tuple[Model, str, dict[str, Any], int, int]] = [
    (LLAMA, "none", {"activations": 1.0}, 2, 0),
    (LONG, "none", {"activations": 1.0}, 1, 2),
    (DEEP, "none", {"activations": 0.5, "rest": "recompute"}, 2, 2),
    (DEEP, "none", {"activations": 0.5, "states": "optimizer"}, 1, 2),
    (LLAMA, "full", {"activations": 1.0}, 1, 0),
    (DEEP, "elementwise", {"activations": 0.75}, 1, 1),
    (GPT, "none", {"activations": 0.25, "rest": "recompute"}, 1, 0),
    (GPT, "none", {"activations": 0.9, "tier": "disk"}, 2, 1),
]


@pytest.mark.parametrize(("model", "recompute", "chosen", "num", "spared"), CASES)
def test_copies_are_those_predicted_and_memory_is_near(
    model: Model, recompute: str, chosen: dict[str, Any], num: int, spared: int
) -> None:
    plan = make_plan(model, "fp32", recompute, num, more={"offload": chosen}, spared=spared)
    predicted = estimate(plan)
    trainer = make_trainer(plan)
    live = counted(trainer, plan)
    assert trainer.away.take_copied() == predicted.bytes_copied
    assert trainer.away.made_bytes() == predicted.bytes_off_device
    terms = predicted.memory_terms_bytes.items()
    expected = sum(n for term, n in terms if term not in ("fragmentation", "context"))
    assert expected == pytest.approx(sum(live.peak().values()), rel=0.04)


def test_memory_and_copies_are_the_same_every_time() -> None:
    """Nothing of it depends on how long copies take."""
    chosen = {"offload": {"activations": 0.6, "states": "optimizer"}}
    seen = set()
    for _ in range(2):
        plan = make_plan(DEEP, num_microbatches=2, more=chosen)
        trainer = make_trainer(plan)
        live = counted(trainer, plan)
        seen.add((sum(live.peak().values()), *trainer.away.take_copied().values()))
    assert len(seen) == 1


@settings(max_examples=12)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    name=st.sampled_from(["host", "disk"]),
    at=st.integers(0, 3),
    cut=st.booleans(),
)
def test_what_comes_back_is_what_left(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    dtype: torch.dtype,
    name: str,
    at: int,
    cut: bool,
) -> None:
    tier = make_tier(name, CPU, folder=tmp_path_factory.mktemp("tier"))
    source = torch.arange(2 * torch.Size(shape).numel()).view(2, *shape).to(dtype)
    source = source[:, ::2] if cut else source
    size = source.numel() * source.element_size()
    place = tier.make(8 * at + size)
    target = torch.zeros_like(source.contiguous())
    tier.write(place, 8 * at, source)
    tier.read(place, 8 * at, target)
    assert torch.equal(target, source)
    assert tier.made_bytes == 8 * at + size


@pytest.mark.parametrize("name", ["host", "disk"])
def test_a_new_place_holds_zeros(name: str, tmp_path: Path) -> None:
    tier = make_tier(name, CPU, folder=tmp_path)
    target = torch.ones(1000)
    tier.read(tier.make(4000), 0, target)
    assert not target.any()
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_a_budget_too_small_says_by_how_much(tmp_path: Path) -> None:
    tier = make_tier("host", CPU, folder=tmp_path, budget_bytes=3 * 2**20)
    tier.make(2 * 2**20)
    with pytest.raises(RunFailed, match=r"host-memory=3.0 MiB: offload needs 1.0 MiB more"):
        tier.make(2 * 2**20)
    assert tier.made_bytes == 2 * 2**20
    tier.make(2**20)


@pytest.mark.parametrize("name", ["host", "disk"])
def test_a_full_disk_is_told_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make_tier(name, CPU, folder=tmp_path)
    tier.make(5000)
    length = os.fstat(tier.descriptor).st_size  # type: ignore[attr-defined]

    def full(descriptor: int, start: int, size: int) -> None:
        os.ftruncate(descriptor, start + size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunFailed, match=r"the disk is full: .* more are needed, .* are free"):
        tier.make(2**20)
    assert os.fstat(tier.descriptor).st_size == length  # type: ignore[attr-defined]
    assert tier.made_bytes == 5000


def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(InputError, match="offload-dir=/nowhere: cannot write there"):
        make_tier("disk", CPU, folder=Path("/nowhere"))


def test_an_error_of_a_copy_comes_to_whoever_waits(tmp_path: Path) -> None:
    tier: Tier = make_tier("host", CPU, folder=tmp_path)

    def broken() -> None:
        raise RunFailed("the disk failed")

    with pytest.raises(RunFailed, match="the disk failed"):
        make_copier(tier, CPU).submit("out", [broken]).wait()


SHAPES = ((7,), (64, 3), (5, 5), (1,), (130,))


@pytest.mark.parametrize("waits", [None, [True, False, True, False, False]])
@pytest.mark.parametrize("bucket_elements", [16, 100, 10_000])
def test_offloaded_adamw_is_torchs(
    tmp_path: Path, bucket_elements: int, waits: list[bool] | None
) -> None:
    """With the moments of all parameters, or of some, on the tier."""

    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]

    tier = make_tier("disk", CPU, folder=tmp_path)
    store = Store(tier, make_copier(tier, CPU))
    ours, theirs = parameters(), parameters()
    away = TieredAdamW(ours, 0.1, store, Marks(), waits, bucket_elements=bucket_elements)
    plain = make_optimizer("adamw", theirs, 0.1)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = other.grad = torch.sin(other.detach() * (step + 1))
        store.copied.clear()
        away.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    there = waits or [True] * len(ours)
    moved = 8 * sum(p.numel() for p, away in zip(ours, there, strict=True) if away)
    assert store.copied == {"in@disk": moved, "out@disk": moved}
    states = away.state_dict()["state"]
    for index, other in enumerate(plain.state_dict()["state"].values()):
        assert states[index]["step"] == other["step"]
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[index][moment], other[moment], rtol=1e-6, atol=1e-7)
    assert len(states) == len(ours)
    again = TieredAdamW(parameters(), 0.1, Store(tier, store.copier), Marks(), waits)
    again.load_state_dict(plain.state_dict())
    assert again.state_dict()["state"][1]["exp_avg"].equal(plain.state[theirs[1]]["exp_avg"])


@settings(max_examples=15)
@given(sizes=st.lists(st.integers(0, 40), min_size=2, max_size=8))
def test_rounding_buffers_hold_neighbours_apart(sizes: list[int]) -> None:
    """Buffers of a layer and of the one in front of it never meet; equal layers need two."""
    landing = Landing(CPU, {i: size * ALIGNMENT_BYTES for i, size in enumerate(sizes)})
    landing.plan()
    used = {i: s for i, s in landing.sizes.items() if s}
    order = sorted(used, reverse=True)
    for behind, front in pairwise(order):
        one, other = landing.offsets[behind], landing.offsets[front]
        assert one + used[behind] <= other or other + used[front] <= one
    if used:
        pairs = [used[a] + used[b] for a, b in pairwise(order)]
        assert landing.arena_bytes == max([*pairs, *used.values()])
    for index in order:  # backward: nothing is allocated twice, nothing stays
        assert landing.buffer(index, used[index]).numel() == used[index]
        landing.release(index)
    assert all(segment.memory is None for segment in landing.segments)


def test_equal_layers_use_two_buffers_in_turns() -> None:
    landing = Landing(CPU, dict.fromkeys(range(5), 4 * ALIGNMENT_BYTES))
    landing.plan()
    assert [segment.num_bytes for segment in landing.segments] == [4 * ALIGNMENT_BYTES] * 2
    assert offload.GRAIN_BYTES % 8 == 0
