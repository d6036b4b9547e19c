"""The decoder that plans are run with: plain PyTorch, in operators that the cost model prices.

Every operator of a block is run through `run`, under the name that it has in `costmodel/layers/`:
that is where techniques come in which hold, make again or move what an operator saves. A change in
one room is a change in the other: the tests compare saved bytes and FLOPs of the two.

Shape suffixes: B batch, S sequence, E hidden, H heads, G key-value heads, D head size, F ffn width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import GATED, Layer, Model
from .context_parallel import (
    Context,
    Exchange,
    Spread,
    as_borders,
    attend,
    repeated,
    to_tokens,
)
from .experts.layer import Moe
from .latent import Latent
from .linear import Linear, Run, run_linear, run_plainly
from .rotary import rotary_table, rotate


def same(x: Tensor) -> Tensor:
    """What an edge within one rank does."""
    return x


def make_norm(layer: Layer, hidden: int, eps: float) -> nn.Module:
    """RMSNorm or LayerNorm with weights."""
    if layer.norm == "rmsnorm":
        return nn.RMSNorm(hidden, eps=eps)
    return nn.LayerNorm(hidden, eps=eps)


def attention_core(
    q_BHSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context: Context | None = None
) -> Tensor:
    """Causal attention (B, H, S, D); the part that selective recompute runs twice."""
    if context is not None and context.method is not None:
        return attend(q_BHSD, k_BGSD, v_BGSD, context.method)
    return F.scaled_dot_product_attention(
        q_BHSD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1]
    )


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.head_dim = layer.head_dim
        self.run: Run = run_plainly
        self.enter: Callable[[Tensor], Tensor] = same
        self.leave: Callable[[Tensor], Tensor] = same
        self.core: Callable[..., Tensor] = attention_core
        width, kv_width = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        qkv_bias = layer.bias or layer.qkv_bias
        self.wq = Linear(model.hidden, width, bias=qkv_bias)
        self.wk = Linear(model.hidden, kv_width, bias=qkv_bias)
        self.wv = Linear(model.hidden, kv_width, bias=qkv_bias)
        self.wo = Linear(width, model.hidden, bias=layer.bias)

    def forward(
        self, x_BSE: Tensor, table: Tensor | None, context: Context | None = None
    ) -> Tensor:
        run = self.run
        x_BSE = run("attention.enter", self.enter, x_BSE)
        if context is not None and context.ulysses is not None:
            out_BSHD = self._exchanged(x_BSE, table, context)
        else:
            out_BSHD = self._attended(x_BSE, table, context)
        out_BSE = run_linear(run, "wo", self.wo, out_BSHD.flatten(-2))
        return run("attention.leave", self.leave, out_BSE)

    def _attended(self, x_BSE: Tensor, table: Tensor | None, context: Context | None) -> Tensor:
        """Attention (B, S, H, D) of this rank's tokens."""
        run, heads = self.run, (-1, self.head_dim)
        q_BSHD = run_linear(run, "wq", self.wq, x_BSE).unflatten(-1, heads)
        k_BSGD = run_linear(run, "wk", self.wk, x_BSE).unflatten(-1, heads)
        v_BSGD = run_linear(run, "wv", self.wv, x_BSE).unflatten(-1, heads)
        if table is not None:
            q_BSHD = run("rope_q", rotate, q_BSHD, table)
            k_BSGD = run("rope_k", rotate, k_BSGD, table)
        qkv = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
        return run("attention_core", self.core, *qkv, context).transpose(1, 2)

    def _project(self, linear: nn.Module, x_BSE: Tensor) -> Tensor:
        return linear(x_BSE).unflatten(-1, (-1, self.head_dim))

    def _exchanged(self, x_BSE: Tensor, table: Tensor | None, context: Context) -> Tensor:
        """Attention (B, S, H, D) with heads exchanged for tokens around the core.

        A tensor leaves as soon as it is there, while the next is projected.
        """
        assert context.ulysses is not None
        q_way, k_way, v_way = (Exchange(context.ulysses) for _ in range(3))
        v_BSGD = v_way.start(repeated(self._project(self.wv, x_BSE), v_way.ranks))
        k_BSGD = self._project(self.wk, x_BSE)
        if table is not None:
            k_BSGD = rotate(k_BSGD, table)
        k_BSGD = k_way.start(repeated(k_BSGD, k_way.ranks))
        q_BSHD = self._project(self.wq, x_BSE)
        if table is not None:
            q_BSHD = rotate(q_BSHD, table)
        q_BSHD = q_way.start(q_BSHD)
        v_BSGD, k_BSGD, q_BSHD = v_way.finish(v_BSGD), k_way.finish(k_BSGD), q_way.finish(q_BSHD)
        q_BHSD, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGD))
        return to_tokens(self.core(q_BHSD, k_BGSD, v_BGSD, context).transpose(1, 2), q_way.group)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda up: F.relu(up).square(),
}
"""What stands between the matmuls of an MLP: of gate and up-projection, or of the latter."""


