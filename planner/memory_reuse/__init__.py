"""Memory reuse: offsets for tensors with lifetimes in the smallest arena.

Dynamic storage allocation with all lives known, as MEMO plans a training step's memory (Zhao et
al. 2024, arXiv 2407.12117, section 4.2).
"""

from .bilevel import Bilevel, bilevel
from .buffers import Buffers, check_offsets, make_buffers, max_live_bytes
from .caching import Reserved, caching_allocator
from .solve import MemoryPlan, check_capacity, solve
from .table import read_buffers, write_offsets

__all__ = [
    "Bilevel", "Buffers", "MemoryPlan", "Reserved", "bilevel", "caching_allocator",
    "check_capacity", "check_offsets", "make_buffers", "max_live_bytes", "read_buffers", "solve",
    "write_offsets",
]  # fmt: skip
