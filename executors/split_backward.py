"""A backward in two halves: the gradient of a stage's input now, those of its weights later.

The products with weights are nearly all of what nobody waits for. In the first half (I) each of
them keeps its input and the gradient of its output, and returns the gradient of its input alone;
the second half (W) multiplies the two kept. Everything else that autograd saved is gone after I:
this is the gradient store of Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 4. Small
gradients (norms, biases, embedding) are made in I.

Torch's own halves walk the autograd graph in Python for every micro-batch, keep all of it until W,
run recomputation twice and leave the first stage's I empty. Measured on a CPU with two ranks, four
layers of hidden 256 (64), 8 micro-batches of 256 tokens in the order of 1f1b, every backward split:
walking took 11 % (21 %) more process time per step than whole backwards, the store 3 % (8 %); the
last rank of zb-h1 had 60 MiB of live tensors at its peak by walking, 47 MiB by the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Owed = Callable[[Tensor | None], Tensor]
"""Makes a weight's gradient, and adds it to the one that there may be; returns the sum."""


class Later:
    """Products of one stage whose weights still wait for their gradients."""

    def __init__(self) -> None:
        self.putting_off = False
        """Whether a backward that runs now is the first half of one."""
        self.waiting: list[tuple[Tensor, Owed]] = []
        """Weights, and what makes their gradients."""
        self._block: int | None = None
        self._copies: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
        """Inputs that lie in buffers, of one block, and their copies. Each input is held as long as
        it is known by its address, so that nothing else comes to lie there."""

    def take(self) -> Callable[[], None]:
        """What makes the gradients that were put off since the last call; nothing after a whole
        backward. Torch calls this a builder of dw runners."""
        taken, self.waiting = self.waiting, []
        self._copies.clear()
        return partial(add_gradients, taken)

    def copy_of(self, x_MK: Tensor, block: int) -> Tensor:
        """A copy of an input in a buffer, one for all products of a block that read it."""
        if block != self._block:
            self._copies.clear()
            self._block = block
        key = (x_MK.data_ptr(), x_MK.shape)
        if key not in self._copies:
            self._copies[key] = (x_MK, x_MK.clone())
        return self._copies[key][1]


@torch.no_grad()
def add_gradients(waiting: list[tuple[Tensor, Owed]]) -> None:
    """Add to the gradients of weights what their products owe; lets go of each pair at once."""
    while waiting:
        weight, owed = waiting.pop()
        weight.grad = owed(weight.grad)


def owed_by_linear(x_MK: Tensor, grad_MN: Tensor, there_NK: Tensor | None) -> Tensor:
    """The gradient of a weight (N, K) of input and gradient of the output, added to `there_NK`."""
    if there_NK is None:
        return grad_MN.t() @ x_MK
    return there_NK.addmm_(grad_MN.t(), x_MK)


class Keep(torch.autograd.Function):
    """The input of a product, kept until the gradient of the product's weight is made.

    It stands before the product so that recomputation, which ends once everything that was saved is
    back, does not run the last product of a block again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, later: Later, slot: list[Tensor], lent: int | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight_NK, ctx.later, ctx.slot, ctx.lent = weight_NK, later, slot, lent
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x_MK, grad_MN = ctx.saved_tensors[0].flatten(0, -2), ctx.slot.pop()
        if ctx.later.putting_off:
            if ctx.lent is not None:
                x_MK = ctx.later.copy_of(x_MK, ctx.lent)
            ctx.later.waiting.append((ctx.weight_NK, partial(owed_by_linear, x_MK, grad_MN)))
            return grads[0], None, None, None, None
        return grads[0], grad_MN.t() @ x_MK, None, None, None


class Product(torch.autograd.Function):
    """x W^T + b without W's gradient; that of the output goes to `Keep` through the slot."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias_N: Tensor | None, weight: tuple[Tensor], slot: list[Tensor]
    ) -> Tensor:
        ctx.weight, ctx.slot = weight, slot
        return F.linear(x, weight[0], bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_MN = grads[0].flatten(0, -2)
        ctx.slot.append(grad_MN)
        bias_grad = grad_MN.sum(0) if ctx.needs_input_grad[1] else None
        return grads[0] @ ctx.weight[0], bias_grad, None, None


def apply(piece: nn.Module, lent: Iterable[nn.Module] = ()) -> Later:
    """Have the products of a piece wait where a backward is split; before or after tp.

    `lent` are blocks whose inputs of products lie, during their backward, in buffers that are used
    again after it: what waits of them is copied.
    """
    later = Later()
    block_of = {module: index for index, block in enumerate(lent) for module in block.modules()}

    def product(block: int | None, x: Tensor, weight_NK: Tensor, bias_N: Any = None) -> Any:
        if not (weight_NK.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, weight_NK, bias_N)
        slot: list[Tensor] = []
        x = Keep.apply(x, weight_NK, later, slot, block)  # pyright: ignore[reportAssignmentType]
        return Product.apply(x, bias_N, (weight_NK,), slot)

    modules: list[Any] = list(piece.modules())
    for module in modules:
        if hasattr(module, "product"):
            module.product = partial(product, block_of.get(module))  # pyright: ignore[reportArgumentType]
        if hasattr(module, "later"):  # products of several experts
            module.later = later
    return later
