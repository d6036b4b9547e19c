"""Collectives: which algorithm and protocol wins where, and laws that all of them obey."""

from __future__ import annotations

import functools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.catalogs import load_cluster
from forerun.cluster import Pool
from forerun.costmodel.algorithms import RING, ring_s, switch_s, tree_s
from forerun.costmodel.collectives import group_s

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
KIB, MIB, GIB = 2.0**10, 2.0**20, 2.0**30


@functools.cache
def pool(gpus: str = "8xH100") -> Pool:
    return load_cluster(gpus).pools[0]


def seconds(kind: str, num_bytes: float, ranks: int, where: Pool, stride: int = 1) -> float:
    one = np.ones(1)
    return float(group_s(kind, one * num_bytes, one * ranks, one * stride, where)[0])


def plain_ring_s(kind: str, num_bytes: float, ranks: int, where: Pool) -> float:
    """The ring of the plain protocol inside one node."""
    rate = where.intra_node.bytes_per_s * where.stack.intra_node_efficiency
    one, latency = np.ones(1), np.array([where.intra_node.latency_s])
    return float(ring_s(kind, one * num_bytes, one * ranks, latency, one * rate)[0])


def test_large_messages_take_the_plain_ring_where_nothing_reduces_on_the_way() -> None:
    for kind, gpus in (("all_gather", "8xH100"), ("all_reduce", "8xA100-80GB")):
        where = pool(gpus)
        expected = plain_ring_s(kind, GIB, 8, where) + float(RING.start_s[0, 0])
        assert seconds(kind, GIB, 8, where) == pytest.approx(expected, rel=1e-9)


def test_the_switch_reduces_large_messages_of_many_ranks_from_hopper_on() -> None:
    """6/5 n / (0.85 b) against 2 (p-1)/p n / b: ahead for eight ranks, behind for two."""
    where = pool()
    rate = where.intra_node.bytes_per_s * where.stack.intra_node_efficiency
    expected = 25e-6 + 1.2 * GIB / (0.85 * rate)
    assert seconds("all_reduce", GIB, 8, where) == pytest.approx(expected, rel=1e-9)
    assert seconds("all_reduce", GIB, 8, where) < 0.85 * plain_ring_s("all_reduce", GIB, 8, where)
    two = plain_ring_s("all_reduce", GIB, 2, where) + float(RING.start_s[0, 0])
    assert seconds("all_reduce", GIB, 2, where) == pytest.approx(two, rel=1e-9)


def test_without_a_switch_that_reduces_there_is_none() -> None:
    where = pool()
    link = msgspec.structs.replace(where.intra_node, in_switch_share=0.0)
    without = msgspec.structs.replace(where, intra_node=link)
    assert seconds("all_reduce", GIB, 8, without) > seconds("all_reduce", GIB, 8, where)
    for kind in ("all_gather", "reduce_scatter"):
        assert seconds(kind, GIB, 8, without) == seconds(kind, GIB, 8, where)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_small_messages_take_a_protocol_with_less_latency(kind: str) -> None:
    where = pool("8xA100-80GB")
    assert seconds(kind, 16 * KIB, 8, where) < 0.6 * plain_ring_s(kind, 16 * KIB, 8, where)


def test_trees_win_for_small_messages_over_many_nodes() -> None:
    """64 nodes: 2 log2 64 steps instead of 2 * 511."""
    where = pool("64x8xA100-80GB")
    one = np.ones(1)
    tree = tree_s(one * MIB, 8 * one, 64 * one, (3.4e-6, 14e-6), one * 1e11)
    assert seconds("all_reduce", MIB, 512, where) <= 1.5 * float(tree.min()) < 1e-3
    # all-gather has no tree: its latency grows with the ranks
    ratio = seconds("all_gather", KIB, 512, where) / seconds("all_gather", KIB, 64, where)
    assert ratio == pytest.approx(8, rel=0.3)


def test_two_nodes_exchange_each_half_once() -> None:
    """A ring would send the buffer across twice; trees and the hierarchical form send it once."""
    where = pool("2x8xA100-80GB")
    assert where.inter_node is not None
    outgoing = 8 * where.inter_node.bytes_per_s * where.stack.inter_node_efficiency
    taken = seconds("all_reduce", 4 * GIB, 16, where)
    assert taken < 0.75 * 2 * (15 / 16) * 4 * GIB / outgoing


def test_trees_over_nodes_after_the_switch_are_bound_by_the_interfaces() -> None:
    one = np.ones(1)
    few = switch_s(one * GIB, one * 2, 1e-5, one * 3e11, one * 2e11)
    many = switch_s(one * GIB, one * 4, 1e-5, one * 3e11, one * 2e11)
    assert many[0] / few[0] == pytest.approx(2.0, rel=0.01)


def test_a_cpu_has_the_ring_alone() -> None:
    where = pool("4xcpu")
    expected = plain_ring_s("all_reduce", MIB, 4, where)
    assert seconds("all_reduce", MIB, 4, where) == pytest.approx(expected)


@given(
    kind=st.sampled_from(KINDS), ranks=st.sampled_from([1, 2, 4, 8, 16, 64]),
    stride=st.sampled_from([1, 2, 8]), log_bytes=st.floats(6, 34), more=st.floats(1.0, 8.0),
    gpus=st.sampled_from(["8x8xH100", "8x8xA100-80GB", "16x4xB200", "64xcpu"]),
)  # fmt: skip
@settings(max_examples=60)
def test_more_bytes_are_never_faster_and_faster_links_never_slower(
    kind: str, ranks: int, stride: int, log_bytes: float, more: float, gpus: str
) -> None:
    where, size = pool(gpus), 2.0**log_bytes
    taken = seconds(kind, size, ranks, where, stride)
    assert (taken == 0) == (ranks == 1)
    assert seconds(kind, size * more, ranks, where, stride) >= taken * (1 - 1e-12)
    inter = where.inter_node or where.intra_node
    faster = msgspec.structs.replace(
        where,
        intra_node=msgspec.structs.replace(
            where.intra_node, bytes_per_s=where.intra_node.bytes_per_s * more
        ),
        inter_node=msgspec.structs.replace(inter, bytes_per_s=inter.bytes_per_s * more),
    )
    assert seconds(kind, size, ranks, faster, stride) <= taken * (1 + 1e-12)


def test_many_groups_at_once_are_what_each_is_alone() -> None:
    where = pool("8x8xH100")
    ranks, strides = np.array([1.0, 2, 8, 8, 64]), np.array([1.0, 8, 1, 8, 1])
    sizes = np.array([1e3, 1e6, 1e9, 1e7, 1e5])
    for kind in KINDS:
        together = group_s(kind, sizes, ranks, strides, where)
        alone = [
            seconds(kind, float(n), int(p), where, int(s))
            for n, p, s in zip(sizes, ranks, strides, strict=True)
        ]
        assert together == pytest.approx(alone, rel=1e-12)
