"""What every block keeps for backward: recompute and offload, set up together.

Both act on what a block's run holds (`executors/frames.py`): recompute says what is dropped,
offload what of the rest waits off the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..plan import Plan
from .decoder import Block
from .frames import Frame, Policy
from .landing import Landing
from .marks import Marks
from .techniques.offload import Mover, Setting
from .techniques.recompute import KeptAttention, layer_graph, mode_of, recomputed


def apply(
    blocks: Iterable[tuple[int, nn.Module]],
    plan: Plan,
    marks: Marks,
    mover: Mover | None,
    device: torch.device,
) -> None:
    """Set what the blocks of one piece keep, by the plan's settings of their layers; before FSDP,
    whose hooks stay outside. Without a mover nothing is offloaded."""
    landing = Landing(device)
    for index, block in blocks:
        assert isinstance(block, Block)
        mode = mode_of(plan, index)
        by_tokens = plan.phase.technique("offload", index).get("rest", "keep") == "recompute"
        named = plan.phase.mesh.ulysses == 1 and plan.model.layer_at(index).is_plain
        policy = None
        if mode == "full":
            block.forward = recomputed(block.forward, marks)
        elif mode == "full_keep_attn":
            kept = block.attention.core = KeptAttention()
            block.forward = recomputed(block.forward, marks, kept)
        elif mode == "selective" and not named:
            # frames know no tensors on their way between ranks, nor those of experts and low ranks
            block.attention.core = recomputed(block.attention.core, marks)
        elif by_tokens or mode != "none":
            policy = Policy.of(*layer_graph(plan, index))
        if mover is not None:
            setting = Setting.of(plan.phase, index)
            block.forward = mover.around(block, index, landing, setting, policy)
        elif policy is not None:
            block.forward = framed(block, policy, marks)


def framed(block: Block, policy: Policy, marks: Marks) -> Callable[..., Any]:
    """The block's forward, each run of it in a frame of its own."""
    forward: Callable[..., Any] = block.forward

    def run(x: Any, *constants: Any) -> Any:
        frame = Frame(block, policy, marks)
        block.run_by(frame.run)
        return frame.forward(forward, x, *constants)

    return run
