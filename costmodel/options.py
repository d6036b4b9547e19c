"""What a phase does besides its layout: the technique settings that change costs, as one value.

A layout is arrays (`Layouts`); an `Options` is what all layouts of one array share. Graphs are
rewritten once per `Options`, never per layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..choices import TENSORS
from ..local_sgd import TECHNIQUE, LocalSgd
from ..plan import Phase
from ..stack import Stack
from ..workload import Workload
from .packing import Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings that rewrite the graph or choose its prices."""

    compute: str
    """Dtype of the matmuls: fp32, fp16, bf16, fp8, mxfp8, nvfp4."""
    recipe: str = "tensorwise"
    """Scaling of low-precision matmuls: tensorwise, rowwise, coat."""
    recompute: str = "none"
    """none, selective (attention core), full, full_keep_attn (all but the attention core), per_op
    (every second matmul, as torchtitan), or tensors: what `keep` names."""
    keep: tuple[str, ...] = ()
    """Tensors that a layer keeps from forward to backward under recompute mode tensors; names that
    a layer does not have say nothing there."""
    attention: str = "flash"
    """flash (the stack's version), flash1, flash2, flash3; unfused (scores in memory, masked and
    normalised by one kernel), eager (by several)."""
    document_tokens: int | None = None
    """Mean length of the documents packed into a sequence, where attention stays inside each."""
    cp_kind: str = "zigzag"
    """How cp cuts the sequence: zigzag (balanced ring), ring (contiguous blocks, unbalanced),
    ulysses, lightseq (contiguous blocks, early ranks help late ones)."""
    linears: tuple[str, ...] | None = None
    """Linears of a layer that run in a compute dtype below 16 bits; None = all of them."""
    activations: str | None = None
    """Storage dtype of saved activations where it differs from compute (coat: fp8)."""
    lora_rank: int | None = None
    """Rank of adapters; None = every weight trains."""
    lora_targets: str = "all"
    """Linears of a layer that get adapters: all, qkv, qv."""
    base_dtype: str | None = None
    """Storage of frozen weights (nf4); None = 16-bit."""
    optimizer: str = "adamw"
    """One of `forerun.workload.Optimizer`."""
    clips: bool = False
    """Whether gradients are scaled down where their norm is too large."""
    offload: float = 0.0
    """Fraction of saved activations that waits on the host (or the tier below) for backward."""
    offload_rest: str = "keep"
    """What becomes of the others: keep, recompute (token by token)."""
    offload_tier: str = "host"
    """Where offloaded tensors wait: host, disk."""
    offload_states: str | None = None
    """What else waits there: optimizer, parameters (with gradients and optimiser states)."""
    async_tp: bool = False
    """Whether matmuls are cut up to overlap with tensor-parallel communication."""
    runtime: str = "eager"
    """eager, compiled, graphs: how the host launches operators."""
    balance_loss: str = "none"
    """Over which tokens a router's choices are counted: none, micro-batch, global-batch."""
    expert_slots: int | None = None
    """Experts (or replicas) per expert-parallel rank of a placement; None = each expert once."""
    expert_replicas: int = 0
    """Slots of a placement beyond one per expert."""
    expert_imbalance: float | None = None
    """Rows of the fullest expert-parallel rank over the mean; None = as the stack says."""
    local_sgd: LocalSgd | None = None
    """How replicas that train apart meet; None = they are one in every step."""
    packing: Packing | None = None
    """Documents packed into sequences; None = a sequence is one document."""

    @staticmethod
    def of(phase: Phase, workload: Workload | None = None, layer: int = 0) -> Options:
        """The options of a phase at a layer."""
        return Options.under(phase.techniques_at(layer), workload)

    @staticmethod
    def under(
        techniques: Mapping[str, Mapping[str, Any]], workload: Workload | None = None
    ) -> Options:
        """The options of a layer under techniques with their settings."""

        def setting(name: str) -> Mapping[str, Any]:
            return techniques.get(name, {})

        precision, lora, placed = setting("precision"), setting("lora"), setting("expert-placement")
        ranks = placed.get("slots")
        held = {expert for rank in ranks for expert in rank} if ranks else set()
        return Options(
            compute=str(precision.get("compute", "bf16")),
            recipe=str(precision.get("recipe", "tensorwise")),
            linears=_names(precision.get("linears")),
            recompute=str(setting("recompute").get("mode", "none")),
            keep=tuple(setting("recompute").get("keep", ())),
            attention=str(setting("attention").get("kernel", "flash")),
            document_tokens=setting("attention").get("documents"),
            cp_kind=str(setting("context-parallel").get("kind", "zigzag")),
            activations=precision.get("activations"),
            lora_rank=lora.get("rank"),
            lora_targets=str(lora.get("targets", "all")),
            async_tp=bool(setting("tensor-parallel").get("async", False)),
            base_dtype=lora.get("base"),
            optimizer=workload.optimizer if workload is not None else "adamw",
            clips=workload is not None and workload.clip_norm is not None,
            offload=float(setting("offload").get("activations", 0.0)),
            offload_rest=str(setting("offload").get("rest", "keep")),
            offload_tier=str(setting("offload").get("tier", "host")),
            offload_states=setting("offload").get("states"),
            runtime=str(setting("runtime").get("mode", "eager")),
            balance_loss=workload.balance_loss if workload is not None else "none",
            expert_slots=len(ranks[0]) if ranks else None,
            expert_replicas=sum(map(len, ranks)) - len(held) if ranks else 0,
            expert_imbalance=placed.get("imbalance"),
            local_sgd=LocalSgd.of(setting(TECHNIQUE)),
            packing=Packing.of(workload) if workload is not None else None,
        )

    def techniques(self) -> dict[str, dict[str, Any]]:
        """The settings of a plan that say the same: `of` read backwards; defaults are left out."""
        plain = Options(compute=self.compute)
        precision: dict[str, Any] = {"compute": self.compute}
        for name in ("recipe", "activations"):
            if getattr(self, name) != getattr(plain, name):
                precision[name] = getattr(self, name)
        if self.linears is not None:
            precision["linears"] = list(self.linears)
        chosen: dict[str, dict[str, Any]] = {"precision": precision}
        for technique, setting, field in _SETTINGS:
            value = getattr(self, field)
            if value != getattr(plain, field):
                chosen.setdefault(technique, {})[setting] = value
        if self.recompute == TENSORS:
            chosen["recompute"]["keep"] = list(self.keep)
        if self.local_sgd is not None:
            chosen[TECHNIQUE] = self.local_sgd.settings()
        return chosen

    def gathers_low(self, stack: Stack) -> bool:
        """Whether gathers of what matmuls read move fp8: one scale per tensor, stack willing."""
        return stack.low_precision_gather and self.compute == "fp8" and self.recipe == "tensorwise"

    @property
    def tensor_dtype(self) -> str:
        """Dtype of the tensors between matmuls: 16-bit where matmuls are below that."""
        return self.compute if self.compute in ("fp32", "fp16", "bf16") else "bf16"


def _names(value: Any) -> tuple[str, ...] | None:
    return None if value is None else tuple(map(str, value))


_SETTINGS = (
    ("recompute", "mode", "recompute"),
    ("attention", "kernel", "attention"),
    ("attention", "documents", "document_tokens"),
    ("context-parallel", "kind", "cp_kind"),
    ("lora", "rank", "lora_rank"),
    ("lora", "targets", "lora_targets"),
    ("lora", "base", "base_dtype"),
    ("tensor-parallel", "async", "async_tp"),
    ("offload", "activations", "offload"),
    ("offload", "rest", "offload_rest"),
    ("offload", "tier", "offload_tier"),
    ("offload", "states", "offload_states"),
    ("runtime", "mode", "runtime"),
    ("expert-placement", "imbalance", "expert_imbalance"),
)
"""Technique, its setting, and the field of `Options` that holds it."""
