"""Where tensors wait off the device: the host's memory, or a disk; copies there and back."""

from .copier import Copier, Ticket, make_copier
from .store import Store
from .tier import DiskTier, MappedTier, PinnedTier, Place, Tier, make_tier

__all__ = [
    "Copier", "DiskTier", "MappedTier", "PinnedTier", "Place", "Store", "Ticket", "Tier",
    "make_copier", "make_tier",
]  # fmt: skip
