"""Loads of experts as a run counted them: per rank, and of all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ...document import Value
from ...measurement import ExpertLoad
from ...mesh import Mesh
from ...plan import Plan
from .parallel import ExpertParallel


class RankLoad(Value, frozen=True, kw_only=True):
    """What one rank counted of one layer."""

    layer: int
    tokens: tuple[int, ...]
    """Choices of the rank's own tokens by expert."""
    dropped: int
    received: tuple[int, ...]
    """Rows that came to its experts, by forward pass."""
    balance: float


def rank_loads(experts: ExpertParallel | None) -> tuple[RankLoad, ...]:
    """The counts of this rank since they were last forgotten."""
    if experts is None:
        return ()
    found: list[RankLoad] = []
    for prefix, moe in experts.layers.items():
        training = moe.training_of_router
        if training.tokens_X is None or training.balance_sum is None:
            continue
        found.append(
            RankLoad(
                layer=int(prefix.split(".")[1]),
                tokens=tuple(training.tokens_X.tolist()),
                dropped=0 if moe.dropped is None else int(moe.dropped),
                received=tuple(moe.received_rows),
                balance=float(training.balance_sum) / training.passes,
            )
        )
    return tuple(found)


def combine(plan: Plan, ranks: Sequence[Sequence[RankLoad]]) -> tuple[ExpertLoad, ...]:
    """The loads of every layer; `ranks` holds those of each rank, in order."""
    mesh, split = plan.phase.mesh, plan.phase.sequence_parallel
    layers: dict[int, dict[int, RankLoad]] = {}
    for rank, own in enumerate(ranks):
        for load in own:
            layers.setdefault(load.layer, {})[rank] = load
    found: list[ExpertLoad] = []
    for layer, by_rank in sorted(layers.items()):
        # without sequence parallelism the ranks of a tp group route the same tokens
        apart = [
            load for rank, load in by_rank.items() if split or mesh.coordinates(rank)["tp"] == 0
        ]
        tokens = [sum(column) for column in zip(*(load.tokens for load in apart), strict=True)]
        found.append(
            ExpertLoad(
                layer=layer,
                ep=mesh.ep,
                tokens=tuple(tokens),
                imbalance=_imbalance(mesh, by_rank),
                dropped=sum(load.dropped for load in apart) / max(1, sum(tokens)),
                balance=fmean(load.balance for load in apart),
            )
        )
    return tuple(found)


def _imbalance(mesh: Mesh, by_rank: dict[int, RankLoad]) -> float:
    """Fullest rank over the mean of each expert-parallel group, mean over groups and passes."""
    groups: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for rank, load in by_rank.items():
        place = (rank // (mesh.ep * mesh.expert_tp), rank % mesh.expert_tp)
        groups.setdefault(place, []).append(load.received)
    ratios = [
        max(rows) * len(rows) / sum(rows)
        for group in groups.values()
        for rows in zip(*group, strict=True)
        if sum(rows)
    ]
    return fmean(ratios) if ratios else 1.0
