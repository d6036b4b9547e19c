"""Expert placement: which rank of an expert-parallel group holds which experts, some of them twice.

Operators stay what they are. A rank has as many experts as it has slots; rows of the fullest rank
are `imbalance` times the mean, which its memory must hold and for which the others wait. Replicas
of an expert add their gradients up once per step (`replica_bytes`).
"""

from __future__ import annotations

import numpy as np

from ..graph import Array, Sizes
from ..options import Options


def local_axes(sizes: Sizes, options: Options) -> Sizes:
    """Local axis sizes under a placement; unchanged without experts or without one."""
    if "experts" not in sizes:
        return sizes
    changed = dict(sizes)
    apart = sizes["ep"] > 1
    if options.expert_slots is not None:
        slots = float(options.expert_slots)
        changed["experts"] = np.where(apart, slots, sizes["experts"])
        changed["all_slots"] = np.where(apart, slots * sizes["ep"], sizes["all_slots"])
        sources = sizes["ep"] * np.where(sizes["expert_seq"] > sizes["seq_part"],
                                         sizes["expert_tp"], 1.0)  # fmt: skip
        changed["sorted"] = np.where(apart, np.where(slots > 1, sources, 1.0), sizes["sorted"])
    if options.expert_imbalance is not None:
        changed["held"] = sizes["held"] * np.where(apart, options.expert_imbalance, 1.0)
    return changed


def replica_bytes(expert_params: Array, options: Options, ep: Array, shard: Array) -> Array:
    """Bytes that a rank hands to all-to-alls per step to add the gradients of replicas up.

    Of c replicas c - 1 send their gradient, and get the sum back: 2 (replicas - experts) gradients
    of one expert in all, shared out over the group; each is divided over `shard` ranks.
    """
    if not options.expert_replicas or options.expert_slots is None:
        return 0.0 * expert_params
    one = expert_params / options.expert_slots * 4.0
    return np.where(ep > 1, 2.0 * options.expert_replicas * one / ep / shard, 0.0)
