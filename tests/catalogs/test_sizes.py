"""`--model 7b`: a standard decoder of about that size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.catalogs import load_model
from forerun.catalogs.sizes import standard_decoder
from forerun.errors import InputError


def check(text: str, asked: float) -> None:
    model = load_model(text)
    layer = model.layers[0]
    assert model.num_params == pytest.approx(asked, rel=0.03)
    assert model.name == f"standard-{text}"
    assert model.hidden % 128 == 0
    assert layer.heads * layer.head_dim == model.hidden
    assert layer.head_dim == (128 if asked >= 1e9 else 64)
    assert layer.ffn_hidden % (256 if model.hidden >= 1024 else 64) == 0
    assert 2 < layer.ffn_hidden / model.hidden < 3.5
    assert model.vocab == 32000


@given(st.integers(20, 999))
def test_millions(count: int) -> None:
    check(f"{count}m", count * 1e6)


@given(st.integers(10, 9999))
def test_billions(tenths: int) -> None:
    text = f"{tenths / 10:g}b"
    check(text, float(text[:-1]) * 1e9)


@pytest.mark.parametrize("text", ["350m", "1b", "7b", "13b", "70b", "175b", "1t", "10t"])
def test_common_sizes_divide_well(text: str) -> None:
    model = load_model(text)
    assert model.layers[0].heads % 8 == 0
    assert model.num_layers % 4 == 0
    assert 32 <= model.hidden / model.num_layers <= 256


def test_the_same_text_gives_the_same_model() -> None:
    assert standard_decoder("7b") == standard_decoder("7B")
    assert load_model("1000m").num_params == pytest.approx(1e9, rel=0.03)


@pytest.mark.parametrize("text", ["0m", "1k", "8m", "9999t", "b"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(InputError, match=r"^model="):
        load_model(text)
