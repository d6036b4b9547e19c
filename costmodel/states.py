"""Bytes of parameters, gradients and optimiser states at rest on one rank.

What is kept per parameter says `state_bytes.py`. What is divided over the ranks that hold the same
weights: fsdp divides all of it under any ZeRO stage; megatron divides master and moments from stage
1 on, gradients from 2, parameters at 3. Experts are held by fewer ranks than the rest, so they are
divided by fewer. Frozen parameters have neither gradient nor states; they lie as matmuls use them,
or in fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..stack import Stack
from .graph import Array
from .layout import Layouts
from .options import Options
from .pieces import Piece, Pieces
from .stages import Load
from .state_bytes import StateBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Local parameters before division over data-parallel ranks, by how they are kept."""

    trained: Array
    experts: Array
    """Trained ones of routed experts."""
    frozen: Array
    frozen_experts: Array
    spared_bytes: Array
    """What frozen weights take less than in the dtype of use."""
    spared_expert_bytes: Array
    codes: Array
    """Weights of layers that are gathered as codes of one byte."""

    @staticmethod
    def of(load: Load, costs: Pieces) -> Counts:
        """The parameters of all pieces of a load."""
        trained = load.trainable_params(costs)
        experts = load.total(costs, "trainable_expert_params")
        return Counts(
            trained=trained,
            experts=experts,
            frozen=np.maximum(load.params(costs) - trained, 0.0),
            frozen_experts=load.total(costs, "expert_params") - experts,
            spared_bytes=load.total(costs, "spared_bytes"),
            spared_expert_bytes=load.total(costs, "spared_expert_bytes"),
            codes=load.total(costs, "gathered_codes"),
        )

    @staticmethod
    def of_layer(piece: Piece) -> Counts:
        """The parameters of one layer."""
        return Counts(
            trained=piece.trainable_params,
            experts=piece.trainable_expert_params,
            frozen=piece.params - piece.trainable_params,
            frozen_experts=piece.expert_params - piece.trainable_expert_params,
            spared_bytes=piece.spared_bytes,
            spared_expert_bytes=piece.spared_expert_bytes,
            codes=piece.gathered_codes,
        )

    def used_bytes(self, states: StateBytes) -> Array:
        """All of them as matmuls (or, of frozen ones, their dequantisation) read them."""
        every = self.trained + self.experts + self.frozen + self.frozen_experts
        coded = self.codes * (states.used - 1.0)
        return every * states.used - self.spared_bytes - self.spared_expert_bytes - coded

    @property
    def with_gradient(self) -> Array:
        """Those that get a gradient."""
        return self.trained + self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Divisors:
    """Ranks over which each kind of state is divided."""

    parameters: Array
    gradients: Array
    optimizer: Array

    @staticmethod
    def of(stack: Stack, layouts: Layouts, *, experts: bool = False) -> Divisors:
        """Those of the dense parameters, or of the experts'."""
        ranks = layouts.expert_shards if experts else layouts.shards.astype(float)
        first = (3, 2, 1) if stack.sharding == "megatron" else (1, 1, 1)
        parameters, gradients, optimizer = (np.where(layouts.zero >= z, ranks, 1.0) for z in first)
        return Divisors(parameters=parameters, gradients=gradients, optimizer=optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class AtRest:
    """Bytes of one rank's states."""

    parameters: Array
    optimizer: Array
    of_experts: Array
    """Part of `optimizer` that belongs to routed experts."""
    gradients: Array
    """After division."""
    whole_gradients: Array
    """Before it."""

    def on_device(self, options: Options) -> AtRest:
        """What of it is not offloaded; FSDP leaves gradients with the parameters."""
        away = options.offload_states
        none = 0.0 * self.optimizer
        if away is None:
            return self
        left = replace(
            self, optimizer=self.optimizer - self.of_experts if away == "experts" else none,
            of_experts=none,
        )  # fmt: skip
        return replace(left, parameters=none, gradients=none) if away == "parameters" else left

    @staticmethod
    def of(counts: Counts, states: StateBytes, layouts: Layouts, stack: Stack) -> AtRest:
        """The states of these parameters."""
        dense = Divisors.of(stack, layouts)
        experts = Divisors.of(stack, layouts, experts=True)
        frozen = counts.frozen * states.used - counts.spared_bytes
        frozen_experts = counts.frozen_experts * states.used - counts.spared_expert_bytes
        trained = counts.trained
        of_experts = states.optimizer * counts.experts / experts.optimizer
        return AtRest(
            parameters=(trained * states.parameter + frozen) / dense.parameters
            + (counts.experts * states.parameter + frozen_experts) / experts.parameters,
            optimizer=states.optimizer * trained / dense.optimizer + of_experts,
            of_experts=of_experts,
            gradients=states.gradient
            * (trained / dense.gradients + counts.experts / experts.gradients),
            whole_gradients=states.gradient * counts.with_gradient,
        )
