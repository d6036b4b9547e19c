"""Quantised numbers between replicas, and when meetings happen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from forerun.executors.local_sgd.codec import decode, encode
from forerun.executors.local_sgd.outer import fragment_of_parameter
from forerun.local_sgd import BLOCK, LocalSgd, message_bytes


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 4),
    spread=st.floats(0.0, 6.0),
    bits=st.sampled_from([4, 8]),
)
def test_what_comes_back_is_near_what_was_sent(
    seed: int, rows: int, blocks: int, spread: float, bits: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks * BLOCK, generator=made)
    x = x * torch.exp(spread * torch.randn(rows, blocks * BLOCK, generator=made))
    found = decode(encode(x, bits), bits)
    scale = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True).expand(-1, -1, BLOCK)
    scale = scale.flatten(1)
    bound = torch.maximum(x.abs() / 3, scale / 128) if bits == 4 else scale / 254
    assert torch.all((found - x).abs() <= bound * (1 + 1e-5))
    assert torch.all(found * x >= 0), "no sign turns"


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_that_the_plan_counts(bits: int) -> None:
    rows = encode(torch.randn(2, 3 * BLOCK), bits)
    assert rows.dtype == torch.uint8
    assert rows.numel() == message_bytes(2 * 3 * BLOCK, 2, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(bits: int) -> None:
    x = torch.zeros(1, 2 * BLOCK)
    assert torch.equal(decode(encode(x, bits), bits), x)
    for wrong in (math.nan, math.inf):
        x[0, 5] = wrong
        found = decode(encode(x, bits), bits)
        assert not torch.isfinite(found[0, 5])
        assert torch.equal(found[0, BLOCK:], x[0, BLOCK:])


def test_powers_of_two_are_exact_in_4_bits() -> None:
    x = torch.tensor([(-1.0) ** k * 2.0 ** -(k % 7) for k in range(BLOCK)]).view(1, BLOCK)
    assert torch.equal(decode(encode(x, 4), 4), x)


def test_every_parameter_is_in_one_fragment() -> None:
    module = nn.ModuleDict({"blocks": nn.ModuleDict({str(i): nn.Linear(2, 2) for i in range(5)})})
    names = [name for name, _ in module.named_parameters()] + ["embedding.weight", "norm.weight"]
    of = {name: fragment_of_parameter(name, 3) for name in names}
    assert {of[f"blocks.{i}.weight"] for i in (0, 3)} == {0}
    assert of["blocks.2.bias"] == of["embedding.weight"] == of["norm.weight"] == 2
    assert LocalSgd(period=9, fragments=3).starts(of["norm.weight"]) == 9
