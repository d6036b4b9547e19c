"""What stands before the layers of models other than plain decoders: one input per stack.

Token ids are looked up (`ends.embedding`), images are cut into patches or handed over whole, time
step and class become a conditioning vector. What all layers of a decoder share with its encoder -
the encoder's normed output - is made and kept here as well, since it lives as long as the inputs.
"""

from __future__ import annotations

from dataclasses import replace

from ...ends import takes_patches, takes_tokens
from ...model import Model
from ..graph import Graph, Operator, Tensor
from .encoder import SAMPLE
from .ends import embedding
from .parts import elementwise, linear, norm, part
from .stacks import in_stack


def inputs(model: Model, *, sequence_parallel: bool, fused: bool) -> Graph:
    """All inputs of a model as one graph; stacks have axis labels of their own."""
    ops: list[Operator] = []
    results: list[Tensor] = []

    def take(group: list[Operator], stack: int) -> None:
        placed = in_stack(group, model, stack)
        ops.extend(placed)
        results.append(placed[-1].outputs[0])

    for stack, layer in enumerate(model.stacks):
        if layer.conv is not None:
            take([_image()], stack)
        elif takes_patches(model, stack):
            take(_finished(model, _patches(model), stack, fused), stack)
        elif takes_tokens(model, stack):
            tokens = list(embedding(model, sequence_parallel=sequence_parallel).operators)
            take(_finished(model, tokens, stack, fused), stack)
        if model.relative_buckets:
            take([_relative_bias()], stack)
    if model.conditioning is not None:
        take(_conditioning(model), 0)
    if model.encoder is not None:
        take([_encoder_norm(model.encoder.norm, fused)], 0)
    boundary = ops[0].inputs[0]
    if len(results) > 1:  # handed to the layers together
        ops.append(
            Operator(
                name="inputs",
                kind="edge",
                price_axes=(("one",),),
                inputs=tuple(results),
                outputs=tuple(replace(t, name=f"{t.name}.in") for t in results),
            )
        )
    return Graph(name="embedding", operators=tuple(ops), boundary=boundary)


def _image() -> Operator:
    """An image in the compute dtype, for a first layer of convolutions."""
    x = Tensor(name="image.in", axes=("batch", "area.0", "channels.0"))
    raw = replace(x, name="image", dtype="fp32")
    return replace(elementwise("image", "cast", (raw,), x), grad_inputs=False)


def _patches(model: Model) -> list[Operator]:
    """Patches times the embedding matrix, which tp does not split, behind the extra tokens."""
    patches = model.patches
    assert patches is not None
    tokens = ("batch", "patches")
    image = Tensor(name="image", axes=(*tokens, "pixels"))
    x = Tensor(name="patches.out", axes=(*tokens, "hidden"))
    width = ("hidden",)
    cut = linear("patches", image, x, ("pixels",), width, patches.bias, tokens=tokens)
    ops = [replace(cut, grad_inputs=False)]
    extra = Tensor(name="extra_tokens.weight", axes=("extra_tokens", "hidden"), dtype="param")
    joined = elementwise("tokens", "copy", (x,), part("tokens"))
    ops.append(replace(joined, weights=(extra,)) if patches.extra_tokens else joined)
    if model.positions == "learned":
        ops.append(_table("positions", "positions", ops[-1].outputs[0]))
    return ops


def _table(name: str, rows: str, x: Tensor) -> Operator:
    """Rows of a learned table added to every sample's tokens."""
    table = Tensor(name=f"{name}.weight", axes=(rows, "hidden"), dtype="param")
    return replace(elementwise(name, "add", (x,), part(f"{name}.out")), weights=(table,))


def _finished(model: Model, ops: list[Operator], stack: int, fused: bool) -> list[Operator]:
    """An input with what only the first stack's has: segment types and a norm."""
    if stack:
        return ops
    finished = list(ops)
    if model.token_types:
        finished.append(_table("token_types", "token_types", finished[-1].outputs[0]))
    if model.embedding_norm:
        kind = model.stacks[0].norm
        x, out = finished[-1].outputs[0], part("embedding_norm.out")
        finished.append(norm("embedding_norm", kind, x, out, fused=fused))
    return finished


def _relative_bias() -> Operator:
    """A learned bias per head and distance, for all pairs of tokens; kept for every layer."""
    pairs = ("seq", "seq_whole")
    buckets = Tensor(name="relative.buckets", axes=pairs, dtype="int64")
    bias = Tensor(name="relative.bias", axes=("heads", *pairs))
    table = Tensor(name="relative.weight", axes=("heads", "buckets"), dtype="param")
    return Operator(
        name="relative",
        kind="embedding",
        price_axes=(pairs, ("heads",), ("buckets",)),
        inputs=(buckets,),
        outputs=(bias,),
        saves=(buckets, bias),
        weights=(table,),
        grad_inputs=False,
    )


def _conditioning(model: Model) -> list[Operator]:
    """Features of the time step through two linear layers, plus the class's row."""
    axes = (*SAMPLE, "hidden")
    features = Tensor(name="time", axes=(*SAMPLE, "frequencies"))
    t1, t2, t3 = (Tensor(name=f"time.{n}", axes=axes) for n in ("in", "silu", "out"))
    first = linear("time_in", features, t1, ("frequencies",), ("hidden",), True, tokens=SAMPLE)
    ops = [
        replace(first, grad_inputs=False),
        elementwise("time_silu", "silu", (t1,), t2, saves=(t1,)),
        linear("time_out", t2, t3, ("hidden",), ("hidden",), True, tokens=SAMPLE),
    ]
    if model.conditioning is not None and model.conditioning.num_classes:
        label = Tensor(name="class", axes=SAMPLE, dtype="int64")
        row, vector = (Tensor(name=n, axes=axes) for n in ("class.row", "conditioning"))
        table = Tensor(name="class.weight", axes=("condition_classes", "hidden"), dtype="param")
        look_up = Operator(
            name="class",
            kind="embedding",
            price_axes=(SAMPLE, ("hidden",), ("condition_classes",)),
            inputs=(label,),
            outputs=(row,),
            saves=(label,),
            weights=(table,),
            grad_inputs=False,
        )
        ops += [look_up, elementwise("conditioning", "add", (t3, row), vector)]
    return ops


def _encoder_norm(kind: str, fused: bool) -> Operator:
    """The norm that ends an encoder; its output stays for the cross-attention of every layer."""
    x, out = part("encoder.out"), part("source")
    op = norm("encoder_norm", kind, x, out, fused=fused)
    return replace(op, saves=(*op.saves, out))
