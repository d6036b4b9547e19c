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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...experts import Experts
from ...kernels.fp8_cast import E4M3, E5M2, cast, pack_groups, unpack_groups
from ..adamw_fp8 import AdamWFp8
from ..decoder import token_loss
from ..experts.grouped import GroupedLinear, Groups
from ..experts.routing import route
from ..experts.rows import Permute, Unpermute, sorted_places
from ..rotary import rotary_table, rotate
from ..tiers import make_tier
from ..torch_compat import scaled_matmul
from .timing import Buffers, Call, Clock, Ring

Sizes = tuple[int, ...]
BUILD_S = 0.05
"""Time to spend at most on building the graphs whose backward is measured."""


@dataclass(frozen=True, slots=True)
class Case:
    """An operator at one size; calls rotate over their buffers."""

    forward: Call
    backward: Callable[[], Call] | None = None
    """Builds the graphs and returns the call: built only after forward has been timed."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One operator: its size axes, how to prepare it, and its relative work at a size."""

    axes: tuple[str, ...]
    prepare: Callable[[Buffers, Sizes], Case]
    work: Callable[[Sizes], float]
    """Proportional to the time of large sizes; to skip those that would take too long."""

    engine: bool = True
    """Whether backward goes through autograd's engine (a linear's is two plain GEMMs)."""


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _through_autograd(
    function: Callable[..., Tensor],
    warm: tuple[Tensor, ...],
    rotating: list[tuple[Tensor, ...]],
    buffers: Buffers,
) -> Case:
    """Forward on warm inputs into a ring; backward of graphs over the rotating inputs."""
    if buffers.runtime == "compiled":
        function = torch.compile(function, dynamic=False)
    out = function(*warm)
    # An output keeps its graph alive: some three tensors of the size of the largest input.
    held = buffers.copies(3 * max(out.numel(), *(tensor.numel() for tensor in warm)))
    ring = Ring([torch.empty_like(out) for _ in range(held)])
    grad_out = torch.ones_like(out)

    def forward() -> None:
        ring.push(function(*warm))

    def build_backward() -> Call:
        ring.outputs.clear()
        graphs: list[tuple[Tensor, list[Tensor]]] = []
        deadline = time.perf_counter() + BUILD_S
        for inputs in rotating[:held]:
            graphs.append((function(*inputs), [t for t in inputs if t.requires_grad]))
            if len(graphs) >= 2 and time.perf_counter() > deadline:
                break
        turn = itertools.cycle(graphs)

        def backward() -> None:
            result, leaves = next(turn)
            torch.autograd.grad(result, leaves, grad_out, retain_graph=True)

        return backward

    return Case(forward, build_backward)


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
    places = _leaves(buffers.rotating(*shape, count=count))
    triples = list(zip(places[::3], places[1::3], places[2::3], strict=True))
    return _through_autograd(core, triples[0], triples, buffers)


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
    asking = _leaves(buffers.rotating(batch, queries, heads, head_dim, count=count))
    given = _leaves(buffers.rotating(batch, keys, heads, head_dim, count=2 * count))
    triples = list(zip(asking, given[::2], given[1::2], strict=False))
    return _through_autograd(core, triples[0], triples, buffers)


def _norm(kind: type[nn.Module]) -> Callable[[Buffers, Sizes], Case]:
    def prepare(buffers: Buffers, sizes: Sizes) -> Case:
        rows, width = sizes
        module = kind(width, device=buffers.device, dtype=buffers.dtype)
        weights = tuple(module.parameters())
        inputs = _leaves(buffers.rotating(rows, width))

        def function(x: Tensor, *_weights: Tensor) -> Tensor:
            return module(x)

        rotating = [(x, *weights) for x in inputs]
        return _through_autograd(function, rotating[0], rotating, buffers)

    return prepare


def _elementwise(
    function: Callable[..., Tensor], num_inputs: int
) -> Callable[[Buffers, Sizes], Case]:
    def prepare(buffers: Buffers, sizes: Sizes) -> Case:
        places = _leaves(buffers.rotating(*sizes))
        if num_inputs == 1:
            rotating = [(x,) for x in places]
        else:
            rotating = list(zip(places, places[1:] + places[:1], strict=True))
        return _through_autograd(function, rotating[0], rotating, buffers)

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
    rotating = [(x,) for x in _leaves(buffers.rotating(*shape))]
    return _through_autograd(lambda x: rotate(x, table), rotating[0], rotating, buffers)


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

    return _through_autograd(function, (table,), [(table,), (table,)], buffers)


