"""Bytes of parameters, gradients and optimiser states at rest on one rank.

Per trained parameter a stack keeps the parameter itself, a gradient, an fp32 master copy where the
parameter has 16 bits, and the moments of its optimiser:

    stack                          parameter  gradient  master  moments (AdamW)
    fsdp (ours, torchtitan)            4          4        0       8
    megatron (mixed precision)         2        4 or 2     4       8
    16-bit throughout (torchtune)      2          2        0       4

What is divided over the ranks that hold the same weights: fsdp divides all of it under any ZeRO
stage; megatron divides master and moments from stage 1 on, gradients from 2, parameters at 3.
Experts are held by fewer ranks than the rest, so they are divided by fewer. Frozen parameters have
neither gradient nor states, and may be stored in fewer bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cluster import DTYPE_BYTES, Stack
from .graph import Array
from .layout import Layouts
from .options import Options
from .pieces import Piece, Pieces
from .stages import Load

LOW_BIT_MOMENT_BYTES: dict[str, float] = {
    "adamw8bit": 2 + 2 * 4 / 256,  # torchao: one fp32 scale per block of 256, for both moments
    "adamw_fp8": 2 + 2 * 3 * 4 / 128,  # COAT: three fp32 numbers per group of 128
    "sgd": 0.0,  # without momentum
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes per parameter."""

    used: float
    """As the matmuls use it."""
    parameter: float
    gradient: float
    optimizer: float
    """Master copy and moments."""
    unpacked: float
    """Master copy and moments as an update works on them."""
    frozen: float
    """Of a frozen weight of a layer; those of embedding and head stay as used."""

    @property
    def update_share(self) -> float:
        """Traffic of an update relative to AdamW in fp32: parameters, master copies and moments are
        read and written, gradients read. Low-bit moments are unpacked and packed on the way, which
        moves what it saves."""
        moved = 2 * self.parameter + self.gradient + 2 * self.unpacked
        return moved / (2 * 4.0 + 4.0 + 2 * 8.0)

    @staticmethod
    def of(stack: Stack, options: Options) -> StateBytes:
        """The bytes that a stack keeps under an optimiser."""
        used = DTYPE_BYTES[options.tensor_dtype]
        whole = stack.sharding == "megatron"
        own_parameter = used if whole else 4.0
        parameter = own_parameter if stack.parameter_bytes is None else stack.parameter_bytes
        own_master = 4.0 if whole and parameter < 4 else 0.0
        master = own_master if stack.master_bytes is None else stack.master_bytes
        moments = LOW_BIT_MOMENT_BYTES.get(options.optimizer, stack.moment_bytes)
        return StateBytes(
            used=used,
            parameter=parameter,
            gradient=4.0 if stack.gradient_bytes is None else stack.gradient_bytes,
            optimizer=master + moments,
            unpacked=master + (stack.moment_bytes if options.optimizer != "sgd" else 0.0),
            frozen=DTYPE_BYTES[options.base_dtype] if options.base_dtype else used,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Local parameters before division over data-parallel ranks, by how they are kept."""

    trained: Array
    experts: Array
    """Trained ones of routed experts."""
    frozen: Array
    """Frozen weights of layers, those of experts not included."""
    frozen_experts: Array
    frozen_rest: Array
    """Frozen weights of embedding and head."""

    @staticmethod
    def of(load: Load, costs: Pieces) -> Counts:
        """The parameters of all pieces of a load."""
        frozen = np.zeros(1)
        for count, piece in zip(load.layers, costs.layers, strict=True):
            frozen = frozen + count * (piece.params - piece.trainable_params)
        trained = load.trainable_params(costs)
        experts = load.total(costs, "trainable_expert_params")
        return Counts(
            trained=trained,
            experts=experts,
            frozen=frozen,
            frozen_experts=load.total(costs, "expert_params") - experts,
            frozen_rest=np.maximum(load.params(costs) - trained - frozen, 0.0),
        )

    @staticmethod
    def of_layer(piece: Piece) -> Counts:
        """The parameters of one layer."""
        return Counts(
            trained=piece.trainable_params,
            experts=piece.trainable_expert_params,
            frozen=piece.params - piece.trainable_params,
            frozen_experts=piece.expert_params - piece.trainable_expert_params,
            frozen_rest=0.0 * piece.params,
        )

    def used_bytes(self, states: StateBytes) -> Array:
        """All of them as matmuls (or, of frozen ones, their dequantisation) read them."""
        trained = (self.trained + self.experts + self.frozen_rest) * states.used
        return trained + (self.frozen + self.frozen_experts) * states.frozen

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
    gradients: Array
    """After division."""
    whole_gradients: Array
    """Before it."""

    @staticmethod
    def of(counts: Counts, states: StateBytes, layouts: Layouts, stack: Stack) -> AtRest:
        """The states of these parameters."""
        dense = Divisors.of(stack, layouts)
        experts = Divisors.of(stack, layouts, experts=True)
        frozen = counts.frozen * states.frozen + counts.frozen_rest * states.used
        trained = counts.trained
        return AtRest(
            parameters=(trained * states.parameter + frozen) / dense.parameters
            + (counts.experts * states.parameter + counts.frozen_experts * states.frozen)
            / experts.parameters,
            optimizer=states.optimizer
            * (trained / dense.optimizer + counts.experts / experts.optimizer),
            gradients=states.gradient
            * (trained / dense.gradients + counts.experts / experts.gradients),
            whole_gradients=states.gradient * counts.with_gradient,
        )
