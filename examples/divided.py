"""A transformer that tells how it can be divided: `tp_plan` and `pp_plan`; see docs/modules.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S sequence, E width, H heads of this rank, D head size, V vocabulary
VOCAB, WIDTH, HEADS, LAYERS, LONGEST = 256, 96, 4, 4, 1024


class Attention(nn.Module):
    """Causal attention whose matrices may be cut by heads: it asks for the size of a head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSE: Tensor) -> Tensor:
        q, k, v = (
            matrix(x_BSE).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for matrix in (self.q, self.k, self.v)
        )
        a_BHSD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(a_BHSD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_BSE = x_BSE + self.attention(self.norm1(x_BSE))
        return x_BSE + self.down(F.gelu(self.up(self.norm2(x_BSE))))


class Transformer(nn.Module):
    """Tables, blocks and a head that shares the table of tokens."""

    tp_plan = {
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.out": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "tokens": "embedding_rowwise",
        "head": "colwise_logits",
    }
    pp_plan = ("embed", "blocks", "logits")

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """What the first block reads."""
        place_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        return self.tokens(tokens_BS) + self.positions(place_S)

    def logits(self, x_BSE: Tensor) -> Tensor:
        """What the last block's output becomes."""
        return self.head(self.norm(x_BSE))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSE = self.embed(tokens_BS)
        for block in self.blocks:
            x_BSE = block(x_BSE)
        return self.logits(x_BSE)


def build() -> nn.Module:
    """The module; forerun adds the loss of the next token."""
    return Transformer()
