"""Mixtures of experts on one process, against token by token arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forerun.executors.experts.exchange import regroup, transposed
from forerun.executors.experts.grouped import (
    AtOnce,
    Gated,
    GroupedLinear,
    Groups,
    OneByOne,
    Products,
)
from forerun.executors.experts.layer import Moe
from forerun.executors.experts.routing import route
from forerun.executors.experts.rows import padded_places, sorted_places
from forerun.executors.experts.slots import Slots
from forerun.experts import Experts
from forerun.model import Layer, Mlp

TOKENS, HIDDEN = 18, 8


def make_moe(experts: Experts, mlp: Mlp = "swiglu") -> Moe:
    layer = Layer(repeat=1, heads=1, kv_heads=1, head_dim=8, mlp=mlp, experts=experts)
    moe = Moe(HIDDEN, layer, None).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return moe


def one_expert(moe: Moe, x: Tensor, expert: int) -> Tensor:
    """One token through one expert."""
    up = moe.experts.up.weight[expert] @ x
    kind = moe.experts.kind
    if kind in ("swiglu", "geglu"):
        gate = moe.experts.gate.weight[expert] @ x
        act = (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up
    else:
        act = F.gelu(up) if kind == "gelu" else F.relu(up) ** (2 if kind == "squared_relu" else 1)
    return moe.experts.down.weight[expert] @ act


def by_token(moe: Moe, x_TE: Tensor) -> Tensor:
    """The layer's output, token by token, in Python."""
    spec = moe.spec
    logits = x_TE @ moe.router.weight.t()
    scores = logits.softmax(-1) if spec.scores == "softmax" else logits.sigmoid()
    chosen = [sorted(range(spec.num_experts), key=lambda e: -row[e].item())[: spec.top_k]
              for row in scores]  # fmt: skip
    weight: dict[tuple[int, int], Tensor] = {}
    for token, experts in enumerate(chosen):
        total = sum(scores[token, e] for e in experts) if spec.renormalise else 1.0
        for e in experts:
            weight[token, e] = spec.routed_scale * scores[token, e] / total
    if spec.capacity_factor is not None:
        room = spec.capacity(len(x_TE))
        for e in range(spec.num_experts):
            copies = [pair for pair in weight if pair[1] == e]
            if spec.drop == "probability":
                copies.sort(key=lambda pair: -weight[pair].item())
            for pair in copies[room:]:
                del weight[pair]
    out = [torch.zeros(HIDDEN, dtype=x_TE.dtype) for _ in x_TE]
    for (token, e), w in weight.items():
        out[token] = out[token] + w * one_expert(moe, x_TE[token], e)
    return torch.stack(out)


DROPLESS = Experts(num_experts=4, top_k=2, ffn_hidden=12)
SPECS: list[tuple[Experts, Mlp]] = [
    (DROPLESS, "swiglu"),
    (DROPLESS, "geglu"),
    (DROPLESS, "gelu"),
    (DROPLESS, "relu"),
    (DROPLESS, "squared_relu"),
    (Experts(num_experts=5, top_k=3, ffn_hidden=6, renormalise=False), "swiglu"),
    (Experts(num_experts=4, top_k=2, ffn_hidden=6, scores="sigmoid", routed_scale=2.5), "swiglu"),
    (Experts(num_experts=4, top_k=2, ffn_hidden=6, capacity_factor=0.6), "swiglu"),
    (Experts(num_experts=4, top_k=2, ffn_hidden=6, capacity_factor=0.6, drop="position"), "gelu"),
    (Experts(num_experts=4, top_k=1, ffn_hidden=6, capacity_factor=4.0), "swiglu"),
]


@pytest.mark.parametrize(("experts", "mlp"), SPECS)
def test_equals_token_by_token(experts: Experts, mlp: Mlp) -> None:
    """Routing runs in fp32, so that weights agree to its rounding."""
    moe = make_moe(experts, mlp)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, TOKENS // 2, HIDDEN, dtype=torch.float64, generator=generator)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    found: list[list[Tensor]] = []
    for function in (lambda y: moe(y).flatten(0, 1), lambda y: by_token(moe, y.flatten(0, 1))):
        own = x.clone().requires_grad_()
        moe.zero_grad()
        out = function(own)
        out.backward(grad.flatten(0, 1))
        assert own.grad is not None
        gradients = [p.grad.clone() for p in moe.parameters() if p.grad is not None]
        assert len(gradients) == len(list(moe.parameters()))
        found.append([out.detach(), own.grad, *gradients])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [None, 2.0])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(capacity: float | None) -> None:
    moe = make_moe(Experts(num_experts=4, top_k=1, ffn_hidden=6, capacity_factor=capacity))
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 1.0  # every token of positive sum goes to expert 2
    moe(torch.rand(1, 6, HIDDEN, dtype=torch.float64)).square().sum().backward()
    for name in ("gate", "up", "down"):
        gradient = getattr(moe.experts, name).weight.grad
        assert gradient is not None
        alive = gradient.flatten(1).any(dim=1)
        assert alive.tolist() == [False, False, True, False]


