"""Model: what is trained - layers with their sizes, vocabulary, head, positions."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from . import ends, traced
from .document import Document, Value
from .errors import InputError
from .experts import Experts
from .traced import Traced, TracedOperator
from .vision import Conditioning, ConvBlock, Patches

Mlp = Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"]
GATED: tuple[Mlp, ...] = ("swiglu", "geglu")
"""MLPs of three matrices; the others have two."""
Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned", "alibi", "relative", "none"]
Head = Literal["lm", "mlm", "classifier", "projection", "diffusion"]


class LatentAttention(Value, frozen=True, kw_only=True):
    """Multi-head latent attention (DeepSeek): ranks and head sizes."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class Layer(Value, frozen=True, kw_only=True):
    """`repeat` identical layers in a row."""

    kind: Literal["decoder", "encoder", "cross_decoder", "conv", "traced"] = "decoder"
    """decoder: causal; encoder: every token sees all; cross_decoder: causal, then looks at the
    output of the encoder; conv: a block of convolutions; traced: the operators of a user's
    submodule."""
    repeat: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    ffn_hidden: int = 0
    """Width of the dense MLP; ignored when `experts` is set."""
    hidden: int | None = None
    """Width; None = the model's."""
    stack: int = 0
    """Which stack of the model it belongs to: encoder 0 and decoder 1, or the towers in order."""
    seq_tokens: int | None = None
    """Tokens per sample where the model fixes them; None = `seq_share` of the workload's."""
    seq_share: float = 1.0
    """Tokens per sample relative to the workload's sequence length."""
    modulated: bool = False
    """Scale, shift and gate of both halves come from the conditioning vector by a linear layer
    (adaLN-Zero: Peebles & Xie 2023, section 3.2); its norms have no weights of their own."""
    conv: ConvBlock | None = None
    """The convolutions of a conv layer, which has no heads and no MLP."""
    mlp: Mlp = "swiglu"
    norm: Norm = "rmsnorm"
    bias: bool = False
    """Biases in the linear layers."""
    qkv_bias: bool = False
    """Biases in the projections of Q, K and V alone (Qwen2); implied by `bias`."""
    experts: Experts | None = None
    latent: LatentAttention | None = None
    operators: tuple[TracedOperator, ...] = ()
    """Of a traced layer, which no axis but the batch divides: its other sizes are 1."""

    def tokens(self, seq_tokens: int) -> int:
        """Tokens of one sample in this layer at a workload's sequence length."""
        return self.seq_tokens or math.ceil(self.seq_share * seq_tokens)

    @property
    def is_plain(self) -> bool:
        """Whether it has neither routed experts nor latent attention."""
        return self.experts is None and self.latent is None

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Widths of the MLP that tensor parallelism divides: the dense one, or the experts'."""
        if self.experts is None:
            return (self.ffn_hidden,)
        shared = self.experts.shared_ffn_hidden
        return (self.experts.ffn_hidden, shared) if shared else (self.experts.ffn_hidden,)

    def attention_params(self, hidden: int) -> int:
        """Weights of Q, K, V and O (and of the latent projections)."""
        if self.latent is not None:
            a = self.latent
            qk = a.qk_nope_head_dim + a.qk_rope_head_dim
            q = (
                hidden * self.heads * qk
                if a.q_lora_rank is None
                else a.q_lora_rank * (hidden + self.heads * qk + 1)
            )
            kv = hidden * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
            kv += a.kv_lora_rank * self.heads * (a.qk_nope_head_dim + a.v_head_dim)
            return q + kv + self.heads * a.v_head_dim * hidden
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = q_width + 2 * kv_width if self.bias or self.qkv_bias else 0
        biases += hidden if self.bias else 0
        return 2 * hidden * (q_width + kv_width) + biases

    def mlp_params(self, hidden: int) -> int:
        """Weights of the MLP, all experts and the router included."""
        matrices = 3 if self.mlp in GATED else 2
        if self.experts is not None:
            e = self.experts
            routed = e.num_experts * matrices * hidden * e.ffn_hidden
            return routed + matrices * hidden * e.shared_ffn_hidden + hidden * e.num_experts
        biases = ((matrices - 1) * self.ffn_hidden + hidden) if self.bias else 0
        return matrices * hidden * self.ffn_hidden + biases

    def norm_params(self, hidden: int) -> int:
        """Weights of the norms: one before each attention and one before the MLP."""
        if self.modulated:
            return 0
        norms = 3 if self.kind == "cross_decoder" else 2
        return norms * hidden * (1 if self.norm == "rmsnorm" else 2)

    def cross_params(self, hidden: int, source_hidden: int) -> int:
        """Weights of the attention over the encoder's output, `source_hidden` wide."""
        if self.kind != "cross_decoder":
            return 0
        own = self.attention_params(hidden)
        return own + 2 * (source_hidden - hidden) * self.kv_heads * self.head_dim

    def num_params(self, hidden: int, source_hidden: int = 0) -> int:
        """Parameters of one such layer."""
        if self.kind == "traced":
            return traced.num_params(self.operators)
        if self.conv is not None:
            return self.conv.num_params
        modulation = 6 * hidden * (hidden + 1) if self.modulated else 0
        params = self.attention_params(hidden) + self.mlp_params(hidden) + self.norm_params(hidden)
        return params + self.cross_params(hidden, source_hidden) + modulation

    def forward_flops_per_token(self, hidden: int, tokens: float) -> float:
        """FLOPs of one token's forward through one such layer with `tokens` in the sequence.

        Causal attention at half of the full square; attention over an encoder's output and
        modulation are per sample (`forward_flops`).
        """
        square = 2.0 if self.kind == "encoder" else 1.0
        matrices = 3 if self.mlp in GATED else 2
        if self.latent is not None:
            attention = 2.0 * self.attention_params(hidden)
            qk = self.latent.qk_nope_head_dim + self.latent.qk_rope_head_dim
            score = square * self.heads * (qk + self.latent.v_head_dim) * tokens
        else:
            attention = 4.0 * hidden * (self.heads + self.kv_heads) * self.head_dim
            score = square * 2 * self.heads * self.head_dim * tokens
        if self.experts is not None:
            e = self.experts
            width = e.top_k * e.ffn_hidden + e.shared_ffn_hidden
            mlp = 2.0 * matrices * hidden * width + 2.0 * hidden * e.num_experts
        else:
            mlp = 2.0 * matrices * hidden * self.ffn_hidden
        return attention + score + mlp

    def forward_flops(
        self, hidden: int, tokens: int, source_hidden: int = 0, source_tokens: int = 0
    ) -> float:
        """FLOPs of one sample's forward through one such layer."""
        if self.conv is not None:
            return self.conv.forward_flops
        flops = tokens * self.forward_flops_per_token(hidden, tokens)
        if self.kind == "cross_decoder":
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            flops += 4.0 * tokens * hidden * q + 4.0 * source_tokens * source_hidden * kv
            flops += 4.0 * tokens * source_tokens * q
        return flops + (12.0 * hidden**2 if self.modulated else 0.0)


