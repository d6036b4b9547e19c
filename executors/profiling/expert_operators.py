"""The operators of experts: grouped matmuls, routing, and rows in the order of their experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ...experts import Experts
from ..experts.grouped import GroupedLinear, Groups
from ..experts.routing import route
from ..experts.rows import Permute, Unpermute, sorted_places
from .cases import Case, Sizes, leaves, through_autograd
from .timing import Buffers


def grouped_linear(buffers: Buffers, sizes: Sizes) -> Case:
    """The matmuls of several experts on equally many rows each; weights and inputs are cold."""
    rows, width_out, width_in, num_groups = sizes
    each = rows // num_groups
    layer = GroupedLinear(num_groups, width_in, width_out)
    groups = Groups(torch.full((num_groups,), each, device=buffers.device), [each] * num_groups)
    inputs = leaves(buffers.rotating(each * num_groups, width_in))
    weights = leaves(buffers.rotating(num_groups, width_out, width_in))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (x, groups))

    count = min(len(inputs), len(weights))
    rotating = [(inputs[i], weights[i]) for i in range(count)]
    return through_autograd(function, rotating[0], rotating, buffers)


def _choices(buffers: Buffers, tokens: int, copies: int) -> Tensor:
    """Experts that tokens would choose: twice as many experts as copies, evenly drawn."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, 2 * copies, generator=generator)
    return scores.topk(copies, dim=1).indices.to(buffers.device)


def routing(buffers: Buffers, sizes: Sizes) -> Case:
    """Scores and the two largest of them; no more than there are."""
    tokens, num_experts = sizes
    spec = Experts(num_experts=num_experts, top_k=min(2, num_experts), ffn_hidden=1)
    rotating = [(x,) for x in leaves(buffers.rotating(tokens, num_experts))]
    return through_autograd(lambda x: route(x, spec).weights_TK, rotating[0], rotating, buffers)


ROW = 128
"""Width of the rows that are permuted: the kinds are priced by elements."""


def permute(buffers: Buffers, sizes: Sizes) -> Case:
    """Sorting the choices, and tokens as rows in that order."""
    elements, copies = sizes
    tokens = elements // ROW
    chosen = _choices(buffers, tokens, copies)

    def function(x: Tensor) -> Tensor:
        places = sorted_places(chosen, 2 * copies)
        out: Any = Permute.apply(x, places.token_R, places.row_TK, False)
        return out

    rotating = [(x,) for x in leaves(buffers.rotating(tokens, ROW))]
    return through_autograd(function, rotating[0], rotating, buffers)


def unpermute(buffers: Buffers, sizes: Sizes) -> Case:
    """The weighted sum of each token's rows; backward gives the weights' gradient, too."""
    elements, copies = sizes
    tokens = elements // ROW
    row_TK = sorted_places(_choices(buffers, tokens, copies), 2 * copies).row_TK
    weights_TK = torch.full((tokens, copies), 0.5, device=buffers.device, requires_grad=True)

    def function(x: Tensor, weights: Tensor) -> Tensor:
        out: Any = Unpermute.apply(x, weights, row_TK, False)
        return out

    rotating = [(x, weights_TK) for x in leaves(buffers.rotating(tokens * copies, ROW))]
    return through_autograd(function, rotating[0], rotating, buffers)
