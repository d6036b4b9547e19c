"""The optimiser of a plan's workload, over this rank's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import torchao_adapters
from .adamw_fp8 import AdamWFp8

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimiser of that name; moments have the dtype of the parameters, fp32, or its own."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate)
    settings = {"lr": learning_rate, **ADAMW}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if name == "adamw_fp8":
        return AdamWFp8(parameters, **settings)
    return torchao_adapters.make_optimizer(name, parameters, settings)
