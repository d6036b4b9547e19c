"""Tensors that live on a tier, by name, and visit the device.

A `Store` is what optimiser states (and those of experts) wait in: `reserve` and `put` make a name's
place, `fetch` brings tensors, or parts of them, to the device, `write` takes them back. Copies are
counted and run beside compute; whoever works through many tensors asks for the next ones before it
needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .copier import Copier, Ticket
from .tier import Place, Tier


class Store:
    """Named tensors of fixed form on a tier."""

    def __init__(self, tier: Tier, copier: Copier) -> None:
        self.tier, self.copier = tier, copier
        self.places: dict[str, Place] = {}
        self.forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.copied: dict[str, float] = {}
        """Bytes moved since the last look, by `out@tier` and `in@tier`."""

    def reserve(self, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        """Make the place of a tensor, of zeros."""
        self.places[name] = self.tier.make(shape.numel() * dtype.itemsize)
        self.forms[name] = (shape, dtype)

    def put(self, name: str, tensor: Tensor) -> None:
        """Fill a tensor's place, which it gets if it has none; returns when it is there."""
        if name not in self.places:
            self.reserve(name, tensor.shape, tensor.dtype)
        self.copier.submit("out", [partial(self.tier.write, self.places[name], 0, tensor)]).wait()

    def get(self, name: str, device: torch.device) -> Tensor:
        """A copy of a tensor on a device; returns when it is there."""
        shape, dtype = self.forms[name]
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.copier.submit("in", [partial(self.tier.read, self.places[name], 0, tensor)]).wait()
        return tensor

    def fetch(self, parts: Mapping[tuple[str, int], Tensor]) -> Ticket:
        """Begin to fill tensors, each from the name and the element it is of."""
        return self._move("in", parts)

    def write(self, parts: Mapping[tuple[str, int], Tensor]) -> Ticket:
        """Begin to take tensors back; they must not change before the ticket is done."""
        return self._move("out", parts)

    def _move(self, direction: str, parts: Mapping[tuple[str, int], Tensor]) -> Ticket:
        jobs = []
        for (name, first), tensor in parts.items():
            at = first * self.forms[name][1].itemsize
            move = self.tier.write if direction == "out" else self.tier.read
            jobs.append(partial(move, self.places[name], at, tensor))
            key = f"{direction}@{self.tier.name}"
            moved = tensor.numel() * tensor.element_size()
            self.copied[key] = self.copied.get(key, 0.0) + moved
        return self.copier.submit("out" if direction == "out" else "in", jobs)
