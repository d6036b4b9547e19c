"""The linear layer of the models that plans are run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frozen.stored import Stored, StoredProduct

Run = Callable[..., Any]
"""`run(name, function, *args)`: the result of a named operator on its arguments."""
ADAPTER_SCALE = 2.0
"""What an adapter's product is multiplied with: alpha / rank of Hu et al. 2021 (arXiv 2106.09685),
section 4.1, for every rank."""


def run_plainly(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The operator, and nothing else."""
    return function(*args)


class Linear(nn.Linear):
    """A linear whose product with its weight a technique may exchange.

    Its weight may be frozen and stored in few bits, and it may have an adapter:
    x W^T + 2 (x A^T) B^T, A (rank, in) and B (out, rank).
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product: Callable[..., Tensor] = F.linear
        """x, weight, bias (or None, or left out) -> x weight^T + bias."""
        self.bias_waits = False
        """Whether products are partial sums, which the bias is added to later."""
        self.stored: Stored | None = None
        """The weight, where it is not `weight`."""
        self.lora_a: Linear | None = None
        self.lora_b: Linear | None = None

    def base(self, input: Tensor) -> Tensor:
        """The product without the adapter's."""
        bias = None if self.bias_waits else self.bias
        if self.stored is not None:
            out: Any = StoredProduct.apply(input, bias, self.stored)
            return out
        return self.product(input, self.weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.lora_a is None:
            return self.base(input)
        return run_linear(run_plainly, "", self, input)


def run_linear(run: Run, name: str, linear: Linear, x: Tensor) -> Tensor:
    """A linear by its operators: its product, and where it has an adapter those of that."""
    if linear.lora_a is None or linear.lora_b is None:
        return run(name, linear, x)
    base = run(name, linear.base, x)
    middle = run(f"{name}.lora_a", linear.lora_a.base, x)
    update = run(f"{name}.lora_b", linear.lora_b.base, middle)
    return run(f"{name}.lora_add", scaled_sum, base, update)


def scaled_sum(base: Tensor, update: Tensor) -> Tensor:
    """What a linear with an adapter gives."""
    return torch.add(base, update, alpha=ADAPTER_SCALE)
