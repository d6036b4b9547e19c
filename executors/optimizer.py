"""AdamW over this rank's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_adamw(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Fused AdamW; its states have the dtype of the parameters, fp32."""
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=True, **ADAMW)
