"""Latent attention against a plain computation with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forerun.executors.latent import Latent
from forerun.executors.rotary import rotary_table, rotate
from forerun.model import LatentAttention, Layer, Model

HEADS, NOPE, ROPE, RANK = 3, 6, 4, 5
LAYER = Layer(repeat=1, heads=HEADS, kv_heads=HEADS, head_dim=NOPE + ROPE, ffn_hidden=8)
MODEL = Model(name="tiny", hidden=12, vocab=16, layers=(LAYER,))


def plainly(module: Latent, x: Tensor, table: Tensor) -> Tensor:
    """Every head on its own, scores in memory."""
    if module.q_a is None:
        q = module.wq(x)
    else:
        q = module.q_b(module.q_a_norm(module.q_a(x)))
    low, shared = module.kv_a(x).split((RANK, ROPE), dim=-1)
    kv = module.kv_b(module.kv_a_norm(low))
    turned = rotate(shared[:, :, None], table)[:, :, 0]
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    outs: list[Tensor] = []
    for head in range(HEADS):
        own = q[..., head * (NOPE + ROPE) :][..., : NOPE + ROPE]
        query = torch.cat((own[..., :NOPE], rotate(own[:, :, None, NOPE:], table)[:, :, 0]), -1)
        pair = kv[..., head * (NOPE + module.values) :][..., : NOPE + module.values]
        key, value = torch.cat((pair[..., :NOPE], turned), -1), pair[..., NOPE:]
        scores = query @ key.transpose(1, 2) / (NOPE + ROPE) ** 0.5
        outs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value)
    return module.wo(torch.cat(outs, dim=-1))


@pytest.mark.parametrize("q_rank", [None, 7])
@pytest.mark.parametrize("values", [6, 10, 16])
def test_equals_every_head_on_its_own(q_rank: int | None, values: int) -> None:
    """Value heads below, at and above the size of query heads."""
    latent = LatentAttention(q_lora_rank=q_rank, kv_lora_rank=RANK, qk_nope_head_dim=NOPE,
                             qk_rope_head_dim=ROPE, v_head_dim=values)  # fmt: skip
    torch.manual_seed(0)
    module = Latent(MODEL, HEADS, latent)
    x, table = torch.randn(2, 9, 12), rotary_table(torch.arange(9), ROPE, 1e4)
    grads: list[list[Tensor]] = []
    outs: list[Tensor] = []
    for function in (module, lambda y, t: plainly(module, y, t)):
        module.zero_grad()
        outs.append(function(x, table))
        outs[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    assert len(grads[0]) == len(list(module.parameters()))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
