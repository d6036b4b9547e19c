"""A small residual network for images: a stem, two groups of equal blocks, and a classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CLASSES, SIDE = 16, 10, 16


class Block(nn.Module):
    """Two convolutions behind batch norms, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """Images to the loss of their class."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.fine = nn.Sequential(*(Block(WIDTH) for _ in range(3)))
        self.shrink = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(Block(2 * WIDTH) for _ in range(2)))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        x = self.coarse(self.shrink(self.fine(self.stem(image))))
        return F.cross_entropy(self.head(x.mean(dim=(2, 3))), label)


def make_batch(batch: int, seq_tokens: int) -> tuple[Tensor, Tensor]:
    """Noise around a brightness that tells the class; the sequence length is not used."""
    label = torch.randint(CLASSES, (batch,))
    return torch.randn(batch, 3, SIDE, SIDE) + label[:, None, None, None] / CLASSES, label


def build() -> tuple[nn.Module, object]:
    """The module, and what makes its batches."""
    return ResNet(), make_batch
