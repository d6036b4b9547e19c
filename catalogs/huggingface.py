"""A Hugging Face `config.json` as a Model, both generations of keys; transformers is not needed.

Keys and defaults are those of transformers 5.23 and of the files it still reads (`rope_theta`
before `rope_parameters`). What a Model cannot say - sliding windows, a vision tower, norms of
queries and keys - is named in `source`, so that nothing is dropped in silence.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple, cast

import msgspec

from ..errors import InputError
from ..experts import Experts, Scores
from ..model import LatentAttention, Layer, Mlp, Model, Norm, Positions
from .huggingface_encoders import READERS

Config = dict[str, Any]
MAX_LAYERS = 10_000


class Family(NamedTuple):
    """What a `model_type` implies and its config does not say."""

    activation: str = "silu"
    norm: Norm = "rmsnorm"
    positions: Positions = "rope"
    tied: bool = False
    bias: bool = False
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    omitted: str = ""


_QK_NORM = "norms of queries and keys"
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(rope_theta=1e6),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True, omitted="the gate of the shared expert"),
    "qwen3": Family(omitted=_QK_NORM),
    "qwen3_moe": Family(omitted=_QK_NORM),
    "deepseek_v3": Family(omitted="the router's correction bias and groups of experts"),
    "gpt_oss": Family(rope_theta=150000.0, omitted="biases of experts and router, attention sinks"),
    "nemotron": Family(activation="relu2", norm="layernorm"),
    "gpt2": Family(
        activation="gelu_new", norm="layernorm", positions="learned", tied=True, bias=True
    ),
    "gpt_neox": Family(
        activation="gelu",
        norm="layernorm",
        bias=True,
        omitted="attention and MLP side by side, rotary of a part of each head",
    ),
}
_MLP: dict[str, Mlp] = {
    "silu": "swiglu", "swish": "swiglu",
    "gelu": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu",
    "relu2": "squared_relu",
}  # fmt: skip
_GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
}  # fmt: skip


def model_from_config(raw: Config, source: str) -> Model:
    """The model that a config describes; InputError names the key that is missing or unknown."""
    notes: list[str] = []
    if isinstance(raw.get("text_config"), dict):
        notes.append("everything but the text model")
        raw = {**raw, **cast("Config", raw["text_config"])}
    kind = raw.get("model_type")
    if isinstance(kind, str) and kind in READERS:
        return READERS[kind](Reader(raw, source), _name(raw, source))
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise _unknown(raw, source)
    if kind == "gpt2":
        raw = {**raw, **{ours: raw[theirs] for ours, theirs in _GPT2_KEYS.items() if theirs in raw}}
    reader = Reader(raw, source)
    notes += [family.omitted] if family.omitted else []
    if reader.count("num_mtp_layers", reader.count("num_nextn_predict_layers", 0)):
        notes.append("multi-token prediction")
    layers = _layers(reader, family, notes)
    return Model(
        name=_name(raw, source),
        hidden=reader.size("hidden_size"),
        vocab=reader.size("vocab_size"),
        layers=layers,
        tied_embeddings=reader.flag("tie_word_embeddings", family.tied),
        positions=family.positions,
        max_positions=reader.size_or_none("max_position_embeddings"),
        rope_theta=_rope_theta(reader, family),
        norm_eps=_norm_eps(reader, family),
        source=f"{source}" + (f" (left out: {'; '.join(notes)})" if notes else ""),
    )


class Reader(NamedTuple):
    """Typed access to a config, with errors that name file and key."""

    raw: Config
    source: str

    def error(self, key: str, problem: str) -> InputError:
        return InputError(key, self.raw.get(key, "(absent)"), f"{problem} in {self.source}",
                          "check that the file is whole and a model's config.json")  # fmt: skip

    def size_or_none(self, *keys: str) -> int | None:
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self.error(key, "not a positive whole number")
            return value
        return None

    def size(self, *keys: str) -> int:
        value = self.size_or_none(*keys)
        if value is None:
            raise self.error(keys[0], "missing")
        return value

    def count(self, key: str, default: int) -> int:
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "not a whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.error(key, "not a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "not true or false")
        return value


def _unknown(raw: Config, source: str) -> InputError:
    named = raw.get("model_type") or raw.get("architectures")
    if named is None:
        problem, remedy = f"{source} does not name an architecture", "give a model's config.json"
        return InputError("model_type", "(absent)", problem, remedy)
    known = ", ".join(sorted({*FAMILIES, *READERS}))
    problem = f"the architecture in {source} is not one a model document can describe"
    return InputError("model_type", named, problem, f"known: {known}")


def _name(raw: Config, source: str) -> str:
    given = raw.get("_name_or_path")
    if isinstance(given, str) and given.strip("/. "):
        return given.rstrip("/").rsplit("/", 1)[-1]
    parts = source.replace("\\", "/").split("/")
    folder = parts[-2] if len(parts) > 1 and parts[-1] == "config.json" else ""
    return folder.strip(". ") or str(raw["model_type"])


def _layers(reader: Reader, family: Family, notes: list[str]) -> tuple[Layer, ...]:
    """One Layer per run of equal layers (dense first, then experts, ...)."""
    count = reader.size("num_hidden_layers")
    if count > MAX_LAYERS:
        raise reader.error("num_hidden_layers", f"more than {MAX_LAYERS}")
    dense, sparse = _layer(reader, family, None, notes), None
    experts = _experts(reader)
    if experts is not None:
        sparse = _layer(reader, family, experts, [])
    runs = groupby(sparse is not None and _is_sparse(reader, index) for index in range(count))
    lengths = [(is_sparse, len(list(run))) for is_sparse, run in runs]
    return tuple(
        msgspec.structs.replace(sparse if is_sparse and sparse else dense, repeat=length)
        for is_sparse, length in lengths
    )


def _is_sparse(reader: Reader, index: int) -> bool:
    """Whether layer `index` holds experts (Qwen's step and list, DeepSeek's first dense layers)."""
    dense = reader.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise reader.error("mlp_only_layers", "not a list")
    if index in dense:
        return False
    if index < reader.count("first_k_dense_replace", 0):
        return False
    if "moe_layer_freq" in reader.raw:
        return index % reader.size("moe_layer_freq") == 0
    return (index + 1) % (reader.size_or_none("decoder_sparse_step") or 1) == 0


def _experts(reader: Reader) -> Experts | None:
    num = reader.size_or_none("num_local_experts", "n_routed_experts", "num_experts")
    if num is None:
        return None
    width = reader.size("moe_intermediate_size", "intermediate_size")
    shared = reader.count("shared_expert_intermediate_size", 0)
    return Experts(
        num_experts=num,
        top_k=reader.size("num_experts_per_tok"),
        ffn_hidden=width,
        shared_ffn_hidden=shared or reader.count("n_shared_experts", 0) * width,
        scores=_scores(reader),
        renormalise=reader.flag("norm_topk_prob", True),
        routed_scale=reader.number("routed_scaling_factor", 1.0),
    )


def _scores(reader: Reader) -> Scores:
    """What a router makes scores by: DeepSeek-V3's configs leave the sigmoid out."""
    default = "sigmoid" if reader.raw.get("model_type") == "deepseek_v3" else "softmax"
    name = reader.raw.get("scoring_func", default)
    if name not in ("softmax", "sigmoid"):
        raise reader.error("scoring_func", "not softmax or sigmoid")
    return name


