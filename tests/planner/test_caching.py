"""The model of a caching allocator: what it reserves follows its rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.planner.memory_reuse import Buffers, caching_allocator, make_buffers

MIB = 2**20


def buffers(*rows: tuple[int, int, int]) -> Buffers:
    lower, upper, size = zip(*rows, strict=True)
    return make_buffers([str(i) for i in range(len(rows))], lower, upper, size)


@pytest.mark.parametrize(
    ("rows", "reserved"),
    [
        ([(0, 2, 1)], 2 * MIB),
        ([(0, 2, MIB), (1, 3, MIB)], 2 * MIB),  # one small segment holds two
        ([(0, 2, MIB), (1, 3, MIB + 1)], 22 * MIB),  # small and large are apart
        ([(0, 2, 3 * MIB), (1, 3, 4 * MIB)], 20 * MIB),
        ([(0, 2, 11 * MIB)], 12 * MIB),
        ([(0, 1, 11 * MIB), (1, 2, 10 * MIB)], 12 * MIB),  # freed first, used again
        ([(0, 2, 11 * MIB), (1, 3, 10 * MIB)], 22 * MIB),
        # a hole of 12 MiB is split for 5 MiB, so that 12 MiB need a new segment
        ([(0, 1, 12 * MIB), (1, 3, 5 * MIB), (2, 3, 12 * MIB)], 24 * MIB),
        # freed neighbours merge again
        ([(0, 1, 12 * MIB), (1, 2, 5 * MIB), (1, 2, 5 * MIB), (3, 4, 12 * MIB)], 12 * MIB),
    ],
)
def test_rules(rows: list[tuple[int, int, int]], reserved: int) -> None:
    assert caching_allocator(buffers(*rows)).reserved_bytes == reserved


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(1, 30 * MIB)),
        min_size=1, max_size=40,
    )
)  # fmt: skip
@settings(max_examples=50)
def test_it_never_reserves_less_than_lives(rows: list[tuple[int, int, int]]) -> None:
    found = caching_allocator(buffers(*[(low, low + life, size) for low, life, size in rows]))
    assert found.reserved_bytes >= found.max_live_bytes
    assert 0 <= found.fragmentation < 1
