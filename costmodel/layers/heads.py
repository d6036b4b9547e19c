"""What stands behind the layers of models other than plain decoders: heads and their losses."""

from __future__ import annotations

from dataclasses import replace

from ...model import Model
from ..graph import Axes, Graph, Operator, Tensor
from . import ends
from .convolution import output_axes
from .encoder import SAMPLE, modulate, modulation
from .parts import PART, elementwise, enter, linear, norm, part
from .stacks import in_stack


def head(model: Model, *, sequence_parallel: bool, fused: bool) -> Graph:
    """The head of a model, loss included."""
    match model.head:
        case "lm":
            return ends.head(model, sequence_parallel=sequence_parallel, fused=fused)
        case "mlm":
            ops = _masked(model, sequence_parallel, fused)
        case "classifier":
            ops = _classifier(model, fused)
        case "projection":
            ops = _comparison(model, fused)
        case "diffusion":
            ops = _diffusion(model, fused)
    return Graph(name="head", operators=tuple(ops), boundary=ops[0].inputs[0])


def _loss(logits: Tensor) -> Operator:
    """Softmax cross entropy over the last axis, which is whole on every rank."""
    return Operator(
        name="loss",
        kind="cross_entropy",
        price_axes=(logits.axes[:-1], logits.axes[-1:]),
        inputs=(logits,),
        outputs=(Tensor(name="loss", axes=("one",), dtype="fp32"),),
        saves=(Tensor(name="log_softmax", axes=logits.axes, dtype="fp32"),),
    )


def _masked(model: Model, sp: bool, fused: bool) -> list[Operator]:
    """The masked tokens through a linear layer, GELU and norm, to scores over the vocabulary."""
    rows: Axes = ("batch", "predicted_part")
    x = part("x")
    picked, up, act, n = (
        Tensor(name=f"predicted.{t}", axes=(*rows, "hidden")) for t in ("in", "up", "act", "out")
    )
    gathered = Tensor(name="head.in", axes=("batch", "predicted", "hidden"))
    plain = ends.head(model, sequence_parallel=sp, fused=fused).operators
    width: Axes = ("hidden",)
    return [
        elementwise("predicted", "copy", (x,), picked),
        linear("predicted.linear", picked, up, width, width, True, tokens=rows),
        elementwise("predicted.gelu", "gelu", (up,), act, saves=(up,)),
        norm("predicted.norm", model.layers[-1].norm, act, n, fused=fused),
        enter("head.enter", n, gathered, sp),
        *(_over_predicted(op, gathered) for op in plain if op.name in ("head", "loss")),
    ]


def _over_predicted(op: Operator, x: Tensor) -> Operator:
    """The output matmul (with a bias) or the loss of an lm head, over the predicted tokens."""

    def axes(old: Axes) -> Axes:
        return tuple("predicted" if axis == "seq" else axis for axis in old)

    def tensors(old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if t.name == x.name else replace(t, axes=axes(t.axes)) for t in old)

    bias = Tensor(name="head.bias", axes=("vocab",), dtype="param")
    return replace(
        op,
        price_axes=tuple(map(axes, op.price_axes)),
        inputs=tensors(op.inputs),
        outputs=tensors(op.outputs),
        saves=tensors(op.saves),
        weights=(*op.weights, bias) if op.name == "head" else op.weights,
        forward_collectives=tuple(
            replace(c, buffer=replace(c.buffer, axes=axes(c.buffer.axes)))
            for c in op.forward_collectives
        ),
    )


def _pooled(x: Tensor) -> Operator:
    """One vector per sample: the mean over tokens or pixels, or one token; priced by its input."""
    out = Tensor(name="pooled", axes=(*SAMPLE, "hidden"))
    return replace(elementwise("pooling", "pool", (x,), out), price_axes=(x.axes,))


def _normed_pooled(kind: str, fused: bool) -> list[Operator]:
    n = part("norm.out")
    return [norm("norm", kind, part("x"), n, fused=fused), _pooled(n)]


def _classifier(model: Model, fused: bool) -> list[Operator]:
    """One vector per sample to a score per class; tp does not split it."""
    last = model.layers[-1]
    if last.conv is not None:
        x = Tensor(name="x", axes=output_axes(last.conv))
        ops = [replace(_pooled(x), saves=(x,))]  # the last block's ReLU needs it
    else:
        ops = _normed_pooled(last.norm, fused)
    logits = Tensor(name="logits", axes=(*SAMPLE, "classes"))
    pooled = ops[-1].outputs[0]
    scores = linear("head", pooled, logits, ("hidden",), ("classes",), True, tokens=SAMPLE)
    return [*ops, scores, _loss(logits)]


def _comparison(model: Model, fused: bool) -> list[Operator]:
    """Each stack's vector in a common space, every sample compared with those of all replicas.

    Radford et al. 2021, figure 3. The exchange of the vectors between replicas is left out: a few
    kilobytes per sample.
    """
    ops: list[Operator] = []
    vectors: list[Tensor] = []
    for stack, layer in enumerate(model.stacks):
        group = _normed_pooled(layer.norm, fused)
        out = Tensor(name="projected", axes=(*SAMPLE, "projection"))
        pooled = group[-1].outputs[0]
        group.append(
            linear("projection", pooled, out, ("hidden",), ("projection",), False, tokens=SAMPLE)
        )
        placed = in_stack(group, model, stack)
        ops += placed
        vectors.append(placed[-1].outputs[0])
    logits = Tensor(name="logits", axes=(*SAMPLE, "compared"))
    temperature = Tensor(name="temperature", axes=("one",), dtype="param")
    ops.append(
        Operator(
            name="compare",
            kind="linear_scores",
            price_axes=(SAMPLE, ("compared",), ("projection",)),
            inputs=tuple(vectors),
            outputs=(logits,),
            saves=tuple(vectors),
            weights=(temperature,),
        )
    )
    return [*ops, _loss(logits)]


def _diffusion(model: Model, fused: bool) -> list[Operator]:
    """A modulated norm, then mean and variance of each value of a patch; squared error."""
    factors, ops = modulation("head_modulation", "head_modulation")
    x, n = part("x"), part("norm.out")
    ops += modulate(norm("norm", model.layers[-1].norm, x, n, fused=fused), factors)
    prediction = Tensor(name="prediction", axes=(*PART, "diffusion_outputs"))
    target = replace(prediction, name="target")
    ops.append(
        linear("head", n, prediction, ("hidden",), ("diffusion_outputs",), True, tokens=PART)
    )
    loss = Tensor(name="loss", axes=("one",), dtype="fp32")
    error = elementwise("loss", "squared_error", (prediction,), loss, saves=(prediction, target))
    return [*ops, replace(error, price_axes=(prediction.axes,))]
