"""Hugging Face config.json: both generations of keys, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from forerun.catalogs import load_model
from forerun.catalogs.huggingface import FAMILIES, model_from_config
from forerun.errors import InputError

LLAMA = {  # the keys of Llama 3.1 8B's file
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
NEWER = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
NEWER |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3"}, "dtype": "bfloat16"}
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
    "sliding_window": None, "hidden_act": "silu",
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "sliding_window": 131072, "use_sliding_window": False,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_hidden_layers": 61, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "num_nextn_predict_layers": 1,
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "llama-3.1-8b"),
        (NEWER, "llama-3.1-8b"),
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN, "qwen2.5-7b"),
        (DEEPSEEK, "deepseek-v3"),
        (QWEN3_MOE, "qwen3-30b-a3b"),
    ],
    ids=["llama", "llama-newer-keys", "mixtral", "qwen2", "deepseek", "qwen3-moe"],
)
def test_same_as_the_catalog(config: dict[str, Any], name: str) -> None:
    catalog = load_model(name)
    model = model_from_config(config, "config.json")
    assert replace(model, name=name, source=catalog.source) == catalog


def test_gpt2_keys() -> None:
    model = model_from_config(GPT2, "config.json")
    assert model.num_params == 124_439_808  # of the published weights
    assert (model.positions, model.max_positions, model.tied_embeddings) == ("learned", 1024, True)


def test_head_size_need_not_be_hidden_over_heads() -> None:
    model = model_from_config({**LLAMA, "head_dim": 256}, "c")
    assert model.layers[0].head_dim == 256


def test_heads_without_groups() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert model_from_config(config, "c").layers[0].kv_heads == 32


def test_dense_layers_among_experts() -> None:
    config = {**QWEN3_MOE, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = model_from_config(config, "c")
    assert [model.layer_at(i).experts is not None for i in range(6)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip
    assert [layer.repeat for layer in model.layers] == [1, 1, 3, 1]


def test_text_part_of_a_composite() -> None:
    config = {"model_type": "mistral3", "vision_config": {}, "text_config": {**LLAMA}}
    model = model_from_config(config, "c")
    assert model.hidden == 4096
    assert "everything but the text model" in model.source


def test_what_is_left_out_is_said() -> None:
    assert (
        "sliding window of 4096 tokens"
        in model_from_config({**LLAMA, "model_type": "mistral", "sliding_window": 4096}, "c").source
    )
    assert "sliding window" not in model_from_config(QWEN, "c").source
    assert "multi-token prediction" in model_from_config(DEEPSEEK, "c").source


def test_biases() -> None:
    both = model_from_config({**LLAMA, "attention_bias": True, "mlp_bias": True}, "c").layers[0]
    assert (both.bias, both.qkv_bias) == (True, False)
    attention = model_from_config({**LLAMA, "attention_bias": True}, "c")
    assert (attention.layers[0].bias, attention.layers[0].qkv_bias) == (False, True)
    assert "output projection" in attention.source


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    model = load_model(str(folder))
    assert model.name == "My-Model"
    assert model == load_model(str(folder / "config.json"))
    assert model.num_params == 8_030_261_248


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"model_type": "mamba"}, "model_type", "not one a model document can describe"),
        ({"model_type": None, "architectures": None}, "model_type", "does not name an"),
        ({"model_type": ["llama"]}, "model_type", "not one a model document can describe"),
        ({"hidden_size": None}, "hidden_size", "missing"),
        ({"hidden_size": 0}, "hidden_size", "not a positive whole number"),
        ({"hidden_size": True}, "hidden_size", "not a positive whole number"),
        ({"hidden_size": "4096"}, "hidden_size", "not a positive whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers", "not a positive whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", "more than"),
        ({"num_attention_heads": 33}, "num_attention_heads", "does not divide"),
        ({"num_key_value_heads": 5}, "layers.kv_heads", "does not divide 32 heads"),
        ({"intermediate_size": None}, "intermediate_size", "missing"),
        ({"hidden_act": "gelu"}, "hidden_act", "not an activation of this architecture"),
        ({"hidden_act": 3}, "hidden_act", "not an activation of this architecture"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "not true or false"),
        ({"rope_theta": "big"}, "rope_theta", "not a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps", "not a positive number"),
    ],
)
def test_wrong_keys_are_named(change: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        model_from_config({**LLAMA, **change}, "config.json")
    assert caught.value.field == field
    assert problem in str(caught.value)


@given(st.integers(0, len(json.dumps(LLAMA)) - 1))
def test_truncated_files(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(LLAMA)[:cut])
        with pytest.raises(InputError, match="not valid JSON"):
            load_model(str(path))


@pytest.mark.parametrize("text", ["[]", "3", '"llama"', "null"])
def test_not_an_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="Expected `object`"):
        load_model(str(tmp_path))


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5000),
    st.floats(allow_nan=False),
    st.text("ab1", max_size=4),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text("ab1", max_size=3), st.integers(), max_size=2),
)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.sampled_from([LLAMA, DEEPSEEK, GPT2, QWEN3_MOE]),
    st.data(),
)
def test_any_value_of_any_key_is_read_or_refused(
    family: str, config: dict[str, Any], data: st.DataObject
) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(config)), values, max_size=3))
    try:
        model = model_from_config({**config, "model_type": family, **changes}, "config.json")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert model.num_params > 0