def _layer(reader: Reader, family: Family, experts: Experts | None, notes: list[str]) -> Layer:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    head_dim = reader.size_or_none("head_dim")
    if head_dim is None and hidden % heads:
        raise reader.error("num_attention_heads", f"does not divide hidden_size={hidden}")
    latent = _latent(reader)
    if latent is not None:
        head_dim = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    bias, qkv_bias = _biases(reader, family, notes)
    _note_window(reader, notes)
    ffn = reader.size_or_none("intermediate_size")
    if ffn is None and reader.raw.get("model_type") != "gpt2":
        raise reader.error("intermediate_size", "missing")
    return Layer(
        repeat=1,
        heads=heads,
        kv_heads=reader.size_or_none("num_key_value_heads") or heads,
        head_dim=head_dim or hidden // heads,
        ffn_hidden=ffn or 4 * hidden,
        mlp=_mlp(reader, family),
        norm=family.norm,
        bias=bias,
        qkv_bias=qkv_bias,
        experts=experts,
        latent=latent,
    )


def _mlp(reader: Reader, family: Family) -> Mlp:
    """The MLP kind; a gated one with another activation than SiLU is not one we describe."""
    name = reader.raw.get("hidden_act") or reader.raw.get("hidden_activation") or family.activation
    kind = _MLP.get(name) if isinstance(name, str) else None
    if kind is None or (kind == "swiglu") != (family.activation == "silu"):
        problem = f"not an activation of this architecture in {reader.source}"
        raise InputError("hidden_act", name, problem, f"only {family.activation} is described")
    return kind


def _biases(reader: Reader, family: Family, notes: list[str]) -> tuple[bool, bool]:
    """(all linear layers, only Q, K and V); other mixtures are noted as left out."""
    attention = reader.flag("attention_bias", family.bias or family.qkv_bias)
    mlp = reader.flag("mlp_bias", family.bias)
    if attention and mlp:
        return True, False
    if mlp:
        notes.append("biases of the MLP")
    if attention and not family.qkv_bias:
        notes.append("the bias of the attention's output projection")
    return False, attention


def _note_window(reader: Reader, notes: list[str]) -> None:
    window = reader.size_or_none("sliding_window")
    if window is not None and reader.flag("use_sliding_window", True):
        notes.append(f"sliding window of {window} tokens")


def _latent(reader: Reader) -> LatentAttention | None:
    if reader.raw.get("kv_lora_rank") is None:
        return None
    return LatentAttention(
        q_lora_rank=reader.size_or_none("q_lora_rank"),
        kv_lora_rank=reader.size("kv_lora_rank"),
        qk_nope_head_dim=reader.size("qk_nope_head_dim"),
        qk_rope_head_dim=reader.size("qk_rope_head_dim"),
        v_head_dim=reader.size("v_head_dim"),
    )


def _rope_theta(reader: Reader, family: Family) -> float:
    """`rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before)."""
    newer = reader.raw.get("rope_parameters")
    if isinstance(newer, dict) and "rope_theta" in newer:
        return Reader(cast("Config", newer), reader.source).number("rope_theta", 0)
    if "rotary_emb_base" in reader.raw:
        return reader.number("rotary_emb_base", family.rope_theta)
    return reader.number("rope_theta", family.rope_theta)


def _norm_eps(reader: Reader, family: Family) -> float:
    if family.norm == "rmsnorm":
        return reader.number("rms_norm_eps", 1e-6)
    return reader.number("norm_eps", reader.number("layer_norm_eps", 1e-5))
