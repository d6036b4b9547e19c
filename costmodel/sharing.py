"""Which ranks hold the same parameters: the groups that gradients are exchanged in."""

from __future__ import annotations

from dataclasses import dataclass

from .graph import Array
from .layout import Layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingGroup:
    """Ranks that hold the same parameters of one kind."""

    shard: Array
    """Those over which ZeRO divides them."""
    replicate: Array
    """Copies of what is divided."""
    stride: Array
    """Distance of neighbours in the rank order."""

    @property
    def ranks(self) -> Array:
        """All of them."""
        return self.shard * self.replicate

    @staticmethod
    def dense(layouts: Layouts) -> SharingGroup:
        """Of parameters outside of routed experts: the ranks of dp and cp."""
        return SharingGroup(
            shard=layouts.shards.astype(float),
            replicate=(layouts.dp * layouts.cp / layouts.shards).astype(float),
            stride=layouts.tp.astype(float),
        )

    @staticmethod
    def experts(layouts: Layouts) -> SharingGroup:
        """Of routed experts: every ep-th of those ranks."""
        return SharingGroup(
            shard=layouts.expert_shards,
            replicate=layouts.expert_holders / layouts.expert_shards,
            stride=(layouts.expert_tp * layouts.ep).astype(float),
        )
