"""What optimisers add to a plan: moments to the byte, the time of a step, what a device must have.

Most of the moments is a rate per element (`state_bytes.py`), with which every layout of a grid is
priced; what rounding, tables and small tensors come to is `excess_bytes`.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from ..cluster import Pool
from ..errors import InputError, unknown_name
from ..stack import Stack
from ..workload import Optimizer
from .graph import Array
from .layout import Layouts
from .moment_bytes import FORMATS, moment_bytes
from .options import Options
from .pieces import Piece, Pieces
from .prices import Prices
from .stages import Load

HOST_BYTES_PER_S = 50e9
"""Memory traffic of a host's fused AdamW: assumed, two channels of DDR5."""
ON_CPU = {"adamw_fp8": 50.0, "adamw8bit": 260.0, "adamw4bit": 155.0, "adamw_fp8_block": 25.0}
"""Time of steps in plain operators relative to fused AdamW on a CPU: one thread, 4 matrices of 512,
torch 2.13, torchao 0.18.0."""
HOST_BYTES = 28.0
"""Read and written per element: parameter, gradient and two moments in fp32."""


def excess_bytes(
    load: Load, costs: Pieces, layouts: Layouts, options: Options, stack: Stack
) -> Array:
    """Bytes of all moments of a rank beyond the rate per element; zero for plain formats."""
    total = np.zeros(1)
    if options.optimizer not in FORMATS:
        return total
    sharded = layouts.zero > 0
    dense = np.where(sharded, layouts.shards, 1).astype(float)
    experts = np.where(sharded, layouts.expert_shards, 1.0)
    rate = FORMATS[options.optimizer].rate

    def of_piece(piece: Piece, shared: Array) -> Array:
        found = np.zeros(1)
        for tensor in piece.trained:
            rows = tensor.rows / (experts if tensor.is_expert else dense)
            exact = moment_bytes(
                options.optimizer, rows, tensor.columns, is_matrix=tensor.is_matrix,
                plain=stack.moment_bytes,
            )  # fmt: skip
            own = exact - rate * rows * tensor.columns
            found = found + (own * (1.0 - shared) if tensor.name in tables else own)
        return found

    tables = {tensor.name for tensor in costs.embedding.trained}
    both = load.embedding * load.head * (costs.tied_params > 0)
    for count, piece in load.each(costs):
        shared = both if piece is costs.head else np.zeros(1)
        total = total + count * of_piece(piece, shared)
    return total


def step_s(
    owned: Array, tensors: Array, backward_s: Array, prices: Prices, options: Options, share: float
) -> Array:
    """Seconds of one step over `owned` elements; `share` is its traffic relative to fp32 AdamW.

    A measured curve of the optimiser is used where the profile has one. `backward_s` is what copies
    of gradients to a host that updates can hide behind.
    """
    if options.optimizer == "adamw_offload":
        return _on_host_s(owned, backward_s, prices.pool)
    sizes = [owned, np.maximum(tensors, 1.0)]
    if prices.has_curve(options.optimizer):
        return prices.operator(options.optimizer, sizes, "fp32")[0]
    if prices.pool.device.kind == "cpu":
        share = ON_CPU.get(options.optimizer, share)
    return prices.operator("adamw", sizes, "fp32")[0] * share


def _on_host_s(owned: Array, backward_s: Array, pool: Pool) -> Array:
    """Gradients copied beside backward, each parameter updated by the host while the one before it
    is copied back."""
    assert pool.host is not None, "refused without a link to the host"
    copy_s = 4.0 * owned / pool.host.bytes_per_s
    update_s = HOST_BYTES * owned / HOST_BYTES_PER_S
    return np.maximum(copy_s - backward_s, 0.0) + np.maximum(copy_s, update_s)


def refuse(optimizer: str, pool: Pool) -> InputError | None:
    """Why the devices of a pool cannot have an optimiser; None where they can."""
    if optimizer not in get_args(Optimizer):
        return unknown_name("optimizer", optimizer, get_args(Optimizer))
    device = pool.device
    if optimizer == "adamw_offload" and (device.kind != "gpu" or pool.host is None):
        return InputError("optimizer", optimizer, f"{device.name} has no host to offload to",
                          "use adamw, or a GPU with a link to its host")  # fmt: skip
    before = device.capability is not None and device.capability < (8, 9)
    if optimizer == "adamw_fp8_block" and before:
        return InputError("optimizer", optimizer,
                          f"{device.name} has no casts to 8-bit floats (compute capability 8.9)",
                          "use adamw8bit or adamw_fp8")  # fmt: skip
    return None
