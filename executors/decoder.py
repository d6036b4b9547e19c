"""The decoder that plans are run with: plain PyTorch, in operators that the cost model prices.

Every operator of a block is run through `run`, under the name that it has in `costmodel/layers/`:
that is where techniques come in which hold, make again or move what an operator saves. A change in
one room is a change in the other: the tests compare saved bytes and FLOPs of the two.

Shape suffixes: B batch, S sequence, E hidden, H heads, G key-value heads, D head size, F ffn width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Layer, Model

Run = Callable[..., Any]
"""`run(name, function, *args)`: the result of a named operator on its arguments."""


def run_plainly(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """The operator, and nothing else."""
    return function(*args)


def same(x: Tensor) -> Tensor:
    """What an edge within one rank does."""
    return x


def rotary_table(seq_tokens: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines of rotary positions, (2, S, D), fp32."""
    half = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = theta ** (-half / head_dim)
    angle = torch.arange(seq_tokens, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BSHD: Tensor, table_2SD: Tensor) -> Tensor:
    """Rotary positions applied to queries or keys; the table has the dtype of `x`."""
    cos, sin = table_2SD[:, None, :, None, :].unbind(0)
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos + torch.cat((-second, first), dim=-1) * sin


def make_norm(layer: Layer, hidden: int, eps: float) -> nn.Module:
    """RMSNorm or LayerNorm with weights."""
    if layer.norm == "rmsnorm":
        return nn.RMSNorm(hidden, eps=eps)
    return nn.LayerNorm(hidden, eps=eps)


def attention_core(q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    """Causal attention (B, H, S, D); the part that selective recompute runs twice."""
    return F.scaled_dot_product_attention(
        q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1]
    )