def _cross_entropy(buffers: Buffers, sizes: Sizes) -> Case:
    """The loss on logits in the compute dtype; its gradient starts as a scalar."""
    tokens, vocab = sizes
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, min(vocab, 256), (1, tokens), generator=generator)
    targets = targets.to(buffers.device)
    rotating = [(x,) for x in _leaves(buffers.rotating(1, tokens, vocab))]
    return _through_autograd(lambda x: token_loss(x, targets), rotating[0], rotating, buffers)


def _grouped_linear(buffers: Buffers, sizes: Sizes) -> Case:
    """The matmuls of several experts on equally many rows each; weights and inputs are cold."""
    rows, width_out, width_in, num_groups = sizes
    each = rows // num_groups
    layer = GroupedLinear(num_groups, width_in, width_out)
    groups = Groups(torch.full((num_groups,), each, device=buffers.device), [each] * num_groups)
    inputs = _leaves(buffers.rotating(each * num_groups, width_in))
    weights = _leaves(buffers.rotating(num_groups, width_out, width_in))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight}, (x, groups))

    count = min(len(inputs), len(weights))
    rotating = [(inputs[i], weights[i]) for i in range(count)]
    return _through_autograd(function, rotating[0], rotating, buffers)


def _choices(buffers: Buffers, tokens: int, copies: int) -> Tensor:
    """Experts that tokens would choose: twice as many experts as copies, evenly drawn."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, 2 * copies, generator=generator)
    return scores.topk(copies, dim=1).indices.to(buffers.device)


def _routing(buffers: Buffers, sizes: Sizes) -> Case:
    """Scores and the two largest of them; no more than there are."""
    tokens, num_experts = sizes
    spec = Experts(num_experts=num_experts, top_k=min(2, num_experts), ffn_hidden=1)
    rotating = [(x,) for x in _leaves(buffers.rotating(tokens, num_experts))]
    return _through_autograd(lambda x: route(x, spec).weights_TK, rotating[0], rotating, buffers)


ROW = 128
"""Width of the rows that are permuted: the kinds are priced by elements."""


def _permute(buffers: Buffers, sizes: Sizes) -> Case:
    """Sorting the choices, and tokens as rows in that order."""
    elements, copies = sizes
    tokens = elements // ROW
    chosen = _choices(buffers, tokens, copies)

    def function(x: Tensor) -> Tensor:
        places = sorted_places(chosen, 2 * copies)
        out: Any = Permute.apply(x, places.token_R, places.row_TK, False)
        return out

    rotating = [(x,) for x in _leaves(buffers.rotating(tokens, ROW))]
    return _through_autograd(function, rotating[0], rotating, buffers)


def _unpermute(buffers: Buffers, sizes: Sizes) -> Case:
    """The weighted sum of each token's rows; backward gives the weights' gradient, too."""
    elements, copies = sizes
    tokens = elements // ROW
    row_TK = sorted_places(_choices(buffers, tokens, copies), 2 * copies).row_TK
    weights_TK = torch.full((tokens, copies), 0.5, device=buffers.device, requires_grad=True)

    def function(x: Tensor, weights: Tensor) -> Tensor:
        out: Any = Unpermute.apply(x, weights, row_TK, False)
        return out

    rotating = [(x, weights_TK) for x in _leaves(buffers.rotating(tokens * copies, ROW))]
    return _through_autograd(function, rotating[0], rotating, buffers)


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


def _adamw_fp8(buffers: Buffers, sizes: Sizes) -> Case:
    """AdamW with moments in 8 bits, on matrices of 256 columns."""
    elements, tensors = sizes
    rows = max(1, elements // tensors // COLUMNS)
    count = max(1, min(6, buffers.cold_bytes // (10 * elements)))
    optimizers: list[torch.optim.Optimizer] = []
    for _ in range(count):
        params = [
            nn.Parameter(torch.zeros(rows, COLUMNS, device=buffers.device)) for _ in range(tensors)
        ]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizers.append(AdamWFp8(params, lr=1e-6))
        optimizers[-1].step()  # makes the states
    turn = itertools.cycle(optimizers)
    return Case(lambda: next(turn).step())


COLUMNS = 256
"""Width of the matrices that are cast."""


def _matrices(buffers: Buffers, elements: int) -> Iterator[Tensor]:
    columns = min(COLUMNS, elements)
    return itertools.cycle(buffers.rotating(elements // columns, columns))


def _quantize(buffers: Buffers, sizes: Sizes) -> Case:
    """The cast of a matmul's input; as backward that of an output's gradient. In both orders on a
    GPU, where matmuls want them."""
    inputs, both = _matrices(buffers, sizes[0]), buffers.device.type == "cuda"
    return Case(
        lambda: _drop(cast(next(inputs), E4M3, transposed=both)),
        lambda: lambda: _drop(cast(next(inputs), E5M2, transposed=both)),
    )


def _quantize_weight(buffers: Buffers, sizes: Sizes) -> Case:
    """The cast of a weight; as backward in the other order, its scale known."""
    weights = _matrices(buffers, sizes[0])
    scale = torch.ones((), device=buffers.device)
    on_cuda = buffers.device.type == "cuda"
    return Case(
        lambda: _drop(cast(next(weights), E4M3)),
        lambda: (
            lambda: _drop(cast(next(weights), E4M3, scale, plain=not on_cuda, transposed=on_cuda))
        ),
    )


def _quantize_store(buffers: Buffers, sizes: Sizes) -> Case:
    """Activations to 8 bits with scales by group, and back."""
    inputs = _matrices(buffers, sizes[0])
    packed = [pack_groups(next(inputs)) for _ in range(2)]
    turn = itertools.cycle(packed)
    return Case(
        lambda: _drop(pack_groups(next(inputs))),
        lambda: lambda: _drop(unpack_groups(*next(turn), buffers.dtype)),
    )


def _drop(_: object) -> None:
    """A result that nobody keeps."""


def _low_linear(buffers: Buffers, sizes: Sizes) -> Case:
    """x W^T on 8-bit operands; backward = the input's gradient, whose operands are as long."""
    m, n, k = sizes
    return Case(
        _low_matmul(buffers, m, n, k, fast=True),
        lambda: _low_matmul(buffers, m, k, n, fast=False),
    )