class Model(Document, frozen=True, kw_only=True):
    """Inputs, layers and head: a decoder, or one or two stacks of other layers.

    Token ids enter every stack of a model with a vocabulary, but for the one that `patches` enter
    (the first). A first layer of convolutions takes the image itself.
    """

    SCHEMA: ClassVar[str] = "forerun.model/1"

    schema: str = "forerun.model/1"
    name: str
    hidden: int
    vocab: int = 0
    """Entries of the token table; 0 = no tokens enter."""
    layers: tuple[Layer, ...]
    patches: Patches | None = None
    """Images that enter the first stack as patches."""
    conditioning: Conditioning | None = None
    embedding_norm: bool = False
    """A norm between the first stack's input and its layers (BERT, CLIP)."""
    token_types: int = 0
    """Rows of a table of segment types (BERT)."""
    relative_buckets: int = 0
    """Rows of the table of learned biases by distance that each stack has (T5), one per head."""
    head: Head = "lm"
    """lm: norm, then a score per vocabulary entry; mlm: a linear layer, GELU, norm, then the same
    with a bias; classifier: norm, one token (or the mean), a linear layer with bias; projection:
    that without bias for each stack, compared with one another; diffusion: modulated norm, then
    twice a patch per token."""
    num_classes: int = 0
    """Outputs of a classifier."""
    projection: int = 0
    """Width of the space in which a projection head compares the stacks."""
    head_share: float = 1.0
    """Fraction of the tokens that an mlm head predicts."""
    tied_embeddings: bool = False
    positions: Positions = "rope"
    max_positions: int | None = None
    """Longest sequence in tokens that the positions were made for; None = unlimited."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    source: str = ""
    traced: Traced | None = None
    """Set where the layers are those of a user's module."""

    def __post_init__(self) -> None:
        for field, value in (("hidden", self.hidden), ("layers", len(self.layers))):
            _positive(self.name, field, value)
        needed = _HEAD_NEEDS.get(self.head)
        if needed is not None:
            _positive(self.name, needed, getattr(self, needed))
        _check_stacks(self)
        for layer in self.layers:
            _positive(self.name, "layers.repeat", layer.repeat)
            if (layer.kind == "conv") != (layer.conv is not None):
                raise InputError("layers.conv", layer.kind, f"{self.name} has a layer that is a "
                                 "convolution in name or in sizes alone",
                                 "give both kind and sizes, or neither")  # fmt: skip
            if layer.conv is not None:
                continue
            for field in ("heads", "kv_heads", "head_dim"):
                _positive(self.name, f"layers.{field}", getattr(layer, field))
            if layer.experts is None:
                _positive(self.name, "layers.ffn_hidden", layer.ffn_hidden)
            else:
                layer.experts.check(self.name)
            if layer.heads % layer.kv_heads:
                raise InputError("layers.kv_heads", layer.kv_heads,
                                 f"does not divide {layer.heads} heads of {self.name}",
                                 "give a divisor")  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Layers, repeats counted."""
        return sum(layer.repeat for layer in self.layers)

    def layer_at(self, index: int) -> Layer:
        """The layer group that holds layer `index` (0-based)."""
        for layer in self.layers:
            if index < layer.repeat:
                return layer
            index -= layer.repeat
        raise IndexError(index)

    @property
    def is_decoder(self) -> bool:
        """Whether it is one stack of decoder layers between a token table and an lm head."""
        others = (self.patches, self.conditioning, self.token_types, self.relative_buckets)
        plain = self.head == "lm" and not self.embedding_norm and not any(others)
        return plain and all(
            layer.kind == "decoder"
            and (layer.hidden, layer.stack) == (None, 0)
            and (layer.seq_tokens, layer.seq_share, layer.modulated) == (None, 1.0, False)
            for layer in self.layers
        )

    @property
    def stacks(self) -> tuple[Layer, ...]:
        """The last layer group of each stack, in order."""
        return tuple({layer.stack: layer for layer in self.layers}.values())

    def width(self, layer: Layer) -> int:
        """Hidden size of a layer."""
        return layer.hidden or self.hidden

    def lengths(self, seq_tokens: int) -> tuple[int, ...]:
        """The sequence lengths of the layers at a workload's; none of a model of convolutions."""
        return tuple(sorted({x.tokens(seq_tokens) for x in self.layers if x.conv is None}))

    def text_tokens(self, seq_tokens: int) -> int:
        """Tokens of the longest sequence of token ids at a workload's length."""
        taken = (x for k, x in enumerate(self.stacks) if ends.takes_tokens(self, k))
        return max((x.tokens(seq_tokens) for x in taken), default=0)

    @property
    def encoder(self) -> Layer | None:
        """The layer whose output cross-attention looks at: the last of the first stack."""
        return self.stacks[0] if any(x.kind == "cross_decoder" for x in self.layers) else None

    def layer_params(self, layer: Layer) -> int:
        """Parameters of one layer of a group."""
        encoder = self.encoder
        return layer.num_params(self.width(layer), self.width(encoder) if encoder else 0)

    @property
    def embedding_params(self) -> int:
        """What stands before the layers: tables, patch embedding, positions, conditioning."""
        if self.traced is not None:
            return traced.num_params(self.traced.prefix)
        return ends.input_params(self)

    @property
    def head_params(self) -> int:
        """Final norm and output head (a tied head has no table of its own)."""
        if self.traced is not None:
            return traced.num_params(self.traced.suffix)
        return ends.head_params(self)

    @property
    def num_params(self) -> int:
        """All parameters, each once.

        >>> from forerun.catalogs import load_model
        >>> load_model("llama-2-7b").num_params
        6738415616
        """
        layers = sum(layer.repeat * self.layer_params(layer) for layer in self.layers)
        return self.embedding_params + layers + self.head_params

    def flops_per_token(self, seq_tokens: int, attended_tokens: float | None = None) -> float:
        """Model FLOPs of one token, forward and backward (a multiply-add is two).

        Three times the forward matmuls, causal attention counted at half of the full square,
        head included, embedding look-up and recomputation not: the numerator of MFU. Where
        documents are packed, a token attends within its own, of `attended_tokens` in the mean.
        """
        if self.traced is not None:
            return self.traced.flops_per_sample / seq_tokens
        if not self.is_decoder:
            return self.flops_per_sample(seq_tokens) / seq_tokens
        forward = 2.0 * self.hidden * self.vocab
        for layer in self.layers:
            tokens = seq_tokens if attended_tokens is None else attended_tokens
            forward += layer.repeat * layer.forward_flops_per_token(self.width(layer), tokens)
        return 3.0 * forward

    def flops_per_sample(self, seq_tokens: int) -> float:
        """Model FLOPs of one sample, forward and backward; counted as `flops_per_token` does.

        `seq_tokens` is the workload's sequence length, which layers of fixed length ignore.
        """
        encoder = self.encoder
        source = (self.width(encoder), encoder.tokens(seq_tokens)) if encoder else (0, 0)
        forward = ends.input_flops(self) + ends.head_flops(self, seq_tokens)
        for layer in self.layers:
            tokens = layer.tokens(seq_tokens)
            forward += layer.repeat * layer.forward_flops(self.width(layer), tokens, *source)
        return 3.0 * forward


