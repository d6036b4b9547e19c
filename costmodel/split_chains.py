"""The longest chain through a rank of schedules that split the backward, for many layouts at once.

`schedule.split_chain_s` of a few ranks, with stages cut evenly and layers under the policy that
takes the least time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..model import Model
from .graph import Array
from .layout import Layouts
from .pieces import Pieces
from .prices import Prices
from .ranks import stage_times
from .schedule import split_chain_s, split_hops, split_warm_up
from .stages import V_SHAPED, Load, even_load, rank_load, stage_load

Index = NDArray[np.intp]


class SplitChains:
    """Rows whose schedules split the backward."""

    def __init__(
        self,
        model: Model,
        layouts: Layouts,
        ranks: Sequence[Array],
        policies: Sequence[Pieces],
        prices: Prices,
        hop_s: Array,
    ) -> None:
        """`policies` are the costs of the rows under each; `hop_s` is zero where transfers hide."""
        self.layouts, self.ranks, self.hop = layouts, ranks, hop_s
        shape = (len(ranks), len(layouts))
        least = np.full(shape, np.inf)
        self.forward, self.backward, self.before, self.path, self.warm_up = np.zeros((5, *shape))
        action_s = prices.host("pp_action")
        v, stages = layouts.vpp, (layouts.pp * layouts.vpp).astype(float)
        folded = np.isin(layouts.schedule, V_SHAPED)
        everything = stage_load(model, np.zeros(1), np.array([model.num_layers - 1.0]))
        for costs in policies:
            all_s = stage_times(everything, costs, prices).forward_s + stages * action_s
            for r, rank in enumerate(ranks):
                behind = np.where(folded, rank, layouts.pp - 1 - rank)  # stages behind its last
                whole = stage_times(rank_load(model, layouts, rank), costs, prices)
                faster = whole.forward_s + whole.backward_s < least[r]
                first = stage_times(even_load(model, layouts, rank), costs, prices).forward_s
                last = even_load(model, layouts, stages - 1 - behind)
                last_s = stage_times(last, costs, prices).forward_s
                before = np.where(
                    rank > 0,
                    stage_times(_ahead(model, layouts, rank), costs, prices).forward_s,
                    0.0,
                )
                after = _behind(model, layouts, behind)
                times = stage_times(after, costs, prices)
                back = np.where(behind > 0, times.backward_s - after.total(costs, "weight_s"), 0.0)
                counts = split_warm_up(
                    layouts.schedule, layouts.pp, v, layouts.num_microbatches, rank
                )
                forward = whole.forward_s + v * action_s
                found = {
                    "forward": forward,
                    "backward": whole.backward_s + v * action_s,
                    "before": before + rank * action_s,
                    "path": all_s
                    - before
                    - first
                    - (rank + 1) * action_s
                    + back
                    + behind * action_s,
                    "warm_up": counts[0] * (first + action_s)
                    + counts[1] * forward
                    + counts[2] * (last_s + action_s),
                }
                for name, value in found.items():
                    own = getattr(self, name)
                    own[r] = np.where(faster, value, own[r])
                least[r] = np.where(faster, whole.forward_s + whole.backward_s, least[r])

    def chains(self, extra: Array, rows: Index) -> Array:
        """The longest chain of `rows`, where every micro-batch of a rank takes `extra` seconds
        more."""
        layouts, hop = self.layouts.take(rows), self.hop[rows]
        p, v, m = layouts.pp, layouts.vpp, layouts.num_microbatches
        folded = np.isin(layouts.schedule, V_SHAPED)
        best = np.zeros(len(rows))
        for r, rank in enumerate(self.ranks):
            own = rank[rows]
            chain = split_chain_s(
                forward_s=self.forward[r][rows],
                backward_s=self.backward[r][rows] + extra[r],
                before_s=self.before[r][rows] + own * hop,
                path_s=self.path[r][rows] + split_hops(folded, p, v, own) * hop,
                warm_up_s=self.warm_up[r][rows],
                micro_batches=m,
                chunks=v,
                warm_up=split_warm_up(layouts.schedule, p, v, m, own)[0] + 1,
            )
            best = np.maximum(best, chain)
        return best


def _start(model: Model, layouts: Layouts, stage: Array) -> Array:
    """The first layer of a stage under an even cut."""
    stages = (layouts.pp * layouts.vpp).astype(float)
    size = np.floor(model.num_layers / stages)
    return stage * size + np.minimum(stage, model.num_layers - size * stages)


def _ahead(model: Model, layouts: Layouts, rank: Array) -> Load:
    """The stages before number `rank`."""
    return stage_load(model, np.zeros(1), _start(model, layouts, rank) - 1)


def _behind(model: Model, layouts: Layouts, stages: Array) -> Load:
    """The last stages, as many as `stages` says."""
    first = _start(model, layouts, layouts.pp * layouts.vpp - stages)
    return stage_load(model, first, np.array([model.num_layers - 1.0]))
