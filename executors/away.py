"""What of a rank waits off the device by the plan's `offload` settings, and who moves it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..plan import Phase, Plan
from ..workload import Workload
from .marks import Marks
from .optimizer import make_optimizer
from .techniques.offload import Mover
from .tiered_adamw import TieredAdamW
from .tiers import Copier, Store, Tier, make_copier, make_tier


@dataclass(slots=True, kw_only=True)
class Away:
    """Nothing of it is there for a plan without offload."""

    marks: Marks
    states: str | None = None
    """Whose states wait: one of `OFFLOAD_STATES`."""
    tier: Tier | None = None
    mover: Mover | None = None
    store: Store | None = None

    @staticmethod
    def of(plan: Plan, marks: Marks, device: torch.device, folder: Path | None) -> Away:
        """What the settings of a plan's layers ask for."""
        wanted = settings(plan.phase)
        states = wanted.get("states")
        moves = bool(wanted.get("activations")) or wanted.get("rest") == "recompute"
        by_store = states in ("optimizer", "experts")
        if not moves and not by_store:
            return Away(marks=marks, states=states)
        pool = plan.cluster.pool(plan.phase.stages[0].pool)
        name = str(wanted.get("tier", "host"))
        budget = pool.host_memory_bytes if name == "host" else None
        ranks = min(pool.devices_per_node, plan.phase.mesh.world)
        tier = make_tier(
            name,
            device,
            folder=Path(tempfile.gettempdir()) if folder is None else folder,
            budget_bytes=None if budget is None else budget / ranks,
        )
        copier: Copier = make_copier(tier, device)
        return Away(
            marks=marks,
            states=states,
            tier=tier,
            mover=Mover(tier, copier, marks) if moves else None,
            store=Store(tier, copier) if by_store else None,
        )

    def parameters_device(self, device: torch.device) -> torch.device:
        """Where parameters lie at rest: with FSDP's offload on the host."""
        return torch.device("cpu") if self.states == "parameters" else device

    def make_optimizer(
        self, workload: Workload, named: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The workload's optimiser of parameters by name, with its states where they belong."""
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        every = [parameter for _, parameter in named]
        if self.store is None:
            return make_optimizer(workload.optimizer, every, workload.learning_rate)
        waits = [".experts." in name or self.states == "optimizer" for name, _ in named]
        return TieredAdamW(every, workload.learning_rate, self.store, self.marks, waits)

    def take_copied(self) -> dict[str, float]:
        """Bytes moved since the last look, by `out@tier` and `in@tier`."""
        total: dict[str, float] = {}
        for user in (self.mover, self.store):
            if user is not None:
                for name, moved in user.copied.items():
                    total[name] = total.get(name, 0.0) + moved
                user.copied.clear()
        return dict(sorted(total.items()))

    def made_bytes(self) -> dict[str, float]:
        """By tier, what lies or has lain there at most."""
        return {} if self.tier is None else {self.tier.name: float(self.tier.made_bytes)}


def settings(phase: Phase) -> dict[str, Any]:
    """The `offload` settings of all layers together: each the first that is not off."""
    found: dict[str, Any] = {}
    for setting in phase.settings:
        for name, value in setting.techniques.get("offload", {}).items():
            if value:
                found.setdefault(name, value)
    return found
