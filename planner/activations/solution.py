"""The answer: how many layers follow which policy, tensor by tensor."""

from __future__ import annotations

from typing import Any, Literal

from ...document import Value, to_raw

Choice = Literal["keep", "recompute", "offload", "compress"]


class TensorChoice(Value, frozen=True, kw_only=True):
    """What happens to one tensor of a layer between forward and backward."""

    name: str
    bytes: float
    """Of one micro-batch, as the forward makes it."""
    needed: bool
    """Whether backward reads it; another one is stored or made again for the sake of others."""
    choice: Choice
    fraction: float
    """Part of what is stored that waits on the host; the rest is on the device."""
    stored_bytes: float
    """On device and host together: less than `bytes` where it is compressed, or made again."""
    seconds: float
    """Device time that the choice adds: of the operator that makes it again, counted at its first
    output, or of conversions."""


class PolicyUse(Value, frozen=True, kw_only=True):
    """Equal layers with one policy; bytes and seconds of one layer and one micro-batch."""

    layer: str
    layers: int
    tensors: tuple[TensorChoice, ...]
    runs_again: tuple[str, ...]
    """Operators in forward order."""
    device_bytes: float
    host_bytes: float
    restored_bytes: float
    """What its backward brings back to the device: working memory beyond the limit."""
    exposed_copy_s: float
    """What copies take beyond all that they hide behind."""
    extra_s: float

    def techniques(self) -> dict[str, dict[str, Any]]:
        """The policy as technique settings of a plan's layers; compressed tensors have none.

        Everything needed and stored is kept or, in the order of the forward, the first part of it
        offloaded; what is neither is made again.
        """
        stored = [t for t in self.tensors if t.choice in ("keep", "offload")]
        chosen: dict[str, dict[str, Any]] = {}
        if any(t.choice == "recompute" for t in self.tensors):
            chosen["recompute"] = {"mode": "tensors", "keep": sorted(t.name for t in stored)}
        total = sum(t.stored_bytes for t in stored)
        if self.host_bytes > 0:
            chosen["offload"] = {"activations": min(1.0, self.host_bytes / total)}
        return chosen


class Solution(Value, frozen=True, kw_only=True):
    """The best policies of a stage; bytes of all live micro-batches, seconds of one."""

    policies: tuple[PolicyUse, ...]
    device_bytes: float
    host_bytes: float
    extra_s: float
    lower_bound_s: float
    """No choice adds less; equal to `extra_s` where the optimum is proven."""
    relaxed_s: float
    """The token-wise relaxation's optimum."""
    gap: float
    """1 - lower_bound_s / extra_s, zero where both are zero."""
    keep_all_bytes: float
    recompute_all_s: float
    """Seconds with the fewest bytes that recomputation alone reaches."""
    limit: Literal["time", "nodes"] | None
    """What ended the search before the gap asked for was reached."""

    def document(self, seconds: float) -> dict[str, Any]:
        """The JSON document of `forerun solve activations`."""
        return {**to_raw(self), "seconds": seconds}
