"""One cast of a tensor for all linears that read it."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..kernels.fp8_cast import Cast


class SharedCast(ABC):
    """The cast of a tensor that `readers` linears read one after the other, made once."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._left = 0
        self._of: weakref.ref[Tensor] | None = None
        self._cast: Cast | None = None

    @abstractmethod
    def make(self, x: Tensor) -> Cast:
        """The cast itself."""

    def take(self, x: Tensor) -> Cast:
        """The cast of `x`; let go when its last reader has come."""
        if self._cast is None or self._of is None or self._of() is not x:
            self._left = self.readers
            self._of = weakref.ref(x)
            with torch.no_grad():
                self._cast = self.make(x)
        found = self._cast
        self._left -= 1
        if self._left == 0:
            self._of = self._cast = None
        return found