@pytest.mark.parametrize("balance", ["micro-batch", "global-batch"])
def test_a_recomputed_layer_counts_once_and_has_the_same_gradients(balance: Any) -> None:
    found: list[list[Tensor]] = []
    x = torch.randn(2, 6, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for recomputed in (False, True):
        moe = make_moe(DROPLESS)
        training = moe.training_of_router
        training.balance, training.balance_scale, training.z_scale = balance, 0.5, 0.2
        training.begin_step()
        outs = []
        for part in x.split(1):  # two micro-batches in flight, as in a pipeline
            own = part.clone().requires_grad_()
            out: Any = checkpoint(moe, own, use_reentrant=False) if recomputed else moe(own)
            outs.append(out)
        for out in outs:
            out.square().sum().backward()
        assert training.tokens_X is not None and training.passes == 2
        assert int(training.tokens_X.sum()) == 2 * 6 * DROPLESS.top_k
        found.append([p.grad for p in moe.parameters() if p.grad is not None])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_balance_loss_is_one_when_choices_are_even() -> None:
    moe = make_moe(Experts(num_experts=4, top_k=1, ffn_hidden=6))
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(4, HIDDEN) * 50)
    moe.training_of_router.balance = "micro-batch"
    x = torch.eye(4, HIDDEN, dtype=torch.float64)[None]
    moe(x)
    assert float(moe.training_of_router.balance_sum or 0) == pytest.approx(1.0)
    moe.forget()
    moe(x[:, :1].expand(1, 4, HIDDEN))
    assert float(moe.training_of_router.balance_sum or 0) == pytest.approx(4.0), "all to one"


def test_a_router_that_gives_no_numbers_is_known() -> None:
    moe = make_moe(DROPLESS)
    moe(torch.ones(1, 2, HIDDEN, dtype=torch.float64))
    assert not moe.training_of_router.gave_nan
    moe(torch.full((1, 2, HIDDEN), float("nan"), dtype=torch.float64))
    moe(torch.ones(1, 2, HIDDEN, dtype=torch.float64))
    assert moe.training_of_router.gave_nan


choices = st.integers(1, 6).flatmap(
    lambda k: st.tuples(st.integers(1, 12), st.integers(k, 8), st.just(k), st.integers(0, 99))
)


@given(choices)
@settings(max_examples=30)
def test_rows_hold_every_copy_once(sizes: tuple[int, int, int, int]) -> None:
    tokens, num_experts, top_k, seed = sizes
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    expert_TK = scores.topk(top_k, dim=1).indices
    places = sorted_places(expert_TK, num_experts)
    assert sorted(places.row_TK.flatten().tolist()) == list(range(tokens * top_k))
    ends = places.counts.cumsum(0)
    for token in range(tokens):
        for k in range(top_k):
            row, expert = int(places.row_TK[token, k]), int(expert_TK[token, k])
            assert places.token_R[row] == token
            assert ends[expert] - places.counts[expert] <= row < ends[expert]


@given(choices, st.integers(1, 6), st.sampled_from(["probability", "position"]))
@settings(max_examples=30)
def test_full_experts_turn_away_what_the_rule_says(
    sizes: tuple[int, int, int, int], capacity: int, drop: Any
) -> None:
    tokens, num_experts, top_k, seed = sizes
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    weights_TK, expert_TK = scores.topk(top_k, dim=1)
    places = padded_places(expert_TK, weights_TK, num_experts, capacity, drop)
    dropped = num_experts * capacity
    for expert in range(num_experts):
        own = [(t, k) for t in range(tokens) for k in range(top_k) if expert_TK[t, k] == expert]
        if drop == "probability":
            own.sort(key=lambda pair: -float(weights_TK[pair]))
        rows = [int(places.row_TK[pair]) for pair in own]
        kept = rows[:capacity]
        assert kept == [expert * capacity + i for i in range(len(kept))]
        assert rows[capacity:] == [dropped] * (len(rows) - len(kept))
        held = places.token_R[expert * capacity : (expert + 1) * capacity].tolist()
        assert held == [t for t, _ in own[:capacity]] + [tokens] * (capacity - len(kept))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([(3, 5), (5, 2)]))
