"""A transformer of one's own: tokens in, logits out; trained on the text corpus."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S sequence, E width, H heads, D head size, V vocabulary
VOCAB, WIDTH, HEADS, LAYERS, LONGEST = 256, 96, 4, 3, 1024


class Block(nn.Module):
    """Causal attention and an MLP, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_BSE: Tensor) -> Tensor:
        qkv_BSHD = self.qkv(self.norm1(x_BSE)).unflatten(-1, (3 * HEADS, -1))
        q_BHSD, k_BHSD, v_BHSD = qkv_BSHD.transpose(1, 2).chunk(3, dim=1)
        a_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        x_BSE = x_BSE + self.out(a_BHSD.transpose(1, 2).flatten(2))
        return x_BSE + self.mlp(self.norm2(x_BSE))


class Transformer(nn.Module):
    """Token and position tables, blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSE = self.tokens(tokens_BS) + self.positions(place_S)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return self.head(self.norm(x_BSE))


def build() -> nn.Module:
    """The module; forerun adds the loss of the next token."""
    return Transformer()
