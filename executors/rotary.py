"""Rotary positions: a table of cosines and sines, and the turn of queries and keys by it.

Shape suffixes: B batch, S sequence, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of rotary positions, (2, *positions, D), fp32."""
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-half / head_dim)
    angle = positions.to(torch.float32)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BSHD: Tensor, table: Tensor) -> Tensor:
    """Rotary positions applied to queries or keys.

    The table has the dtype of `x`; it is (2, S, D), or (2, B, S, D) where rows differ.
    """
    cos, sin = (table if table.dim() == 4 else table[:, None])[:, :, :, None].unbind(0)
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos + torch.cat((-second, first), dim=-1) * sin
