"""The loop that every layout is compared with: one process, one module, plain AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from forerun.executors import init
from forerun.executors.decoder import Decoder
from forerun.model import Model

SEED, LEARNING_RATE = 7, 1e-3


def whole_model(model: Model) -> Decoder:
    """All layers on this process, with the values that any layout of the model starts from."""
    piece = Decoder(model, 0, model.num_layers - 1)
    with torch.no_grad():
        for name, parameter in piece.named_parameters():
            shape, device = tuple(parameter.shape), torch.device("cpu")
            parameter.copy_(init.full_parameter(name, shape, model, SEED, device))
    return piece


def train_plainly(
    module: nn.Module,
    backward_of: Callable[[int], float],
    steps: int,
    clip_norm: float | None = None,
) -> dict[str, Any]:
    """Losses of all steps and gradients of the first, as they are clipped.

    `backward_of(step)` runs forward and backward of a step's batch and returns its mean loss.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95),
                                  eps=1e-8, weight_decay=0.1)  # fmt: skip
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        losses.append(backward_of(step))
        if clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
            assert norm > clip_norm
        if step == 0:
            gradients = {k: p.grad.clone() for k, p in module.named_parameters()
                         if p.grad is not None}  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}