_HEAD_NEEDS = {
    "lm": "vocab", "mlm": "vocab", "classifier": "num_classes", "projection": "projection",
}  # fmt: skip


def _check_stacks(model: Model) -> None:
    """Raise InputError where layers lack what they work on."""
    crosses = any(layer.kind == "cross_decoder" for layer in model.layers)
    if model.vocab < 0:
        raise InputError("vocab", model.vocab, "is negative", "correct the size")
    if [layer.stack for layer in model.stacks] != list(range(len(model.stacks))):
        raise InputError("layers.stack", [layer.stack for layer in model.layers],
                         "is not counted from 0 in the order of the layers",
                         "number the stacks 0, 1, ...")  # fmt: skip
    if model.head == "diffusion" and model.patches is None:
        raise InputError("head", model.head, f"{model.name} has no patches to predict",
                         "give patches")  # fmt: skip
    if crosses and model.stacks[0].kind != "encoder":
        raise InputError("layers.kind", "cross_decoder", f"{model.name} starts without an encoder",
                         "give encoder layers of stack 0 first")  # fmt: skip
    if model.conditioning is None and any(layer.modulated for layer in model.layers):
        raise InputError("layers.modulated", True, f"{model.name} has no conditioning vector",
                         "give conditioning")  # fmt: skip


def _positive(name: str, field: str, value: int) -> None:
    if value < 1:
        raise InputError(field, value, f"{name} needs 1 or more", "correct the size")
