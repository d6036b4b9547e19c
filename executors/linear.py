"""The linear layer of the models that plans are run with."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear whose product with its weight a technique may exchange."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product: Callable[..., Tensor] = F.linear
        """x, weight, bias (or None, or left out) -> x weight^T + bias."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)
