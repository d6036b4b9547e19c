"""A model's parameter counts follow from its shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from msgspec.structs import replace

from forerun.errors import InputError
from forerun.model import Experts, LatentAttention, Layer, Model

from .strategies import models


def small(**changes: object) -> Model:
    layer = Layer(repeat=2, heads=4, kv_heads=2, head_dim=8, ffn_hidden=48)
    fields: dict[str, object] = {"name": "m", "hidden": 32, "vocab": 100, "layers": (layer,)}
    return Model(**{**fields, **changes})  # type: ignore[arg-type]


def test_counts_by_hand() -> None:
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # Q, K and V with two heads, O
    layer = attention + 3 * 32 * 48 + 2 * 32
    assert small().num_params == 100 * 32 + 2 * layer + 32 + 100 * 32


@given(models)
def test_parts_sum_to_the_whole(model: Model) -> None:
    layers = sum(
        model.layer_at(index).num_params(model.hidden) for index in range(model.num_layers)
    )
    assert model.num_params == model.embedding_params + layers + model.head_params


@given(models)
def test_repeats_can_be_written_out(model: Model) -> None:
    unrolled = tuple(replace(model.layer_at(i), repeat=1) for i in range(model.num_layers))
    other = replace(model, layers=unrolled)
    assert (other.num_params, other.num_layers) == (model.num_params, model.num_layers)
    assert other.flops_per_token(16) == pytest.approx(model.flops_per_token(16))


@given(models)
def test_tying_saves_one_vocabulary_matrix(model: Model) -> None:
    tied = replace(model, tied_embeddings=True).num_params
    untied = replace(model, tied_embeddings=False).num_params
    assert untied - tied == model.hidden * model.vocab


@given(models)
def test_longer_sequences_cost_more_per_token(model: Model) -> None:
    shorter, longer = model.flops_per_token(16), model.flops_per_token(32)
    width = sum(layer.repeat * layer.heads * layer.head_dim for layer in model.layers)
    assert longer - shorter == pytest.approx(3 * 2 * width * 16)


def test_flops_are_six_per_matmul_weight_without_attention() -> None:
    model = small()
    matmul_weights = model.num_params - model.embedding_params - 32 - 2 * 2 * 32
    assert model.flops_per_token(0) == 6 * matmul_weights


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"qkv_bias": True}, 32 + 2 * 16),
        ({"bias": True}, 32 + 2 * 16 + 32 + 2 * 48 + 32),
        ({"bias": True, "qkv_bias": True}, 32 + 2 * 16 + 32 + 2 * 48 + 32),
        ({"norm": "layernorm"}, 2 * 32),
        ({"mlp": "gelu"}, -32 * 48),
    ],
)
def test_options_of_a_layer(changes: dict[str, object], extra: int) -> None:
    layer = small().layers[0]
    changed = replace(layer, **changes)
    assert changed.num_params(32) - layer.num_params(32) == extra


def test_experts_take_the_place_of_the_mlp() -> None:
    experts = Experts(num_experts=4, top_k=2, ffn_hidden=16, shared_ffn_hidden=8)
    layer = replace(small().layers[0], experts=experts)
    assert layer.mlp_params(32) == 4 * 3 * 32 * 16 + 3 * 32 * 8 + 32 * 4


def test_latent_attention_by_hand() -> None:
    latent = LatentAttention(
        q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3
    )
    layer = replace(small().layers[0], latent=latent)
    q = 32 * 6 + 6 + 6 * 4 * (4 + 2)
    kv = 32 * (5 + 2) + 5 + 5 * 4 * (4 + 3)
    assert layer.attention_params(32) == q + kv + 4 * 3 * 32


@pytest.mark.parametrize(
    "changes", [{"hidden": 0}, {"vocab": -1}, {"layers": ()}, {"hidden": -4096}]
)
def test_impossible_sizes_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        small(**changes)


@pytest.mark.parametrize(
    "changes", [{"kv_heads": 3}, {"heads": 0}, {"repeat": 0}, {"ffn_hidden": 0}]
)
def test_impossible_layers_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"layers.{next(iter(changes))}"):
        small(layers=(replace(small().layers[0], **changes),))


def test_layer_at_outside_the_model() -> None:
    with pytest.raises(IndexError):
        small().layer_at(2)