class Mlp(nn.Module):
    """Dense feed-forward block."""

    def __init__(self, hidden: int, layer: Layer, width: int, bias: bool) -> None:
        super().__init__()
        self.kind = layer.mlp
        self.run: Run = run_plainly
        self.enter: Callable[[Tensor], Tensor] = same
        self.leave: Callable[[Tensor], Tensor] = same
        self.activation = ACTIVATIONS[layer.mlp]
        if layer.mlp in GATED:
            self.gate = Linear(hidden, width, bias=bias)
        self.up = Linear(hidden, width, bias=bias)
        self.down = Linear(width, hidden, bias=bias)

    def forward(self, x_BSE: Tensor) -> Tensor:
        run = self.run
        x_BSE = run("mlp.enter", self.enter, x_BSE)
        wide = [run_linear(run, "gate", self.gate, x_BSE)] if self.kind in GATED else []
        wide.append(run_linear(run, "up", self.up, x_BSE))
        inner_BSF = run(self.kind, self.activation, *wide)
        return run("mlp.leave", self.leave, run_linear(run, "down", self.down, inner_BSF))


def make_mlp(hidden: int, layer: Layer) -> Mlp | Moe:
    """The MLP of a layer, or the mixture of experts in its place."""
    if layer.experts is None:
        return Mlp(hidden, layer, layer.ffn_hidden, layer.bias)
    width = layer.experts.shared_ffn_hidden
    return Moe(hidden, layer, Mlp(hidden, layer, width, bias=False) if width else None)


