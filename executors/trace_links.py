"""The collectives of a cut module while it is recorded: noted, and nothing exchanged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recorder import Exchange, Recorder


class _Gather(torch.autograd.Function):
    """The shapes of `module_cuts.GatherLast`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, size: int) -> Tensor:
        ctx.width = part.shape[-1]
        return torch.cat([part] * size, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, 0, ctx.width).contiguous(), None


class TraceLinks:
    """Rank 0 of a group that is not there."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.recorder: Recorder | None = None
        """Who hears of the collectives; exchanged from one recording to the next."""

    def _note(self, *exchanges: Exchange) -> None:
        if self.recorder is not None:
            self.recorder.exchange(*exchanges)

    def enter(self, x: Tensor) -> Tensor:
        self._note(Exchange("all_reduce", x.numel(), backward=True))
        return x

    def leave(self, x: Tensor) -> Tensor:
        self._note(Exchange("all_reduce", x.numel()))
        return x

    def gather(self, x: Tensor) -> Tensor:
        self._note(Exchange("all_gather", x.numel() * self.size))
        whole: Any = _Gather.apply(x, self.size)
        return whole

    def loss(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Three sums of one number per token, in fp32, as in `vocab_loss.py`."""
        loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
        one = Exchange("all_reduce", targets_BS.numel(), dtype="fp32")
        self._note(one, one, one)
        return loss
