"""Clipping of gradients by the norm of all of them together, whatever ranks hold their parts.

    n = sqrt( sum over ranks of  sum of squares of a rank's part / ranks that hold the same part )
    g := g min(1, clip / (n + 1e-6))

as `torch.nn.utils.clip_grad_norm_` on one process: one all-reduce of one number over all ranks, or
over those of one replica where replicas train apart.
Every rank gets the same n, so that replicas stay equal to the last bit. The same part is held by
the replicas that FSDP does not shard over, by all tp ranks where tp did not cut a parameter, and by
two ranks where first and last stage each have a copy of a tied table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .torch_compat import scale_all


def gradient_norm(
    parts: Mapping[int, Sequence[Tensor]],
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The norm of all gradients, a number; `parts` are this rank's by how many ranks hold each.

    `group` are the ranks that train together; None = all.
    """
    square = torch.zeros((), device=device)
    for copies, tensors in sorted(parts.items()):
        norm = torch.nn.utils.get_total_norm(list(tensors))
        square += norm.float().square() / copies
    if dist.get_world_size(group) > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt_()


def clip(
    parts: Mapping[int, Sequence[Tensor]],
    clip_norm: float,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Scale gradients down in place to `clip_norm`; returns what their norm was."""
    norm = gradient_norm(parts, device, group)
    factor = (clip_norm / (norm + 1e-6)).clamp_(max=1.0)
    for tensors in parts.values():
        scale_all(list(tensors), factor)
    return norm


def by_copies(
    gradients: Mapping[str, Tensor], copies: Mapping[str, int]
) -> dict[int, list[Tensor]]:
    """Gradients grouped by the number of ranks that hold the same part; empty parts left out."""
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for name, gradient in gradients.items():
        if gradient.numel() > 0:
            groups[copies[name]].append(gradient)
    return dict(groups)