@settings(max_examples=30)
def test_grouped_matmul_is_one_matmul_per_group(sizes: list[int], widths: tuple[int, int]) -> None:
    width_in, width_out = widths
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), width_in, dtype=torch.float64, generator=generator)
    weight = torch.randn(len(sizes), width_out, width_in, dtype=torch.float64, generator=generator)
    rows.requires_grad_()
    weight.requires_grad_()
    out: Any = Products.apply(rows, weight, OneByOne(sizes), None)
    parts = zip(rows.split(sizes), weight.unbind(0), strict=True)
    plain = torch.cat([part @ matrix.t() for part, matrix in parts])
    torch.testing.assert_close(out, plain)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(out, (rows, weight), grad)
    expected = torch.autograd.grad(plain, (rows, weight), grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 8], [8]])
def test_the_grouped_kernel_gives_the_same(sizes: list[int]) -> None:
    """Torch has one for CPUs, too; an expert without rows has a gradient of zeros either way."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(8, 16, generator=generator, requires_grad=True)
    weight = torch.randn(len(sizes), 24, 16, generator=generator, requires_grad=True)
    grad = torch.randn(8, 24, generator=generator)
    groups = Groups(torch.tensor(sizes))
    kernel: Any = Products.apply(rows, weight, AtOnce(groups.ends_X), None)
    loop: Any = Products.apply(rows, weight, OneByOne(groups.on_host()), None)
    torch.testing.assert_close(kernel, loop)
    found = torch.autograd.grad(kernel, (rows, weight), grad)
    expected = torch.autograd.grad(loop, (rows, weight), grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_groups_are_one_batched_matmul() -> None:
    layer = GroupedLinear(3, 4, 5)
    torch.nn.init.normal_(layer.weight)
    rows = torch.randn(3, 2, 4)
    apart = layer(rows.flatten(0, 1), Groups(torch.tensor([2, 2, 2])))
    torch.testing.assert_close(layer(rows, None).flatten(0, 1), apart)


@pytest.mark.parametrize("kind", ["swiglu", "geglu"])
def test_gated_activation_has_the_gradients_of_its_parts(kind: str) -> None:
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    act = F.silu if kind == "swiglu" else F.gelu
    assert torch.autograd.gradcheck(lambda g, u: Gated.apply(g, u, kind), (gate, up))
    torch.testing.assert_close(Gated.apply(gate, up, kind), act(gate) * up)


@given(st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 3), min_size=width, max_size=width),
                           min_size=1, max_size=4)
))  # fmt: skip
@settings(max_examples=30)
def test_regrouping_and_back_leaves_rows_as_they_were(sizes: list[list[int]]) -> None:
    rows = torch.arange(sum(map(sum, sizes)))[:, None]
    other = regroup(rows, sizes)
    assert sorted(other.flatten().tolist()) == rows.flatten().tolist()
    assert torch.equal(regroup(other, transposed(sizes)), rows)
    runs = [[(a, b)] * n for a, row in enumerate(sizes) for b, n in enumerate(row)]
    owner = [run for part in runs for run in part]
    assert [owner[i] for i in other.flatten().tolist()] == sorted(owner, key=lambda ab: ab[::-1])


def test_replicas_share_an_experts_tokens() -> None:
    slots = Slots([[0, 1, 2], [3, 0, 1], [0, 2, 3]], 4)
    assert slots.holders == [[0, 4, 6], [1, 5], [2, 7], [3, 8]]
    expert_TK = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1], [1, 2]])
    chosen = slots.choose(expert_TK, start=1)
    assert chosen[:, 0].tolist()[:4] == [4, 6, 0, 4], "in turns, from the second"
    for slot, expert in zip(chosen.flatten().tolist(), expert_TK.flatten().tolist(), strict=True):
        assert slots.expert_of[slot] == expert
    assert torch.equal(Slots.contiguous(4, 2).choose(expert_TK, 0), expert_TK)


def test_scores_of_sigmoid_routers_sum_to_one_for_the_balance_loss() -> None:
    experts = Experts(num_experts=6, top_k=2, ffn_hidden=4, scores="sigmoid", renormalise=False)
    logits = torch.randn(5, 6)
    routed = route(logits, experts)
    torch.testing.assert_close(routed.probabilities_TX.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(routed.weights_TK, logits.sigmoid().topk(2).values)
