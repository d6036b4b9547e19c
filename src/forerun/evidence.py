"""Evidence of the user's own: what a technique did to a model of theirs on their device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from .cluster import Cluster
from .document import Document
from .model import Model

HARMLESS_GAP = 0.01
"""Relative loss gap up to which a technique counts as harmless, whatever the noise."""
NOISE_SHARE = 2.0
"""Or up to so many standard errors of the gap over seeds."""
SIZE_FACTOR = 2.0
"""Models up to so many times larger or smaller are close enough."""


class Evidence(Document, frozen=True, kw_only=True):
    """The measured effect of one setting of a technique against its baseline."""

    SCHEMA: ClassVar[str] = "forerun.evidence/1"

    schema: str = "forerun.evidence/1"
    technique: str
    """Name of its catalog record."""
    setting: str
    """What of it was used, as reports say it."""
    settings: dict[str, dict[str, Any]] = {}
    """The same as a plan says it, by technique; empty for an optimiser."""
    model: str
    family: str
    """Kinds of its layers (`family_of`)."""
    num_params: float
    device: str
    optimizer: str
    learning_rate: float
    seq_tokens: int
    global_batch_seqs: int
    steps: int
    """Of every run."""
    seeds: int
    loss: float
    """Of the baseline, mean over the last quarter of the steps and over seeds."""
    loss_gap: float
    """Relative, mean over seeds: positive where the technique's loss is larger."""
    loss_noise: float
    """Standard error of the gap over seeds."""
    step_ratio: float
    """Median step with the technique over the baseline's."""
    memory_ratio: float
    """Peak of live tensors with the technique over the baseline's."""
    date: str

    @property
    def harmless(self) -> bool:
        """Whether the loss gap is small, or none that the seeds can tell."""
        return self.loss_gap <= max(HARMLESS_GAP, NOISE_SHARE * self.loss_noise)

    @property
    def claim(self) -> str:
        """The effect in one sentence."""
        return (
            f"Measured here: loss {self.loss_gap:+.2%} (noise {self.loss_noise:.2%}), step "
            f"{self.step_ratio - 1:+.0%}, memory {self.memory_ratio - 1:+.0%}."
        )

    @property
    def conditions(self) -> str:
        """What it was measured on."""
        return (
            f"{self.model} on {self.device}: {self.seeds} seeds of {self.steps} steps of "
            f"{self.global_batch_seqs} x {self.seq_tokens} tokens, {self.date[:10]}."
        )


def family_of(model: Model) -> str:
    """Kinds of a model's layers: what evidence of one model says something about another by.

    >>> from .model import Layer
    >>> layer = Layer(repeat=2, heads=2, kv_heads=2, head_dim=32, ffn_hidden=64)
    >>> family_of(Model(name="x", hidden=64, vocab=100, layers=(layer,)))
    'decoder swiglu rmsnorm rope'
    """
    if model.traced is not None:
        return f"module {model.name}"
    kinds: list[str] = []
    for layer in model.layers:
        routed = " experts" if layer.experts is not None else ""
        latent = " latent" if layer.latent is not None else ""
        kinds.append(f"{layer.kind} {layer.mlp} {layer.norm}{routed}{latent}")
    return f"{', '.join(dict.fromkeys(kinds))} {model.positions}"


def for_job(found: Iterable[Evidence], model: Model, cluster: Cluster) -> tuple[Evidence, ...]:
    """The evidence that is of a model like this one, on the devices of this cluster."""
    devices = {pool.device.name for pool in cluster.pools}
    return tuple(
        own
        for own in found
        if devices == {own.device}
        and own.family == family_of(model)
        and 1 / SIZE_FACTOR <= own.num_params / model.num_params <= SIZE_FACTOR
    )
