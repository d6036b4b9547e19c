"""Documents packed into sequences: the same for every layout, and of the lengths asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import InputError
from forerun.lengths import Lengths


@given(
    some=st.lists(st.integers(1, 5000), min_size=1, max_size=50),
    seq_tokens=st.integers(1, 3000),
    index=st.integers(0, 1000),
)
def test_documents_fill_a_sequence_exactly(some: list[int], seq_tokens: int, index: int) -> None:
    lengths = Lengths.of("some", some, "typed in")
    ends = lengths.packed(seq_tokens, 7, 3, index)
    assert ends == lengths.packed(seq_tokens, 7, 3, index)
    assert ends[-1] == seq_tokens
    sizes = [end - start for start, end in pairwise((0, *ends))]
    assert all(min(some) <= size <= max(some) for size in sizes[:-1])
    assert 1 <= sizes[-1] <= max(some)


@given(some=st.lists(st.integers(1, 10**6), min_size=1, max_size=3000))
def test_a_distribution_keeps_ends_and_order(some: list[int]) -> None:
    lengths = Lengths.of("some", some, "typed in")
    read = [lengths.at(i / 50) for i in range(51)]
    assert read == sorted(read)
    assert (read[0], read[-1]) == (min(some), max(some))


@pytest.mark.parametrize(
    ("quantiles", "values", "field"),
    [
        ((0.0, 0.5), (1, 2), "quantiles"),
        ((0.0, 0.5, 0.5, 1.0), (1, 2, 3, 4), "quantiles"),
        ((0.0, 1.0), (1, 2, 3), "lengths"),
        ((0.0, 1.0), (5, 2), "lengths"),
        ((0.0, 1.0), (0, 2), "lengths"),
    ],
)
def test_what_is_no_distribution_is_refused(
    quantiles: tuple[float, ...], values: tuple[int, ...], field: str
) -> None:
    with pytest.raises(InputError) as caught:
        Lengths(name="bad", sequences=2, mean=2.0, quantiles=quantiles, lengths=values, source="x")
    assert caught.value.field == field and caught.value.remedy
