"""Hugging Face configs of T5, BERT and ViT as Models; see `huggingface.py` for decoders.

Keys and defaults are those of transformers' configuration classes of the three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError
from ..model import Layer, Mlp, Model
from ..vision import Patches

if TYPE_CHECKING:
    from .huggingface import Reader

TARGET_SHARE = 114 / 512
"""Target tokens per input token of T5's pre-training (span corruption, 15 % in spans of 3)."""


def t5(reader: Reader, name: str) -> Model:
    """Encoder and decoder of T5 1.0 (ReLU) and 1.1 (gated GELU)."""
    form = reader.raw.get("feed_forward_proj", "relu")
    mlps: dict[str, Mlp] = {"relu": "relu", "gated-gelu": "geglu"}
    if form not in mlps:
        raise InputError("feed_forward_proj", form, f"not one of T5's in {reader.source}",
                         f"only {' and '.join(mlps)} are described")  # fmt: skip
    heads, count = reader.size("num_heads"), reader.size("num_layers")
    encoder = Layer(
        kind="encoder",
        repeat=count,
        heads=heads,
        kv_heads=heads,
        head_dim=reader.size("d_kv"),
        ffn_hidden=reader.size("d_ff"),
        mlp=mlps[form],
    )
    decoder = Layer(
        kind="cross_decoder",
        stack=1,
        repeat=reader.size_or_none("num_decoder_layers") or count,
        heads=heads,
        kv_heads=heads,
        head_dim=encoder.head_dim,
        ffn_hidden=encoder.ffn_hidden,
        mlp=encoder.mlp,
        seq_share=TARGET_SHARE,
    )
    return Model(
        name=name,
        hidden=reader.size("d_model"),
        vocab=reader.size("vocab_size"),
        layers=(encoder, decoder),
        tied_embeddings=reader.flag("tie_word_embeddings", True),
        positions="relative",
        relative_buckets=reader.size_or_none("relative_attention_num_buckets") or 32,
        norm_eps=reader.number("layer_norm_epsilon", 1e-6),
        source=f"{reader.source} (assumed: 114 target tokens to 512 input tokens)",
    )


def bert(reader: Reader, name: str) -> Model:
    """BERT with its head for masked tokens, which sees every token as in transformers."""
    return Model(
        name=name,
        hidden=reader.size("hidden_size"),
        vocab=reader.size("vocab_size"),
        layers=(_encoder(reader),),
        tied_embeddings=reader.flag("tie_word_embeddings", True),
        positions="learned",
        max_positions=reader.size("max_position_embeddings"),
        token_types=reader.size_or_none("type_vocab_size") or 2,
        embedding_norm=True,
        head="mlm",
        norm_eps=reader.number("layer_norm_eps", 1e-12),
        source=f"{reader.source} (left out: the pooler and next-sentence prediction)",
    )


def vit(reader: Reader, name: str) -> Model:
    """A vision transformer with a linear classifier over its first token."""
    labels = reader.raw.get("id2label")
    patches = Patches(
        size=reader.size("image_size"),
        patch=reader.size("patch_size"),
        channels=reader.size_or_none("num_channels") or 3,
        extra_tokens=1,
    )
    return Model(
        name=name,
        hidden=reader.size("hidden_size"),
        layers=(_encoder(reader, seq_tokens=patches.num_tokens),),
        patches=patches,
        positions="learned",
        head="classifier",
        num_classes=len(labels) if isinstance(labels, dict) and labels else 2,
        norm_eps=reader.number("layer_norm_eps", 1e-12),
        source=reader.source,
    )


def _encoder(reader: Reader, *, seq_tokens: int | None = None) -> Layer:
    """The layers that BERT and ViT share: LayerNorm, biases, GELU."""
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    if hidden % heads:
        raise reader.error("num_attention_heads", f"does not divide hidden_size={hidden}")
    activation = reader.raw.get("hidden_act", "gelu")
    if activation not in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        raise InputError("hidden_act", activation,
                         f"not an activation of this architecture in {reader.source}",
                         "only gelu is described")  # fmt: skip
    return Layer(
        kind="encoder",
        repeat=reader.size("num_hidden_layers"),
        seq_tokens=seq_tokens,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden=reader.size("intermediate_size"),
        mlp="gelu",
        norm="layernorm",
        bias=True,
    )


READERS = {"t5": t5, "bert": bert, "vit": vit}
"""By `model_type`."""
