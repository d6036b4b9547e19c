"""Offload: what blocks keep for backward waits on a tier below the device.

What a block's run holds is in its frame (`executors/frames.py`). When the block's forward is over,
its share of that leaves, while the next block computes; one forward later it is let go. When the
backward of a block begins, its bytes are there, and those of the block before it are on their way,
into rounding buffers (`executors/landing.py`). So at most two layers' bytes are on the device that
need not be. All of this happens at fixed points of the step, whatever copies take: memory and bytes
moved are the same each time.

A part of a tensor is moved as the first bytes of its storage, and with `rest` = recompute as the
first tokens of every tensor but the layer's input and what attention makes, which move whole; the
other tokens are made again when the backward of the block begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...costmodel.techniques.offload import GRAIN_BYTES
from ...plan import Phase
from ..frames import Entry, Frame, Policy
from ..landing import ALIGNMENT_BYTES, Landing
from ..marks import Marks
from ..tiers import Copier, Place, Ticket, Tier

State = Literal["here", "leaving", "away", "coming"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What one layer offloads."""

    fraction: float
    tokens: int | None = None
    """Of the rank's part of the sequence, where the others are made again."""
    part_tokens: int = 0
    """The length of that part."""

    @staticmethod
    def of(phase: Phase, index: int) -> Setting | None:
        """Of a layer; None where nothing of it is offloaded."""
        technique = phase.technique("offload", index)
        fraction = float(technique.get("activations", 0.0))
        if technique.get("rest", "keep") == "recompute":
            parts = phase.mesh.tp if phase.sequence_parallel else 1
            length = phase.seq_tokens // phase.mesh.cp // parts
            return Setting(fraction=fraction, tokens=int(fraction * length), part_tokens=length)
        return Setting(fraction=fraction) if fraction else None


@dataclass(slots=True)
class Part:
    """What of an entry moves: the first of its bytes, or the first of its tokens."""

    entry: Entry
    moved: Callable[[Tensor], Tensor]
    """The part that moves, as a view of the flat storage."""
    num_bytes: int
    dtype: torch.dtype
    stays: Tensor | None = None
    """What is left on the device of a storage that moves in part."""


