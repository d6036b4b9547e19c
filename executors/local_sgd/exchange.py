"""The mean of a buffer over replicas, on its way beside the training.

In fp32 it is one all-reduce. In 4 or 8 bits codes cannot be added on the way, so that each of n
replicas sums one part: an all-to-all of encoded parts, their mean in fp32, and an all-gather of the
means, encoded again. Every replica decodes the same bytes and gets the same mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...local_sgd import BLOCK
from ..torch_compat import all_gather_single
from .codec import decode, encode

Waiting = Callable[[], AbstractContextManager[None]]
"""A mark around what a rank waits for."""


class Exchange:
    """One mean on its way; `finish` gives it. All replicas call the same in the same order."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup, bits: int, waiting: Waiting) -> None:
        """Send a flat fp32 buffer, which may be written into."""
        self.group, self.bits, self.waiting = group, bits, waiting
        self.num, self.elements = group.size(), sent.numel()
        self.work: Any = None
        self.result: Tensor | None = None
        self.is_first_half = bits < 32
        if bits == 32:
            self.buffer = sent
            self.work = dist.all_reduce(sent, group=group, async_op=True)
        else:
            self._own: Tensor | None = encode(self._parts(sent), bits)
            self.buffer = torch.empty_like(self._own)
            self.work = dist.all_to_all_single(self.buffer, self._own, group=group, async_op=True)

    @staticmethod
    def arrived(mean: Tensor, group: dist.ProcessGroup, bits: int, waiting: Waiting) -> Exchange:
        """One whose mean is known, as after a resumption."""
        exchange = Exchange.__new__(Exchange)
        exchange.group, exchange.bits, exchange.waiting = group, bits, waiting
        exchange.result, exchange.is_first_half = mean, False
        return exchange

    def _parts(self, sent: Tensor) -> Tensor:
        """A row for each replica, filled up with zeros to whole blocks."""
        part = -(-self.elements // (self.num * BLOCK)) * BLOCK
        padded = sent.new_zeros(self.num * part)
        padded[: self.elements] = sent
        return padded.view(self.num, part)

    def advance(self) -> None:
        """Go on to the second half of a quantised exchange, when the first is done."""
        if not self.is_first_half:
            return
        self._wait()
        self.is_first_half = False
        mean_1N = decode(self.buffer, self.bits).mean(dim=0, keepdim=True)
        self._own = encode(mean_1N, self.bits)
        self.buffer = torch.empty_like(self.buffer)
        self.work = all_gather_single(self.buffer, self._own, group=self.group, async_op=True)

    def finish(self) -> Tensor:
        """The mean, once it is there."""
        if self.result is not None:
            return self.result
        self.advance()
        self._wait()
        if self.bits == 32:
            self.result = self.buffer.div_(self.num)
        else:
            self.result = decode(self.buffer, self.bits).flatten()[: self.elements]
            self._own = None
        del self.buffer
        return self.result

    def buffers(self) -> list[Tensor]:
        """What it holds now."""
        held = [self.result, getattr(self, "buffer", None), getattr(self, "_own", None)]
        return [tensor for tensor in held if tensor is not None]

    def _wait(self) -> None:
        with self.waiting():
            self.work.wait()
        self.work = None