class Linear(nn.Linear):
    """A linear whose product with its weight may be exchanged."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product: Callable[..., Tensor] = F.linear

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.run: Run = run_plainly
        self.enter: Callable[[Tensor], Tensor] = same
        self.leave: Callable[[Tensor], Tensor] = same
        self.core: Callable[[Tensor, Tensor, Tensor], Tensor] = attention_core
        width, kv_width = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        qkv_bias = layer.bias or layer.qkv_bias
        self.wq = Linear(model.hidden, width, bias=qkv_bias)
        self.wk = Linear(model.hidden, kv_width, bias=qkv_bias)
        self.wv = Linear(model.hidden, kv_width, bias=qkv_bias)
        self.wo = Linear(width, model.hidden, bias=layer.bias)

    def forward(self, x_BSE: Tensor, table_2SD: Tensor | None) -> Tensor:
        run, heads = self.run, (-1, self.head_dim)
        x_BSE = run("attention.enter", self.enter, x_BSE)
        q_BSHD = run("wq", self.wq, x_BSE).unflatten(-1, heads)
        k_BSGD = run("wk", self.wk, x_BSE).unflatten(-1, heads)
        v_BSGD = run("wv", self.wv, x_BSE).unflatten(-1, heads)
        if table_2SD is not None:
            q_BSHD = run("rope_q", rotate, q_BSHD, table_2SD)
            k_BSGD = run("rope_k", rotate, k_BSGD, table_2SD)
        qkv = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
        out_BHSD = run("attention_core", self.core, *qkv)
        out_BSE = run("wo", self.wo, out_BHSD.transpose(1, 2).flatten(-2))
        return run("attention.leave", self.leave, out_BSE)


def swiglu(gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
    """SiLU of one projection times the other."""
    return F.silu(gate_BSF) * up_BSF


def squared_relu(up_BSF: Tensor) -> Tensor:
    """The square of what is positive."""
    return F.relu(up_BSF).square()


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu, "gelu": F.gelu, "squared_relu": squared_relu,
}  # fmt: skip


class Mlp(nn.Module):
    """Dense feed-forward block: SwiGLU, GELU or squared ReLU."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.kind = layer.mlp
        self.run: Run = run_plainly
        self.enter: Callable[[Tensor], Tensor] = same
        self.leave: Callable[[Tensor], Tensor] = same
        if layer.mlp == "swiglu":
            self.gate = Linear(model.hidden, layer.ffn_hidden, bias=layer.bias)
        self.up = Linear(model.hidden, layer.ffn_hidden, bias=layer.bias)
        self.down = Linear(layer.ffn_hidden, model.hidden, bias=layer.bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        run = self.run
        x_BSE = run("mlp.enter", self.enter, x_BSE)
        wide = [run("gate", self.gate, x_BSE)] if self.kind == "swiglu" else []
        wide.append(run("up", self.up, x_BSE))
        inner_BSF = run(self.kind, ACTIVATIONS[self.kind], *wide)
        return run("mlp.leave", self.leave, run("down", self.down, inner_BSF))


class Block(nn.Module):
    """One decoder layer: pre-norm attention and MLP, each with a residual."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.run: Run = run_plainly
        self.attention_norm = make_norm(layer, model.hidden, model.norm_eps)
        self.attention = Attention(model, layer)
        self.mlp_norm = make_norm(layer, model.hidden, model.norm_eps)
        self.mlp = Mlp(model, layer)

    def run_by(self, run: Run) -> None:
        """Have every operator of the block run by `run`."""
        self.run = self.attention.run = self.mlp.run = run

    def forward(self, x_BSE: Tensor, table_2SD: Tensor | None) -> Tensor:
        run = self.run
        normed_BSE = run("attention_norm", self.attention_norm, x_BSE)
        x_BSE = run("attention_residual", torch.add, x_BSE, self.attention(normed_BSE, table_2SD))
        normed_BSE = run("mlp_norm", self.mlp_norm, x_BSE)
        return run("mlp_residual", torch.add, x_BSE, self.mlp(normed_BSE))


class TiedHead(nn.Module):
    """The output head that shares the embedding's weight; a module, so that layouts can be set."""

    def __init__(self) -> None:
        super().__init__()
        self.product: Callable[..., Tensor] = F.linear

    def forward(self, x_BSE: Tensor, weight_VE: Tensor) -> Tensor:
        return self.product(x_BSE, weight_VE)


class Decoder(nn.Module):
    """The layers `first..last` (both included) of a model; embedding and head where they belong.

    Input is tokens (B, S) int64 on a piece that holds layer 0, hidden states (B, S, E) elsewhere;
    output is logits (B, S, V) on the piece with the last layer, hidden states elsewhere. Given
    targets (B, S), the last piece returns the mean loss instead, so that nobody else ever holds
    the logits. `first_piece` is the piece with the embedding where the same process holds it and
    the last one, so that tied tables are one parameter, that piece's.
    """

    def __init__(
        self, model: Model, first: int, last: int, first_piece: Decoder | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.is_first, self.is_last = first == 0, last == model.num_layers - 1
        self.sequence_shard: tuple[int, int] = (0, 1)
        """(part, parts) of the sequence that hidden states hold between modules."""
        self.loss: Callable[[Tensor, Tensor], Tensor] = token_loss
        """Mean loss of logits and targets; tensor parallelism puts its own in place."""
        self.table: Callable[[], Tensor] = lambda: self.embedding.weight
        """The tied table, wherever it is."""
        borrows = self.is_last and model.tied_embeddings and first_piece is not None
        if borrows and first_piece is not None:
            self.table = first_piece.table
        if self.is_first or (self.is_last and model.tied_embeddings and not borrows):
            self.embedding = nn.Embedding(model.vocab, model.hidden)
        if self.is_first and model.positions == "learned":
            self.positions = nn.Embedding(model.max_positions or 0, model.hidden)
        self.blocks = nn.ModuleDict(
            {str(index): Block(model, model.layer_at(index)) for index in range(first, last + 1)}
        )
        if self.is_last:
            self.norm = make_norm(model.layers[-1], model.hidden, model.norm_eps)
            if model.tied_embeddings:
                self.tied_head = TiedHead()
            else:
                self.head = Linear(model.hidden, model.vocab, bias=False)
        self.table_2SD: Tensor | None = None

    def rotary(self, seq_tokens: int, like: Tensor) -> Tensor | None:
        """The rotary table for a sequence length; made once, in the dtype of `like`, and kept."""
        if self.model.positions != "rope":
            return None
        table = self.table_2SD
        if table is None or table.shape[1] != seq_tokens or table.dtype != like.dtype:
            head_dim = self.model.layers[0].head_dim
            table = rotary_table(seq_tokens, head_dim, self.model.rope_theta, like.device)
            self.table_2SD = table = table.to(like.dtype)
        return table

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Hidden states of tokens, (B, S/parts, E)."""
        x_BSE = self.embedding(tokens_BS)
        if self.model.positions == "learned":
            part, parts = self.sequence_shard
            length = tokens_BS.shape[1] // parts
            index_S = torch.arange(part * length, (part + 1) * length, device=x_BSE.device)
            x_BSE = x_BSE + self.positions(index_S)
        return x_BSE

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Logits (B, S, V) of the last hidden states."""
        x_BSE = self.norm(x_BSE)
        if self.model.tied_embeddings:
            return self.tied_head(x_BSE, self.table())
        return self.head(x_BSE)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        seq_tokens = x.shape[1] * (1 if self.is_first else self.sequence_shard[1])
        if self.is_first:
            x = self.embed(x)
        table_2SD = self.rotary(seq_tokens, x)
        for block in self.blocks.values():
            x = block(x, table_2SD)
        if self.is_last:
            x = self.logits(x)
            if targets is not None:
                x = self.loss(x, targets)
        return x


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy per token, in fp32; plain also for logits cut along the vocabulary."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
