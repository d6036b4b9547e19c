"""Who holds which tokens, who looks at which keys, and how parts of attention add up."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forerun.costmodel.packing import Packing, shares
from forerun.executors.context_parallel import Slot, attend, flash, lightseq, varlen
from forerun.executors.context_parallel.chunks import Block, Borders, blocks, held, places
from forerun.executors.context_parallel.context import Local
from forerun.lengths import Lengths
from forerun.workload import Workload

KINDS = ("zigzag", "ring", "lightseq")
Pair = tuple[int, int]


@st.composite
def borders(draw: st.DrawFn, seq_tokens: int) -> tuple[int, ...]:
    inside = draw(st.sets(st.integers(1, seq_tokens - 1), max_size=6))
    return (0, *sorted(inside), seq_tokens)


def looked_at(kind: str, ring: int) -> list[tuple[int, int, int]]:
    """(worker, owner of the queries, owner of the keys) of a whole forward."""
    own = [(r, r, r) for r in range(ring)]
    if kind != "lightseq":
        return own + [(r, r, (r - t) % ring) for t in range(1, ring) for r in range(ring)]
    found = own
    for step in range(1, ring // 2 + 1):
        for rank in range(ring):
            source, other = lightseq.keys_of(rank, step), lightseq.helped(rank, step, ring)
            assert source is None or other is None
            if source is not None:
                found.append((rank, rank, source))
            if other is not None:
                found.append((rank, other, rank))
    return found


def pairs_of(block: Block, q_places: list[int], k_places: list[int]) -> list[Pair]:
    queries, keys = q_places[slice(*block.q)], k_places[slice(*block.k)]
    return [(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys)
            if not block.causal or j <= i]  # fmt: skip


@settings(max_examples=60)
@given(
    data=st.data(), kind=st.sampled_from(KINDS), ring=st.sampled_from([1, 2, 4, 6]),
    chunk=st.integers(1, 3),
)  # fmt: skip
def test_every_pair_is_looked_at_once(
    data: st.DataObject, kind: str, ring: int, chunk: int
) -> None:
    seq = 2 * ring * chunk
    packed = data.draw(st.none() | borders(seq))
    every: Borders | None = None if packed is None else (packed,)
    found: list[Pair] = []
    for _, asking, given_by in looked_at(kind, ring):
        own, other = held(kind, ring, asking), held(kind, ring, given_by)
        at = [places(kind, ring, 1, r, seq) for r in (asking, given_by)]
        for block in blocks(own, other, len(at[0]) // len(own), every):
            found += pairs_of(block, *at)
    starts = packed or (0, seq)
    expected = [(q, k) for a, b in pairwise(starts) for q in range(a, b) for k in range(a, q + 1)]
    assert sorted(found) == expected


@settings(max_examples=40)
@given(data=st.data(), kind=st.sampled_from(KINDS), ring=st.sampled_from([2, 4, 6]))
def test_predicted_work_of_a_rank_is_what_it_looks_at(
    data: st.DataObject, kind: str, ring: int
) -> None:
    seq = 12 * ring
    ends = data.draw(borders(seq))
    work = [0.0] * ring
    for worker, asking, given_by in looked_at(kind, ring):
        own, other = held(kind, ring, asking), held(kind, ring, given_by)
        for block in blocks(own, other, seq // ring // len(own), (ends,)):
            rows, columns = block.q[1] - block.q[0], block.k[1] - block.k[0]
            work[worker] += rows * columns * (1.0 if block.causal else 2.0)
    assert shares(ends[1:], seq, kind, ring) == work


def test_packing_is_that_of_the_first_steps() -> None:
    lengths = Lengths.of("two", [3, 20], "typed in")
    packing = Packing.of(Workload(seq_tokens=32, global_batch_seqs=256, lengths=lengths))
    assert packing is not None
    ends = [lengths.packed(32, 0, 0, index) for index in range(256)]
    squares = [(b - a) ** 2 for row in ends for a, b in pairwise((0, *row))]
    assert packing.attended_tokens == pytest.approx(sum(squares) / (256 * 32))
    assert packing.documents_per_seq == len(squares) / 256


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_the_sequence_out(kind: str, ring: int, ulysses: int) -> None:
    parts = [places(kind, ring, ulysses, rank, 32) for rank in range(4)]
    assert sorted(at for part in parts for at in part) == list(range(32))
    assert all(part == sorted(part) and len(part) == 8 for part in parts)


def tensors(dtype: torch.dtype, length: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(4, length), (2, keys), (2, keys), (4, length)]
    return [
        torch.randn(2, tokens, heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads, tokens in shapes
    ]


@pytest.mark.parametrize("causal", [True, False])
def test_the_plain_kernel_is_torchs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "QUERIES_AT_ONCE", 16)
    q, k, v, grad = tensors(torch.float32, 40, 40 if causal else 24)
    out, lse = flash.forward(q, k, v, causal=causal)
    found, found_lse = flash._plain_forward(q, k, v, causal)
    torch.testing.assert_close(found, out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found_lse, lse)
    expected = flash.backward(grad, q, k, v, out, lse, causal=causal)
    for a, b in zip(flash._plain_backward(grad, q, k, v, out, lse, causal), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(cut=st.integers(1, 23), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_parts_over_disjoint_keys_add_up(cut: int, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(dtype, 16, 24)
    whole = flash.forward(q, k, v, causal=False)
    rows = (0, 16)
    first, second = (Block(rows, span, False) for span in ((0, cut), (cut, 24)))
    partial = flash.Partial.of(q, k, v, [first])
    partial.see(q, k, v, [second])
    allowed = 1e-12 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(partial.out.to(dtype), whole[0], atol=allowed, rtol=allowed)
    torch.testing.assert_close(partial.lse, whole[1], atol=allowed, rtol=allowed)
    sums = flash.Rows(q, *whole, grad).start(k, v, [first, second])
    expected = flash.backward(grad, q, k, v, *whole, causal=False)
    for a, b in zip(sums, expected, strict=True):
        torch.testing.assert_close(a.to(dtype), b, atol=allowed, rtol=allowed)


def test_queries_that_see_nothing_add_nothing() -> None:
    q, k, v, _ = tensors(torch.float32, 8, 8)
    some = flash.Partial.of(q, k, v, [Block((2, 5), (0, 8), False, row=1)])
    assert torch.isneginf(some.lse[0]).all() and (some.out[0] == 0).all()
    whole = flash.Partial(*flash.forward(q, k, v, causal=True))
    out, lse = whole.out.clone(), whole.lse.clone()
    nothing = torch.full_like(whole.lse, -math.inf)
    whole.add(Block((0, 8), (0, 8), False), torch.zeros_like(out), nothing)
    assert torch.equal(whole.out, out) and torch.equal(whole.lse, lse)


def test_a_slot_saves_running_attention_again(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = tensors(torch.float32, 8, 8)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    slot = Slot()
    first = attend(leaves[0], leaves[1], leaves[2], None, slot)
    expected = torch.autograd.grad(first, leaves, grad)
    monkeypatch.setattr(Local, "forward", None)
    again = attend(leaves[0], leaves[1], leaves[2], None, slot)
    assert torch.equal(first, again) and not slot.held
    for a, b in zip(torch.autograd.grad(again, leaves, grad), expected, strict=True):
        assert torch.equal(a, b)


def test_documents_in_one_kernel_keep_their_forms() -> None:
    """The kernel itself needs CUDA; its arguments and results are checked without memory."""
    ends = ((0, 3, 8), (0, 8), (0, 1, 2, 8))
    q, k = (
        torch.empty(3, 8, heads, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads in (4, 2)
    )
    places_of, longest = varlen.starts(ends, torch.device("cpu"))
    assert places_of.tolist() == [0, 3, 8, 16, 17, 18, 24] and longest == 8
    out, lse = varlen.forward(q, k, k, ends)
    grads = varlen.backward(out, q, k, k, out, lse, ends)
    assert [x.shape for x in (out, *grads)] == [q.shape, q.shape, k.shape, k.shape]
