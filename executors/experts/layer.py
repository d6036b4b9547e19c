"""The mixture of experts of one decoder layer, in the place of its MLP.

    router -> copies of tokens as rows -> to the ranks of their experts -> grouped matmuls -> back
           -> weighted sum per token (+ the shared expert)

The operators are those of `costmodel/layers/experts.py`, one for one. How rows get to their experts
is a `Trip` of steps, none on a rank that holds all experts.

Shape suffixes: T tokens that the rank routes at once, X experts, K choices, R rows, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ...experts import Experts
from ...model import GATED, Layer, Mlp
from ..linear import Linear
from ..torch_compat import backward_node
from .grouped import Gated, GroupedLinear, Groups
from .routing import route
from .rows import Permute, Places, Unpermute, padded_places, sorted_places
from .slots import Slots
from .training import RouterTraining
from .trip import Ways, take_trip


def unchanged(x: Tensor) -> Tensor:
    """The same tensor: what enters and leaves a layer that nothing divides."""
    return x


class RoutedExperts(nn.Module):
    """The MLPs of this rank's experts; a module of its own, so that it can be sharded apart."""

    def __init__(self, hidden: int, experts: Experts, kind: Mlp) -> None:
        super().__init__()
        self.kind: Mlp = kind
        if kind in GATED:
            self.gate = GroupedLinear(experts.num_experts, hidden, experts.ffn_hidden)
        self.up = GroupedLinear(experts.num_experts, hidden, experts.ffn_hidden)
        self.down = GroupedLinear(experts.num_experts, experts.ffn_hidden, hidden)

    def forward(self, rows: Tensor, groups: Groups | None) -> Tensor:
        up = self.up(rows, groups)
        if self.kind in GATED:
            return self.down(Gated.apply(self.gate(rows, groups), up, self.kind), groups)
        if self.kind == "gelu":
            return self.down(F.gelu(up), groups)
        inner = F.relu(up)
        return self.down(inner.square() if self.kind == "squared_relu" else inner, groups)


class Moe(nn.Module):
    """Router, routed experts and, where the model has one, the expert that every token passes."""

    def __init__(self, hidden: int, layer: Layer, shared: nn.Module | None) -> None:
        super().__init__()
        assert layer.experts is not None
        self.spec = layer.experts
        self.router = Linear(hidden, self.spec.num_experts, bias=False)
        self.experts = RoutedExperts(hidden, self.spec, layer.mlp)
        self.shared = shared
        self.enter: Callable[[Tensor], Tensor] = unchanged
        self.leave: Callable[[Tensor], Tensor] = unchanged
        self.slots = Slots.contiguous(self.spec.num_experts, 1)
        self.ways = Ways()
        self.training_of_router = RouterTraining(self.spec.num_experts)
        self.received_rows: list[int] = []
        """Rows that came to this rank's experts, per forward pass, where ranks exchange them."""
        self.dropped: Tensor | None = None
        """Copies that full experts turned away."""

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_BSE = self.enter(x_BSE)
        x_TE = x_BSE.flatten(0, 1)
        logits_TX = self.router(x_TE)
        routed = route(logits_TX, self.spec)
        pending = self.training_of_router.observe(logits_TX, routed)
        places = self._places(routed.expert_TK, routed.weights_TK)
        trip = take_trip(self.ways, places, self.slots.per_rank, self.received_rows)
        rows = Permute.apply(x_TE, places.token_R, places.row_TK, places.padded)
        for step in trip.there:
            rows = step(rows)
        rows = self.experts(rows, trip.groups)
        for step in trip.back:
            rows = step(rows)
        out_TE = Unpermute.apply(rows, pending.weights(), places.row_TK, places.padded)
        del rows
        if self.shared is not None:
            out_TE = out_TE + self.shared(x_BSE).flatten(0, 1)
        return self.leave(out_TE).view(x_BSE.shape)  # pyright: ignore[reportArgumentType]

    def _places(self, expert_TK: Tensor, weights_TK: Tensor) -> Places:
        """The row of every copy."""
        slot_TK = self.slots.choose(expert_TK, self.ways.rank)
        if self.spec.capacity_factor is None:
            return sorted_places(slot_TK, len(self.slots))
        capacity = self.spec.capacity(len(slot_TK))
        places = padded_places(slot_TK, weights_TK, len(self.slots), capacity, self.spec.drop)
        if backward_node() is None:
            dropped = (places.row_TK == len(places.token_R)).sum()
            self.dropped = dropped if self.dropped is None else self.dropped + dropped
        return places

    def forget(self) -> None:
        """Start all counts anew."""
        self.training_of_router.forget()
        self.received_rows.clear()
        self.dropped = None
