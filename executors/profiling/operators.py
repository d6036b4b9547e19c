"""The operators of a decoder's step, each as a call that can be timed on a CPU or a GPU.

An operator is prepared for one point of its size grid as one or two calls: `forward`, and
`backward` where it has one. Backward is autograd's own: graphs are built beforehand over rotating
inputs (their saved tensors are as cold as in a step), and the cost of starting autograd's engine,
which a real backward pays once and not per operator, is measured and taken off.

Size axes are those of the cost model's operators of the same names.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoder import token_loss
from ..rotary import rotary_table, rotate
from ..tiers import make_tier
from .cases import Bench, Case, Sizes, leaves, through_autograd
from .expert_operators import grouped_linear, permute, routing, unpermute
from .low_operators import (
    adamw_fp8,
    low_linear,
    low_linear_wgrad,
    quantize,
    quantize_store,
    quantize_weight,
)
from .timing import Buffers, Clock


def _linear(buffers: Buffers, sizes: Sizes) -> Case:
    """Forward x W^T into a ring with rotating weights; backward = gradient of the input, g W."""
    m, n, k = sizes
    x, g = buffers.take(m, k), buffers.take(m, n, index=1)
    weights = itertools.cycle(buffers.rotating(n, k))
    ring = buffers.ring(m, n)

    def forward() -> None:
        ring.push(F.linear(x, next(weights)))

    return Case(forward, lambda: lambda: torch.mm(g, next(weights)))


def _linear_wgrad(buffers: Buffers, sizes: Sizes) -> Case:
    """g^T x: the input is a saved activation (cold), the gradient just came (warm)."""
    m, n, k = sizes
    g = buffers.take(m, n)
    inputs = itertools.cycle(buffers.rotating(m, k))
    ring = buffers.ring(n, k)
    return Case(lambda: ring.push(torch.mm(g.t(), next(inputs))))


def _attention(buffers: Buffers, sizes: Sizes) -> Case:
    """Causal attention on (B, S, H, D) transposed to (B, H, S, D), as the decoder calls it."""
    batch_heads, seq, head_dim = sizes
    heads = next(h for h in (4, 2, 1) if batch_heads % h == 0)
    shape = (batch_heads // heads, seq, heads, head_dim)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        ).transpose(1, 2)

    count = 3 * max(2, buffers.copies(batch_heads * seq * head_dim) // 3)
    places = leaves(buffers.rotating(*shape, count=count))
    triples = list(zip(places[::3], places[1::3], places[2::3], strict=True))
    return through_autograd(core, triples[0], triples, buffers)


def _attention_full(buffers: Buffers, sizes: Sizes) -> Case:
    """Attention of some queries on all of some keys, of which there may be more or fewer."""
    batch_heads, queries, head_dim, keys = sizes
    heads = next(h for h in (4, 2, 1) if batch_heads % h == 0)
    batch = batch_heads // heads

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)

    count = max(2, buffers.copies(batch_heads * (queries + 2 * keys) * head_dim))
    asking = leaves(buffers.rotating(batch, queries, heads, head_dim, count=count))
    given = leaves(buffers.rotating(batch, keys, heads, head_dim, count=2 * count))
    triples = list(zip(asking, given[::2], given[1::2], strict=False))
    return through_autograd(core, triples[0], triples, buffers)


def _norm(kind: type[nn.Module]) -> Callable[[Buffers, Sizes], Case]:
    def prepare(buffers: Buffers, sizes: Sizes) -> Case:
        rows, width = sizes
        module = kind(width, device=buffers.device, dtype=buffers.dtype)
        weights = tuple(module.parameters())
        inputs = leaves(buffers.rotating(rows, width))

        def function(x: Tensor, *_weights: Tensor) -> Tensor:
            return module(x)

        rotating = [(x, *weights) for x in inputs]
        return through_autograd(function, rotating[0], rotating, buffers)

    return prepare


def _elementwise(
    function: Callable[..., Tensor], num_inputs: int
) -> Callable[[Buffers, Sizes], Case]:
    def prepare(buffers: Buffers, sizes: Sizes) -> Case:
        places = leaves(buffers.rotating(*sizes))
        if num_inputs == 1:
            rotating = [(x,) for x in places]
        else:
            rotating = list(zip(places, places[1:] + places[:1], strict=True))
        return through_autograd(function, rotating[0], rotating, buffers)

    return prepare


def rope_shape(elements: int) -> tuple[int, int, int, int]:
    """A (B, S, H, D) with about that many elements, as a small decoder would have."""
    head_dim, heads = (64, 4) if elements >= 4096 else (16, 2)
    seq = max(1, min(256, elements // (heads * head_dim)))
    return max(1, elements // (seq * heads * head_dim)), seq, heads, head_dim


def _rope(buffers: Buffers, sizes: Sizes) -> Case:
    shape = rope_shape(sizes[0])
    positions = torch.arange(shape[1], device=buffers.device)
    table = rotary_table(positions, shape[3], 10000.0).to(buffers.dtype)
    rotating = [(x,) for x in leaves(buffers.rotating(*shape))]
    return through_autograd(lambda x: rotate(x, table), rotating[0], rotating, buffers)


def _add(buffers: Buffers, sizes: Sizes) -> Case:
    """Residual: the branch just came (warm), the stream is older (cold); out of place."""
    branch = buffers.take(*sizes)
    streams = itertools.cycle(buffers.rotating(*sizes))
    ring = buffers.ring(*sizes)
    return Case(lambda: ring.push(next(streams) + branch))


def _accumulate(buffers: Buffers, sizes: Sizes) -> Case:
    """p.grad += g: the sum is cold, the new gradient warm; values stay bounded."""
    new = torch.zeros_like(buffers.take(*sizes))
    count = min(8, buffers.copies(new.numel()))
    sums = itertools.cycle([torch.zeros_like(new) for _ in range(count)])
    return Case(lambda: next(sums).add_(new))


def _copy(buffers: Buffers, sizes: Sizes) -> Case:
    """A contiguous copy between two cold buffers of the dtype."""
    sources = itertools.cycle(buffers.rotating(*sizes))
    count = min(8, buffers.copies(sizes[0]))
    targets = itertools.cycle(
        [torch.zeros(sizes, device=buffers.device, dtype=buffers.dtype) for _ in range(count)]
    )
    return Case(lambda: next(targets).copy_(next(sources)))


def _cast(buffers: Buffers, sizes: Sizes) -> Case:
    """fp32 to bf16 (from a profile of bf16) or bf16 to fp32 (from one of fp32)."""
    other = torch.bfloat16 if buffers.dtype == torch.float32 else torch.float32
    count = min(8, buffers.copies(2 * sizes[0]))
    sources = itertools.cycle([buffers.take(*sizes, index=i).to(other) for i in range(count)])
    ring = buffers.ring(*sizes)
    return Case(lambda: ring.push(next(sources).to(buffers.dtype)))


def _embedding(buffers: Buffers, sizes: Sizes) -> Case:
    """Look-up of byte tokens; backward makes the dense gradient of the whole table."""
    tokens, hidden, vocab = sizes
    table = buffers.take(vocab, hidden).detach().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    high = min(vocab, 256)
    ids = torch.randint(0, high, (tokens,), generator=generator).to(buffers.device)

    def function(weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    return through_autograd(function, (table,), [(table,), (table,)], buffers)


def _cross_entropy(buffers: Buffers, sizes: Sizes) -> Case:
    """The loss on logits in the compute dtype; its gradient starts as a scalar."""
    tokens, vocab = sizes
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, min(vocab, 256), (1, tokens), generator=generator)
    targets = targets.to(buffers.device)
    rotating = [(x,) for x in leaves(buffers.rotating(1, tokens, vocab))]
    return through_autograd(lambda x: token_loss(x, targets), rotating[0], rotating, buffers)


def _adamw(buffers: Buffers, sizes: Sizes) -> Case:
    """Fused AdamW on `elements` fp32 parameters in `tensors` tensors, states cold where large."""
    elements, tensors = sizes
    each = max(1, elements // tensors)
    count = max(1, min(6, buffers.cold_bytes // (16 * elements)))
    optimizers: list[torch.optim.Optimizer] = []
    for _ in range(count):
        params = [nn.Parameter(torch.zeros(each, device=buffers.device)) for _ in range(tensors)]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizers.append(torch.optim.AdamW(params, lr=1e-6, fused=True))
        optimizers[-1].step()  # makes the states
    turn = itertools.cycle(optimizers)
    return Case(lambda: next(turn).step())


def _tier_copy(tier_name: str, to_device: bool) -> Callable[[Buffers, Sizes], Case]:
    """A copy between the device and a tier of offload, of tensors that are cold."""

    def prepare(buffers: Buffers, sizes: Sizes) -> Case:
        tier = make_tier(tier_name, buffers.device, folder=Path(tempfile.gettempdir()))
        tensors = buffers.rotating(*sizes)
        num_bytes = tensors[0].numel() * tensors[0].element_size()
        count = min(4, max(2, buffers.cold_bytes // num_bytes))
        made = [tier.make(num_bytes) for _ in range(count)]
        for place in made:  # its pages are there from then on
            tier.write(place, 0, tensors[0])
        places = itertools.cycle(made)
        device = itertools.cycle(tensors)
        if to_device:
            targets = itertools.cycle([torch.empty_like(tensors[0]) for _ in range(count)])
            return Case(lambda: tier.read(next(places), 0, next(targets)))
        return Case(lambda: tier.write(next(places), 0, next(device)))

    return prepare


def _volume(sizes: Sizes) -> float:
    total = 1.0
    for size in sizes:
        total *= size
    return total


def _attention_work(sizes: Sizes) -> float:
    return float(sizes[0] * sizes[1] ** 2 * sizes[2])


def _embedding_work(sizes: Sizes) -> float:
    return float((sizes[0] + sizes[2]) * sizes[1])


ROWS = ("rows", "width")
ELEMENTS = ("elements",)

BENCHES: dict[str, Bench] = {
    "linear": Bench(("m", "n", "k"), _linear, _volume, engine=False),
    "linear_wgrad": Bench(("m", "n", "k"), _linear_wgrad, _volume),
    "attention": Bench(("batch_heads", "seq", "head_dim"), _attention, _attention_work),
    "attention_full": Bench(
        ("batch_heads", "queries", "head_dim", "keys"), _attention_full, _volume
    ),
    "rmsnorm": Bench(ROWS, _norm(nn.RMSNorm), _volume),
    "layernorm": Bench(ROWS, _norm(nn.LayerNorm), _volume),
    "swiglu": Bench(ELEMENTS, _elementwise(lambda g, u: F.silu(g) * u, 2), _volume),
    "gelu": Bench(ELEMENTS, _elementwise(F.gelu, 1), _volume),
    "squared_relu": Bench(ELEMENTS, _elementwise(lambda x: F.relu(x).square(), 1), _volume),
    "rope": Bench(ELEMENTS, _rope, _volume),
    "add": Bench(ELEMENTS, _add, _volume),
    "accumulate": Bench(ELEMENTS, _accumulate, _volume),
    "copy": Bench(ELEMENTS, _copy, _volume),
    "cast": Bench(ELEMENTS, _cast, _volume),
    "embedding": Bench(("tokens", "hidden", "vocab"), _embedding, _embedding_work),
    "cross_entropy": Bench(("tokens", "vocab"), _cross_entropy, _volume),
    "grouped_linear": Bench(
        ("rows", "out", "in", "groups"), grouped_linear, lambda s: float(s[0] * s[1] * s[2])
    ),
    "routing": Bench(("tokens", "experts"), routing, _volume),
    "permute": Bench(("elements", "copies"), permute, _volume),
    "unpermute": Bench(("elements", "copies"), unpermute, _volume),
    "adamw": Bench(("elements", "tensors"), _adamw, lambda sizes: float(sizes[0])),
    "adamw_fp8": Bench(("elements", "tensors"), adamw_fp8, lambda sizes: float(sizes[0])),
    "quantize": Bench(ELEMENTS, quantize, _volume, engine=False),
    "quantize_weight": Bench(ELEMENTS, quantize_weight, _volume, engine=False),
    "quantize_store": Bench(ELEMENTS, quantize_store, _volume, engine=False),
    "copy_h2d": Bench(ELEMENTS, _tier_copy("host", True), _volume),
    "copy_d2h": Bench(ELEMENTS, _tier_copy("host", False), _volume),
    "copy_from_disk": Bench(ELEMENTS, _tier_copy("disk", True), _volume),
    "copy_to_disk": Bench(ELEMENTS, _tier_copy("disk", False), _volume),
}

LOW_BENCHES: dict[str, Bench] = {
    "linear": Bench(("m", "n", "k"), low_linear, _volume, engine=False),
    "linear_wgrad": Bench(("m", "n", "k"), low_linear_wgrad, _volume, engine=False),
}
"""Operators on 8-bit operands."""


def benches(dtype: str) -> dict[str, Bench]:
    """The operators of a phase."""
    return LOW_BENCHES if dtype == "fp8" else BENCHES


def engine_start_s(clock: Clock, device: torch.device) -> float:
    """Seconds that one `torch.autograd.grad` call costs beside the operators that it runs."""
    x = torch.ones(1, device=device, requires_grad=True)
    y, g = x.view(1), torch.ones(1, device=device)
    samples = clock.samples(lambda: torch.autograd.grad(y, x, g, retain_graph=True), 0.02)
    return sorted(samples)[len(samples) // 4]