@dataclass(slots=True, eq=False)
class Node:
    """One run of a block among those of its stage and micro-batch."""

    index: int
    landing: Landing
    previous: Node | None
    frame: Frame | None = None
    setting: Setting | None = None
    parts: list[Part] = field(default_factory=list)
    state: State = "here"
    place: Place | None = None
    ticket: Ticket | None = None

    @property
    def moved_bytes(self) -> int:
        """Each way."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def landing_bytes(self) -> int:
        """Of the buffer that its storages come back into."""
        return sum(_aligned(part.entry.num_bytes) for part in self.parts)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Mover:
    """Moves what the blocks of a rank hold."""

    def __init__(self, tier: Tier, copier: Copier, marks: Marks) -> None:
        self.tier, self.copier, self.marks = tier, copier, marks
        self.copied: dict[str, float] = {}
        """Bytes moved since the last look, by `out@tier` and `in@tier`."""
        self._tail: Node | None = None
        self._leaving: list[Node] = []
        self._free: dict[int, list[Place]] = {}

    def around(
        self,
        block: nn.Module,
        index: int,
        landing: Landing,
        setting: Setting | None,
        policy: Policy | None,
    ) -> Callable[..., Any]:
        """The forward of a block of a piece with the mover around it; `landing` is the piece's.

        A block that offloads or drops tensors runs in a frame; others the mover just passes by.
        """
        forward: Callable[..., Any] = block.forward
        run_by: Callable[..., Any] | None = getattr(block, "run_by", None)
        first = not landing.sizes
        landing.sizes[index] = 0

        def run(x: Any, *constants: Any) -> Any:
            node = Node(index, landing, None if first else self._tail, setting=setting)
            self._tail = node
            if setting is None and policy is None:
                result = forward(x, *constants)
            else:
                node.frame = Frame(block, policy, self.marks)
                if policy is not None and run_by is not None:
                    run_by(node.frame.run)
                result = node.frame.forward(forward, x, *constants)
            self._leave(node)
            if isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(lambda _: self._begin_backward(node))
            return result

        return run

    # Forward.

    def _leave(self, node: Node) -> None:
        """The forward of a block is over: the one before it has left, its own bytes follow."""
        self._let_go(None)
        if node.setting is None or node.frame is None:
            return
        node.parts = _parts(node.frame, node.setting, node.landing.device)
        if not node.parts:
            return
        node.landing.sizes[node.index] = node.landing_bytes
        node.place = self._take(node.moved_bytes)
        jobs, at = [], 0
        for part in node.parts:
            assert part.entry.tensor is not None
            jobs.append(partial(self.tier.write, node.place, at, part.moved(part.entry.tensor)))
            at += part.num_bytes
        node.ticket = self.copier.submit("out", jobs)
        node.state = "leaving"
        self._leaving.append(node)
        self._count("out", node)

    def _let_go(self, arriving: Node | None) -> None:
        """Wait for what is leaving, and free it, but for a node whose backward begins."""
        for node in self._leaving:
            self._wait(node)
            if node is arriving:
                node.state = "here"
                self._give(node)
                continue
            for part in node.parts:
                whole = part.entry.tensor
                assert whole is not None
                if node.setting is not None and node.setting.tokens is None:
                    rest = whole[part.num_bytes // whole.element_size() :]
                    part.stays = rest.clone() if rest.numel() else None
                part.entry.tensor = None
            node.state = "away"
        self._leaving.clear()

    # Backward.

    def _begin_backward(self, node: Node) -> None:
        """Have a block's bytes there, and those of the block before it on their way."""
        self._let_go(node)
        if node.state == "away":
            self._fetch(node)
        came = node.state == "coming"
        if came:
            self._arrive(node)
        before, node.previous = node.previous, None
        node.landing.release(node.index)
        if before is not None and before.state == "away":
            self._fetch(before)
        if self._tail is node:
            self._tail = None
        setting = node.setting
        if node.frame is not None and setting is not None and setting.tokens is not None:
            if came:
                node.frame.remake_tokens(setting.tokens, setting.part_tokens)
            else:
                node.frame.settle()

    def _fetch(self, node: Node) -> None:
        """Begin to bring a block's bytes back."""
        if not node.landing.offsets:
            node.landing.plan()
        buffer = node.landing.buffer(node.index, node.landing_bytes)
        jobs, at, start = [], 0, 0
        for part in node.parts:
            end = start + part.entry.num_bytes
            whole = buffer[start:end].view(part.dtype)
            assert node.place is not None
            jobs.append(partial(self.tier.read, node.place, at, part.moved(whole)))
            if part.stays is not None:
                whole[whole.numel() - part.stays.numel() :].copy_(part.stays)
                part.stays = None
            part.entry.landing = whole
            at, start = at + part.num_bytes, start + _aligned(part.entry.num_bytes)
        node.ticket = self.copier.submit("in", jobs)
        node.state = "coming"
        self._count("in", node)

    def _arrive(self, node: Node) -> None:
        self._wait(node)
        for part in node.parts:
            part.entry.tensor, part.entry.landing = part.entry.landing, None
        node.parts.clear()
        self._give(node)
        node.state = "here"

    # Places, copies, counts.

    def _wait(self, node: Node) -> None:
        if node.ticket is not None:
            with self.marks.mark("exposed.copy"):
                node.ticket.wait()
            node.ticket = None

    def _take(self, num_bytes: int) -> Place:
        free = self._free.get(num_bytes)
        return free.pop() if free else self.tier.make(num_bytes)

    def _give(self, node: Node) -> None:
        if node.place is not None:
            self._free.setdefault(node.place.num_bytes, []).append(node.place)
            node.place = None

    def _count(self, direction: str, node: Node) -> None:
        key = f"{direction}@{self.tier.name}"
        self.copied[key] = self.copied.get(key, 0.0) + node.moved_bytes


def _parts(frame: Frame, setting: Setting, device: torch.device) -> list[Part]:
    """What of a frame's entries moves; what a kernel keeps elsewhere, such as a seed, stays."""
    here = [e for e in frame.kept if e.tensor is not None and e.tensor.device.type == device.type]
    if setting.tokens is not None:
        return [_by_tokens(frame, entry, setting) for entry in here]
    total = sum(entry.num_bytes for entry in here)
    left = int(setting.fraction * total / GRAIN_BYTES) * GRAIN_BYTES
    parts: list[Part] = []
    for entry in here:
        num_bytes = min(left, entry.num_bytes)
        if num_bytes > 0:
            assert entry.tensor is not None
            count = num_bytes // entry.tensor.element_size()
            parts.append(_part(entry, partial(_first_elements, count), num_bytes))
            left -= num_bytes
    return parts


def _part(entry: Entry, moved: Callable[[Tensor], Tensor], num_bytes: int) -> Part:
    assert entry.tensor is not None
    return Part(entry, moved, num_bytes, entry.tensor.dtype)


def _first_elements(count: int, whole: Tensor) -> Tensor:
    return whole[:count]


def _by_tokens(frame: Frame, entry: Entry, setting: Setting) -> Part:
    """The first tokens of what can be made again, all of anything else."""
    assert entry.tensor is not None and setting.tokens is not None
    if not frame.runs_again(entry):
        return _part(entry, _everything, entry.num_bytes)
    view = partial(frame.tokens_of, entry, setting.part_tokens, slice(0, setting.tokens))
    moved = view(entry.tensor)
    return _part(entry, view, moved.numel() * moved.element_size())


def _everything(whole: Tensor) -> Tensor:
    return whole
