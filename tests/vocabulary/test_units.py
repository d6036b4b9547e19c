"""Sizes as people write them."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun import units
from forerun.errors import InputError


def test_doctests() -> None:
    assert doctest.testmod(units).failed == 0


@given(st.integers(1, 2**40))
def test_plain_number_is_itself(tokens: int) -> None:
    assert units.parse_tokens(str(tokens)) == tokens


@given(st.integers(1, 4096), st.sampled_from([("k", 2**10), ("M", 2**20), ("Ki", 2**10)]))
def test_lengths_are_binary(count: int, suffix: tuple[str, int]) -> None:
    assert units.parse_tokens(f"{count}{suffix[0]}") == count * suffix[1]


@given(st.integers(1, 10**6), st.integers(1, 2**20))
def test_batch_in_tokens_rounds_to_whole_sequences(tokens: int, seq_tokens: int) -> None:
    seqs = units.parse_batch(f"{tokens}tok", seq_tokens)
    assert seqs >= 1
    assert seqs == 1 or abs(seqs * seq_tokens - tokens) <= seq_tokens / 2


def test_batch_units_are_decimal_unless_they_say_so() -> None:
    assert units.parse_batch("4Mtok", 1000) == 4000
    assert units.parse_batch("4Mitok", 1024) == 4096


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "k", "8192x", "1e3", "nan", "٣k3"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(InputError, match=r"^seq-len="):
        units.parse_tokens(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "4M", "tok", "many"])
def test_bad_batches(text: str) -> None:
    with pytest.raises(InputError, match=r"^global-batch="):
        units.parse_batch(text, 1024)


@pytest.mark.parametrize("text", ["", "0s", "5", "-1m", "1w", "m", "5 m s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InputError, match=r"^budget="):
        units.parse_duration(text, "budget")


@given(st.integers(1, 1000), st.sampled_from([("s", 1), ("m", 60), ("min", 60), ("H", 3600)]))
def test_durations_are_in_seconds(count: int, suffix: tuple[str, int]) -> None:
    assert units.parse_duration(f"{count}{suffix[0]}", "budget") == count * suffix[1]


@given(st.floats(1e-6, 1e5))
def test_seconds_keep_three_digits(seconds: float) -> None:
    number, unit = units.format_seconds(seconds).split()
    shown = float(number) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit]
    assert shown == pytest.approx(seconds, rel=0.06)


@given(st.integers(1, 2**50))
def test_bytes_read_back(num_bytes: int) -> None:
    number, unit = units.format_bytes(num_bytes).split()
    shown = float(number) * {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}[unit]
    assert shown == pytest.approx(num_bytes, rel=0.06)