def _low_linear_wgrad(buffers: Buffers, sizes: Sizes) -> Case:
    """g^T x on 8-bit operands, both turned."""
    m, n, k = sizes
    return Case(_low_matmul(buffers, n, k, m, fast=False))


def _low_matmul(buffers: Buffers, rows: int, columns: int, inner: int, *, fast: bool) -> Call:
    a = cast(buffers.take(rows, inner), E4M3)
    others = [cast(b, E4M3) for b in buffers.rotating(columns, inner)]
    turn = itertools.cycle([b.codes_MK for b in others])
    assert a.codes_MK is not None
    codes, scale = a.codes_MK, a.scale

    def call() -> None:
        b = next(turn)
        assert b is not None
        scaled_matmul(codes, b, scale, buffers.dtype, fast=fast)

    return call


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
        ("rows", "out", "in", "groups"), _grouped_linear, lambda s: float(s[0] * s[1] * s[2])
    ),
    "routing": Bench(("tokens", "experts"), _routing, _volume),
    "permute": Bench(("elements", "copies"), _permute, _volume),
    "unpermute": Bench(("elements", "copies"), _unpermute, _volume),
    "adamw": Bench(("elements", "tensors"), _adamw, lambda sizes: float(sizes[0])),
    "adamw_fp8": Bench(("elements", "tensors"), _adamw_fp8, lambda sizes: float(sizes[0])),
    "quantize": Bench(ELEMENTS, _quantize, _volume, engine=False),
    "quantize_weight": Bench(ELEMENTS, _quantize_weight, _volume, engine=False),
    "quantize_store": Bench(ELEMENTS, _quantize_store, _volume, engine=False),
    "copy_h2d": Bench(ELEMENTS, _tier_copy("host", True), _volume),
    "copy_d2h": Bench(ELEMENTS, _tier_copy("host", False), _volume),
    "copy_from_disk": Bench(ELEMENTS, _tier_copy("disk", True), _volume),
    "copy_to_disk": Bench(ELEMENTS, _tier_copy("disk", False), _volume),
}

LOW_BENCHES: dict[str, Bench] = {
    "linear": Bench(("m", "n", "k"), _low_linear, _volume, engine=False),
    "linear_wgrad": Bench(("m", "n", "k"), _low_linear_wgrad, _volume, engine=False),
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
