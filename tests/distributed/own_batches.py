"""A module that makes its own batches and tells how it can be divided; its output is gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, PIXELS, CLASSES, LAYERS = 16, 24, 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BE: Tensor) -> Tensor:
        return x_BE + self.down(F.gelu(self.up(self.norm(x_BE))))


class Classifier(nn.Module):
    tp_plan = {
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "colwise_rep",
    }
    pp_plan = ("first", "blocks", "loss")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def first(self, image_BX: Tensor, label_B: Tensor) -> Tensor:
        return self.stem(image_BX)

    def loss(self, x_BE: Tensor, image_BX: Tensor, label_B: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x_BE), label_B)

    def forward(self, image_BX: Tensor, label_B: Tensor) -> Tensor:
        return self.loss(self.blocks(self.first(image_BX, label_B)), image_BX, label_B)


def make_batch(batch: int, seq_tokens: int) -> tuple[Tensor, Tensor]:
    label_B = torch.randint(CLASSES, (batch,))
    return torch.randn(batch, PIXELS) + label_B[:, None], label_B


def build() -> tuple[nn.Module, object]:
    return Classifier(), make_batch
