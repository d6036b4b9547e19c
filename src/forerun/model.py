"""Model: what is trained - layers with their sizes, vocabulary, head, positions."""

from __future__ import annotations

from typing import ClassVar, Literal

from .document import Document, Value
from .errors import InputError

Mlp = Literal["swiglu", "gelu", "squared_relu"]
Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned", "alibi", "none"]


class Experts(Value, frozen=True, kw_only=True):
    """The routed experts that take the place of a layer's MLP."""

    num_experts: int
    top_k: int
    ffn_hidden: int
    """Width of one routed expert."""
    shared_ffn_hidden: int = 0
    """Total width of the experts that every token passes; 0 = none."""
    capacity_factor: float | None = None
    """None = dropless."""


class LatentAttention(Value, frozen=True, kw_only=True):
    """Multi-head latent attention (DeepSeek): ranks and head sizes."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


class Layer(Value, frozen=True, kw_only=True):
    """`repeat` identical layers in a row."""

    kind: Literal["decoder"] = "decoder"
    repeat: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    """Width of the dense MLP; ignored when `experts` is set."""
    mlp: Mlp = "swiglu"
    norm: Norm = "rmsnorm"
    bias: bool = False
    """Biases in the linear layers."""
    qkv_bias: bool = False
    """Biases in the projections of Q, K and V alone (Qwen2); implied by `bias`."""
    experts: Experts | None = None
    latent: LatentAttention | None = None

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
        matrices = 3 if self.mlp == "swiglu" else 2
        if self.experts is not None:
            e = self.experts
            routed = e.num_experts * matrices * hidden * e.ffn_hidden
            return routed + matrices * hidden * e.shared_ffn_hidden + hidden * e.num_experts
        biases = ((matrices - 1) * self.ffn_hidden + hidden) if self.bias else 0
        return matrices * hidden * self.ffn_hidden + biases

    def norm_params(self, hidden: int) -> int:
        """Weights of the two norms."""
        return 2 * hidden * (1 if self.norm == "rmsnorm" else 2)

    def num_params(self, hidden: int) -> int:
        """Parameters of one such layer."""
        return self.attention_params(hidden) + self.mlp_params(hidden) + self.norm_params(hidden)


class Model(Document, frozen=True, kw_only=True):
    """A decoder: embedding, layers, final norm, head."""

    SCHEMA: ClassVar[str] = "forerun.model/1"

    schema: str = "forerun.model/1"
    name: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied_embeddings: bool = False
    positions: Positions = "rope"
    max_positions: int | None = None
    """Longest sequence in tokens that the positions were made for; None = unlimited."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    source: str = ""

    def __post_init__(self) -> None:
        for field, value in (("hidden", self.hidden), ("vocab", self.vocab)):
            _positive(self.name, field, value)
        if not self.layers:
            raise InputError("layers", "[]", f"{self.name} has no layers", "give one at least")
        for layer in self.layers:
            for field in ("repeat", "heads", "kv_heads", "head_dim"):
                _positive(self.name, f"layers.{field}", getattr(layer, field))
            if layer.experts is None:
                _positive(self.name, "layers.ffn_hidden", layer.ffn_hidden)
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
    def embedding_params(self) -> int:
        """Token embedding, and learned positions where there are any."""
        learned = self.max_positions or 0 if self.positions == "learned" else 0
        return self.hidden * (self.vocab + learned)

    @property
    def head_params(self) -> int:
        """Final norm and output head (a tied head has no weights of its own)."""
        norm = self.hidden * (1 if self.layers[-1].norm == "rmsnorm" else 2)
        return norm + (0 if self.tied_embeddings else self.hidden * self.vocab)

    @property
    def num_params(self) -> int:
        """All parameters, each once.

        >>> from forerun.catalogs import load_model
        >>> load_model("llama-2-7b").num_params
        6738415616
        """
        layers = sum(layer.repeat * layer.num_params(self.hidden) for layer in self.layers)
        return self.embedding_params + layers + self.head_params

    def flops_per_token(self, seq_tokens: int) -> float:
        """Model FLOPs of one token, forward and backward (a multiply-add is two).

        Three times the forward matmuls, causal attention counted at half of the full square,
        head included, embedding look-up and recomputation not: the numerator of MFU.
        """
        h = self.hidden
        forward = 2.0 * h * self.vocab
        for layer in self.layers:
            matrices = 3 if layer.mlp == "swiglu" else 2
            if layer.latent is not None:
                attention = 2.0 * layer.attention_params(h)
                qk = layer.latent.qk_nope_head_dim + layer.latent.qk_rope_head_dim
                score = layer.heads * (qk + layer.latent.v_head_dim) * seq_tokens
            else:
                attention = 4.0 * h * (layer.heads + layer.kv_heads) * layer.head_dim
                score = 2 * layer.heads * layer.head_dim * seq_tokens
            if layer.experts is not None:
                e = layer.experts
                width = e.top_k * e.ffn_hidden + e.shared_ffn_hidden
                mlp = 2.0 * matrices * h * width + 2.0 * h * e.num_experts
            else:
                mlp = 2.0 * matrices * h * layer.ffn_hidden
            forward += layer.repeat * (attention + score + mlp)
        return 3.0 * forward


def _positive(name: str, field: str, value: int) -> None:
    if value < 1:
        raise InputError(field, value, f"{name} needs 1 or more", "correct the size")
