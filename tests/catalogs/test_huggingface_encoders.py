"""Hugging Face configs of encoders give the catalog's models."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from forerun.catalogs import load_model
from forerun.catalogs.huggingface import model_from_config
from forerun.errors import InputError

CONFIGS: dict[str, dict[str, Any]] = {
    "t5-3b": {
        "model_type": "t5", "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32,
        "num_layers": 24, "vocab_size": 32128, "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6, "n_positions": 512,
    },
    "t5-v1.1-xl": {
        "model_type": "t5", "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32,
        "num_layers": 24, "num_decoder_layers": 24, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "bert-large": {
        "model_type": "bert", "hidden_size": 1024, "intermediate_size": 4096, "hidden_act": "gelu",
        "num_attention_heads": 16, "num_hidden_layers": 24, "type_vocab_size": 2,
        "max_position_embeddings": 512, "vocab_size": 30522, "layer_norm_eps": 1e-12,
    },
    "vit-l-16": {
        "model_type": "vit", "hidden_size": 1024, "intermediate_size": 4096, "hidden_act": "gelu",
        "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 224, "patch_size": 16,
        "num_channels": 3, "layer_norm_eps": 1e-6,
        "id2label": {str(label): "name" for label in range(1000)},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config_gives_the_catalog_s_model(name: str) -> None:
    """But for the share of masked tokens, which no config says."""
    read, ours = model_from_config(CONFIGS[name], "config.json"), load_model(name)
    fields = {"name": name, "source": ours.source, "head_share": ours.head_share}
    assert replace(read, **fields) == ours


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("t5-3b", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        ("t5-3b", {"d_kv": None}, "d_kv"),
        ("bert-large", {"num_attention_heads": 15}, "num_attention_heads"),
        ("bert-large", {"hidden_act": "relu"}, "hidden_act"),
        ("vit-l-16", {"patch_size": 15}, r"patches\.patch"),
        ("vit-l-16", {"image_size": "224"}, "image_size"),
    ],
)
def test_broken_configs_name_the_key(name: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        model_from_config({**CONFIGS[name], **changes}, "config.json")
