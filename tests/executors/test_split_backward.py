"""A backward in two halves gives the gradients of a whole one, and holds what was said to wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forerun.executors import split_backward
from forerun.executors.decoder import Decoder
from forerun.executors.linear import Linear
from forerun.experts import Experts
from forerun.model import LatentAttention, Layer, Model


class Net(nn.Module):
    """Products with and without bias, and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = Linear(6, 10, bias=True), nn.RMSNorm(10)
        self.down = Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.norm(self.up(x))))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    whole, split = Net().double(), Net().double()
    split.load_state_dict(whole.state_dict())
    return whole, split


@pytest.mark.parametrize("recomputed", [False, True])
def test_halves_make_the_gradients_of_a_whole_backward(recomputed: bool) -> None:
    whole, split = nets()
    later = split_backward.apply(split)
    runners: list[Any] = []
    later.putting_off = True
    for _ in range(3):
        x = torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        whole(x).square().sum().backward()
        out = checkpoint(split, y, use_reentrant=False) if recomputed else split(y)
        out.square().sum().backward()
        runners.append(later.take())
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)
        assert set(gradients(split)) == {"norm.weight", "up.bias"}
    for run in reversed(runners):
        run()
        run()  # what is done is not done again
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], expected, rtol=1e-12, atol=1e-12)


def test_a_whole_backward_puts_nothing_off() -> None:
    whole, split = nets()
    later = split_backward.apply(split)
    x = torch.randn(4, 6, dtype=torch.double)
    for net in (whole, split):
        net(x).sum().backward()
    assert later.waiting == []
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], expected, rtol=1e-12, atol=1e-12)


def test_recomputation_does_not_run_the_last_product_again(monkeypatch: Any) -> None:
    """Saved inputs come before their product, so that it is over when the last one is back."""
    _, split = nets()
    split_backward.apply(split)
    products: list[Any] = []
    plain = split_backward.F.linear

    def count(*args: Any) -> Tensor:
        products.append(args[1].shape)
        return plain(*args)

    monkeypatch.setattr(split_backward.F, "linear", count)
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    out: Any = checkpoint(split, x, use_reentrant=False)
    assert len(products) == 2
    out.sum().backward()
    assert len(products) == 3


def test_every_product_of_a_decoder_waits() -> None:
    layer = Layer(repeat=2, heads=2, kv_heads=1, head_dim=4, ffn_hidden=12)
    model = Model(name="tiny", hidden=8, vocab=16, layers=(layer,), tied_embeddings=True)
    piece = Decoder(model, 0, 1)
    later = split_backward.apply(piece)
    later.putting_off = True
    tokens = torch.arange(12).view(2, 6) % 16
    piece(tokens, tokens).backward()
    assert len(later.waiting) == 2 * 7 + 1
    matrices = {n for n, p in piece.named_parameters() if p.ndim == 2 and "embedding" not in n}
    assert all(piece.get_parameter(name).grad is None for name in matrices)
    later.take()()
    assert all(p.grad is not None for p in piece.parameters())


LATENT = LatentAttention(
    q_lora_rank=6, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4
)


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_products_of_experts_wait(capacity: float | None) -> None:
    """Those of latent attention (5), router, shared expert (3) and routed experts (3)."""
    experts = Experts(
        num_experts=4, top_k=2, ffn_hidden=6, shared_ffn_hidden=6, capacity_factor=capacity
    )
    layer = Layer(repeat=1, heads=2, kv_heads=2, head_dim=6, latent=LATENT, experts=experts)
    model = Model(name="tiny", hidden=8, vocab=16, layers=(layer,))
    torch.manual_seed(0)
    whole, split = Decoder(model, 0, 0).double(), Decoder(model, 0, 0).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.3)
    split.load_state_dict(whole.state_dict())
    later = split_backward.apply(split)
    later.putting_off = True
    tokens = torch.arange(12).view(2, 6) % 16
    for _ in range(2):
        whole(tokens, tokens).backward()
        split(tokens, tokens).backward()
    assert len(later.waiting) == 2 * (5 + 1 + 3 + 3 + 1)
    assert split.get_parameter("blocks.0.mlp.experts.up.weight").grad is None
    later.take()()
    for name, expected in gradients(whole).items():
        torch.testing.assert_close(gradients(split)[name], expected, rtol=1e-5, atol=1e-7)
