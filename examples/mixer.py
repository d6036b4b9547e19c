"""A small MLP-mixer for images with a gated channel MLP; `make_batch` draws what it learns from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, P patches, E width, C classes
PATCHES, PIXELS, WIDTH, CLASSES, LAYERS = 64, 48, 128, 10, 4


class Block(nn.Module):
    """Mixes patches, then channels, each behind a norm and with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_norm, self.channel_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.patch_up, self.patch_down = nn.Linear(PATCHES, 128), nn.Linear(128, PATCHES)
        self.gate, self.up = nn.Linear(WIDTH, 256), nn.Linear(WIDTH, 256)
        self.down = nn.Linear(256, WIDTH)

    def forward(self, x_BPE: Tensor) -> Tensor:
        mixed_BEP = self.patch_norm(x_BPE).transpose(1, 2)
        mixed_BEP = self.patch_down(F.gelu(self.patch_up(mixed_BEP)))
        x_BPE = x_BPE + mixed_BEP.transpose(1, 2)
        y_BPE = self.channel_norm(x_BPE)
        return x_BPE + self.down(F.silu(self.gate(y_BPE)) * self.up(y_BPE))


class Mixer(nn.Module):
    """Patches of an image to the loss of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image_BPX: Tensor, label_B: Tensor) -> Tensor:
        x_BPE = self.patches(image_BPX)
        for block in self.blocks:
            x_BPE = block(x_BPE)
        return F.cross_entropy(self.head(self.norm(x_BPE).mean(dim=1)), label_B)


def make_batch(batch: int, seq_tokens: int) -> tuple[Tensor, Tensor]:
    """Images of noise around a brightness that tells the class; the sequence length is not used."""
    label_B = torch.randint(CLASSES, (batch,))
    image_BPX = torch.randn(batch, PATCHES, PIXELS) + label_B[:, None, None] / CLASSES
    return image_BPX, label_B


def build() -> tuple[nn.Module, object]:
    """The module, and what makes its batches."""
    return Mixer(), make_batch