class Block(nn.Module):
    """One decoder layer: pre-norm attention and MLP (or experts), each with a residual."""

    def __init__(self, model: Model, layer: Layer) -> None:
        super().__init__()
        self.run: Run = run_plainly
        self.attention_norm = make_norm(layer, model.hidden, model.norm_eps)
        self.attention = (
            Attention(model, layer)
            if layer.latent is None
            else Latent(model, layer.heads, layer.latent)
        )
        self.mlp_norm = make_norm(layer, model.hidden, model.norm_eps)
        self.mlp = make_mlp(model.hidden, layer)

    def run_by(self, run: Run) -> None:
        """Have every operator of the block run by `run`; experts and latent attention name none."""
        assert isinstance(self.attention, Attention) and isinstance(self.mlp, Mlp)
        self.run = self.attention.run = self.mlp.run = run

    def forward(
        self, x_BSE: Tensor, table: Tensor | None, context: Context | None = None
    ) -> Tensor:
        run = self.run
        normed_BSE = run("attention_norm", self.attention_norm, x_BSE)
        attended_BSE = self.attention(normed_BSE, table, context)
        x_BSE = run("attention_residual", torch.add, x_BSE, attended_BSE)
        del attended_BSE
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
    the logits. S are the tokens of this rank where several share a sequence (`spread`). `documents`
    (B, N) int64, on the host, holds the ends of documents packed into each whole sequence.
    `first_piece` is the piece with the embedding where the same process holds it and the last one,
    so that tied tables are one parameter, that piece's.
    """

    def __init__(
        self, model: Model, first: int, last: int, first_piece: Decoder | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.is_first, self.is_last = first == 0, last == model.num_layers - 1
        self.sequence_shard: tuple[int, int] = (0, 1)
        """(part, parts) of the rank's tokens that hidden states hold between modules."""
        self.spread = Spread()
        """The ranks that share a sequence."""
        self.loss: Callable[[Tensor, Tensor], Tensor] = token_loss
        """Mean loss of logits and targets; tensor parallelism puts its own in place."""
        self.table: Callable[[], Tensor] = lambda: self.embedding.weight
        """The tied table, wherever it is."""
        self.enter: Callable[[Tensor], Tensor] = same
        """What hidden states pass between embedding and layers."""
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
        self.tables: dict[tuple[int, Spread, torch.dtype], Tensor] = {}

    @property
    def rotary_dim(self) -> int:
        """Size of the part of a head that turns with its position."""
        first = self.model.layers[0]
        return first.head_dim if first.latent is None else first.latent.qk_rope_head_dim

    def rotary(self, num_tokens: int, like: Tensor) -> Tensor | None:
        """The rotary table of this rank's tokens, one after the other; made once, in the dtype of
        `like`, and kept."""
        if self.model.positions != "rope":
            return None
        key = (num_tokens, self.spread, like.dtype)
        if key not in self.tables:
            positions = self.spread.places(num_tokens * self.spread.ranks).to(like.device)
            table = rotary_table(positions, self.rotary_dim, self.model.rope_theta).to(like.dtype)
            self.tables = {key: table}
        return self.tables[key]

    def rotary_of_documents(self, positions_BS: Tensor, x_BSE: Tensor) -> Tensor | None:
        """The rotary table (2, B, S, D) of tokens at these places in their documents."""
        if self.model.positions != "rope":
            return None
        table = rotary_table(positions_BS, self.rotary_dim, self.model.rope_theta)
        return table.to(x_BSE.dtype)

    def embed(self, tokens_BS: Tensor, positions: Tensor | None) -> Tensor:
        """Hidden states of tokens, (B, S/parts, E)."""
        x_BSE = self.embedding(tokens_BS)
        if self.model.positions == "learned":
            num_tokens = tokens_BS.shape[1]
            if positions is None:
                positions = self.spread.places(num_tokens * self.spread.ranks).to(x_BSE.device)
            part, parts = self.sequence_shard
            length = num_tokens // parts
            x_BSE = x_BSE + self.positions(positions[..., part * length : (part + 1) * length])
        return x_BSE

    def logits(self, x_BSE: Tensor) -> Tensor:
        """Logits (B, S, V) of the last hidden states."""
        x_BSE = self.norm(x_BSE)
        if self.model.tied_embeddings:
            return self.tied_head(x_BSE, self.table())
        return self.head(x_BSE)

    def forward(
        self, x: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        num_tokens = x.shape[1] * (1 if self.is_first else self.sequence_shard[1])
        borders = None if documents is None else as_borders(documents)
        positions = None if borders is None else self.spread.in_documents(borders).to(x.device)
        if self.is_first:
            x = self.enter(self.embed(x, positions))
        if positions is None:
            table = self.rotary(num_tokens, x)
        else:
            table = self.rotary_of_documents(positions, x)
        context = self.spread.context(borders)
        for block in self.blocks.values():
            x = block(x, table, context)
        if self.is_last:
            x = self.logits(x)
            if targets is not None:
                x = self.loss(x, targets)
        return x


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy per token, in fp32; plain also for logits cut along the vocabulary."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
