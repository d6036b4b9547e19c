"""Multi-head latent attention: queries, keys and values expanded from low-rank projections.

Keys have a part of their own per head and a rotary part that all heads share. The operators are
those of `costmodel/layers/latent.py`, one for one. Under tensor parallelism the projections down to
the ranks stay whole; what enters the cut ones are the low-rank tensors (`enter`), and what leaves
is the output (`leave`).

Shape suffixes as in `decoder.py`; L a low rank, R the size of the rotary part, N that of a head's
own part.

Source: DeepSeek-AI 2024, DeepSeek-V2 (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import LatentAttention, Model
from .context_parallel import Context
from .linear import Linear
from .rotary import rotate


def unchanged(x: Tensor) -> Tensor:
    """What enters matmuls that nothing divides."""
    return x


def latent_core(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSV: Tensor) -> Tensor:
    """Causal attention (B, H, S, V) of queries and keys of another head size than values.

    The CPU's fused kernel wants one size: the smaller is filled up with zeros, which change no
    score and are cut off again.
    """
    size, wanted = q_BHSD.shape[-1], v_BHSV.shape[-1]
    if size == wanted or q_BHSD.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSV, is_causal=True)
    width = max(size, wanted)
    q_BHSD, k_BHSD = F.pad(q_BHSD, (0, width - size)), F.pad(k_BHSD, (0, width - size))
    v_BHSV = F.pad(v_BHSV, (0, width - wanted))
    out = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSV, is_causal=True, scale=size**-0.5)
    return out[..., :wanted]


class Latent(nn.Module):
    """Causal self-attention through low ranks; takes the place of `Attention`."""

    def __init__(self, model: Model, heads: int, latent: LatentAttention) -> None:
        super().__init__()
        self.nope, self.rope = latent.qk_nope_head_dim, latent.qk_rope_head_dim
        self.values, self.rank = latent.v_head_dim, latent.kv_lora_rank
        self.core: Callable[[Tensor, Tensor, Tensor], Tensor] = latent_core
        self.enter: Callable[[Tensor], Tensor] = unchanged
        self.leave: Callable[[Tensor], Tensor] = unchanged
        hidden, eps, q_rank = model.hidden, model.norm_eps, latent.q_lora_rank
        q_width = heads * (self.nope + self.rope)
        self.q_a: Linear | None = None
        if q_rank is None:
            self.wq = Linear(hidden, q_width, bias=False)
        else:
            self.q_a = Linear(hidden, q_rank, bias=False)
            self.q_a_norm = nn.RMSNorm(q_rank, eps=eps)
            self.q_b = Linear(q_rank, q_width, bias=False)
        self.kv_a = Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_a_norm = nn.RMSNorm(self.rank, eps=eps)
        self.kv_b = Linear(self.rank, heads * (self.nope + self.values), bias=False)
        self.wo = Linear(heads * self.values, hidden, bias=False)

    def queries(self, x_BSE: Tensor) -> Tensor:
        """(B, S, H, N + R), before rotation."""
        if self.q_a is None:
            flat = self.wq(self.enter(x_BSE))
        else:
            flat = self.q_b(self.enter(self.q_a_norm(self.q_a(x_BSE))))
        return flat.unflatten(-1, (-1, self.nope + self.rope))

    def forward(
        self, x_BSE: Tensor, table_2SR: Tensor | None, context: Context | None = None
    ) -> Tensor:
        assert context is None, "sequences neither shared nor packed (`support.py`)"
        q_BSHD = self.queries(x_BSE)
        low_BSL, shared_BSR = self.kv_a(x_BSE).split((self.rank, self.rope), dim=-1)
        kv_BSHK = self.kv_b(self.enter(self.kv_a_norm(low_BSL)))
        kv_BSHK = kv_BSHK.unflatten(-1, (-1, self.nope + self.values))
        shared_BS1R = self.enter(shared_BSR).unsqueeze(2)
        if table_2SR is not None:
            own, turned = q_BSHD.split((self.nope, self.rope), dim=-1)
            q_BSHD = torch.cat((own, rotate(turned, table_2SR)), dim=-1)
            shared_BS1R = rotate(shared_BS1R, table_2SR)
        own_BSHN, v_BSHV = kv_BSHK.split((self.nope, self.values), dim=-1)
        shared_BSHR = shared_BS1R.expand(*own_BSHN.shape[:-1], self.rope)
        k_BSHD = torch.cat((own_BSHN, shared_BSHR), dim=-1)
        v_BSHV = v_BSHV.contiguous()
        out = self.core(q_BSHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHV.transpose(1, 2))
        return self.leave(self.wo(out.transpose(1, 2).flatten(-2)))
