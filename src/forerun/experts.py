"""Routed experts: how many, how wide, how tokens are sent to them, and which ranks hold which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from .document import Value
from .errors import InputError

Scores = Literal["softmax", "sigmoid"]
Drop = Literal["probability", "position"]


class Experts(Value, frozen=True, kw_only=True):
    """The routed experts that take the place of a layer's MLP."""

    num_experts: int
    top_k: int
    ffn_hidden: int
    """Width of one routed expert."""
    shared_ffn_hidden: int = 0
    """Total width of the experts that every token passes; 0 = none."""
    capacity_factor: float | None = None
    """None = dropless. Else an expert takes `capacity` of the tokens that a rank routes at once;
    further ones pass by on the residual, and buffers are padded to full."""
    drop: Drop = "probability"
    """Which copies a full expert turns away: those of least routing weight, or the last ones."""
    scores: Scores = "softmax"
    """What a token's scores are made of its logits by."""
    renormalise: bool = True
    """Whether the scores of a token's experts are divided by their sum."""
    routed_scale: float = 1.0
    """Factor on the routing weights (`routed_scaling_factor` of DeepSeek-V3)."""

    def capacity(self, tokens: int) -> int:
        """Rows of one expert's buffer when `tokens` are routed at once: ceil(C k T / E).

        C is the capacity factor, k = top_k (Lepikhin et al. 2020, GShard, section 2.2; the tokens
        of one rank and one micro-batch are a group of their own).

        >>> Experts(num_experts=8, top_k=2, ffn_hidden=64, capacity_factor=1.25).capacity(100)
        32
        """
        assert self.capacity_factor is not None
        return math.ceil(self.capacity_factor * self.top_k * tokens / self.num_experts)

    def check(self, name: str) -> None:
        """Raise InputError for sizes that cannot be meant, of the model `name`."""
        for field in ("num_experts", "top_k", "ffn_hidden"):
            if getattr(self, field) < 1:
                raise InputError(f"layers.experts.{field}", getattr(self, field),
                                 f"{name} needs 1 or more", "correct the size")  # fmt: skip
        if self.top_k > self.num_experts:
            raise InputError("layers.experts.top_k", self.top_k,
                             f"{name} has {self.num_experts} experts",
                             f"give 1 to {self.num_experts}")  # fmt: skip
        if self.shared_ffn_hidden < 0:
            raise InputError("layers.experts.shared_ffn_hidden", self.shared_ffn_hidden,
                             "is negative", "give 0 for none")  # fmt: skip
        factor = self.capacity_factor
        if factor is not None and not 0 < factor < math.inf:
            raise InputError("layers.experts.capacity_factor", factor, "not a positive number",
                             "give 1 or more, or leave it out for dropless")  # fmt: skip
        if not 0 < self.routed_scale < math.inf:
            raise InputError("layers.experts.routed_scale", self.routed_scale,
                             "not a positive number", "give 1.0 for none")  # fmt: skip


def check_placement(setting: Mapping[str, Any], experts: Experts, ep: int) -> None:
    """Raise InputError unless an `expert-placement` setting fits the experts of its layers.

    `slots` lists the experts on each of the ep ranks, equally many everywhere, none left out;
    `imbalance` is the fullest rank's load over the mean.
    """
    unknown = sorted(setting.keys() - {"slots", "imbalance"})
    if unknown:
        raise InputError("expert-placement", unknown[0], "unknown setting",
                         "give slots, imbalance or both")  # fmt: skip
    imbalance = setting.get("imbalance")
    if imbalance is not None and not (is_number(imbalance) and 1 <= imbalance <= ep):
        raise InputError("expert-placement.imbalance", imbalance,
                         f"no ratio of a fullest rank to the mean of {ep}",
                         f"give 1 to {ep}")  # fmt: skip
    ranks = setting.get("slots")
    if ranks is None:
        return
    if ep == 1:
        raise InputError("expert-placement.slots", "given", "at ep=1 every rank holds all experts",
                         "raise --ep, or leave the placement out")  # fmt: skip
    if not _is_table(ranks):
        raise InputError("expert-placement.slots", type(ranks).__name__, "not lists of experts",
                         "list the experts of every rank")  # fmt: skip
    if len(ranks) != ep:
        raise InputError("expert-placement.slots", f"{len(ranks)} ranks", f"the plan has ep={ep}",
                         f"solve experts --ranks {ep}")  # fmt: skip
    sizes = {len(rank) for rank in ranks}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError("expert-placement.slots", sorted(sizes), "ranks hold unequally many",
                         "fill every rank's slots")  # fmt: skip
    held = {expert for rank in ranks for expert in rank}
    missing = sorted(set(range(experts.num_experts)) - held)
    if missing:
        raise InputError("expert-placement.slots", missing[:8],
                         f"{len(missing)} of {experts.num_experts} experts lie on no rank",
                         "place every expert")  # fmt: skip
    if len(held) > experts.num_experts:
        raise InputError("expert-placement.slots", max(held),
                         f"the layer has experts 0 to {experts.num_experts - 1}",
                         "drop the others")  # fmt: skip
    if experts.capacity_factor is not None and sum(map(len, ranks)) > experts.num_experts:
        raise InputError("expert-placement.slots", "replicas",
                         "an expert's capacity is not shared among replicas",
                         "place every expert once, or run dropless")  # fmt: skip


def is_number(value: object) -> bool:
    """Whether a value read from a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_table(ranks: object) -> bool:
    """Whether a value read from a file is a list of lists of expert numbers."""
    if not isinstance(ranks, Sequence):
        return False
    rows = cast("Sequence[object]", ranks)
    return all(
        isinstance(row, Sequence) and all(type(e) is int for e in cast("Sequence[object]", row))
        for row in rows
    )
