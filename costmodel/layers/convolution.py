"""A block of convolutions as a graph: each with its batch norm and ReLU, a shortcut, a pool.

Axis labels: "area.i" and "channels.i" of the tensor before the i-th convolution of the path (the
last after it), "taps.i" its inputs per output value, "area.pooled" behind the pool. Only "batch"
is ever divided.
"""

from __future__ import annotations

from dataclasses import replace

from ...model import Layer, Model
from ...vision import ConvBlock, Convolution
from ..graph import Axes, Graph, Operator, Tensor
from .parts import elementwise


def conv_layer(model: Model, layer: Layer) -> Graph:
    """The convolutions of a layer; the model's first take an image, which needs no gradient."""
    block = layer.conv
    assert block is not None
    x = _features("x", block, 0)
    ops: list[Operator] = []
    y = x
    for index, convolution in enumerate(block.path):
        out = _features(f"conv{index}.out", block, index + 1)
        ops += _convolved(f"conv{index}", convolution, y, out, f"taps.{index}")
        y = ops[-1].outputs[0]
    if block.residual:
        y = _residual(block, x, y, ops)
    if block.pool > 1:
        _pool(y, ops)
    # the block's output is the next one's input, which keeps it
    kept = tuple(t for t in ops[-1].saves if t not in ops[-1].outputs)
    ops[-1] = replace(ops[-1], saves=kept)
    if layer == model.layers[0]:
        ops[0] = replace(ops[0], kind="conv_stem", grad_inputs=False)
    return Graph(name="layer", operators=tuple(ops), boundary=x)


def block_sizes(block: ConvBlock) -> dict[str, float]:
    """The sizes of a block's axis labels."""
    convolutions = block.path
    channels = (block.in_channels, *(c.out_channels for c in convolutions))
    sizes: dict[str, float] = {}
    for index, (size, width) in enumerate(zip(block.sizes, channels, strict=True)):
        sizes |= {f"area.{index}": size**2, f"channels.{index}": width}
    for index, convolution in enumerate(convolutions):
        sizes[f"taps.{index}"] = convolution.taps
    if block.shortcut is not None:
        sizes["taps.shortcut"] = block.shortcut.taps
    sizes["area.pooled"] = (-(-block.sizes[-1] // block.pool)) ** 2
    return {name: float(size) for name, size in sizes.items()}


def output_axes(block: ConvBlock) -> Axes:
    """The axes of a block's output."""
    last = len(block.path)
    return ("batch", "area.pooled" if block.pool > 1 else f"area.{last}", f"channels.{last}")


def _features(name: str, block: ConvBlock, index: int) -> Tensor:
    return Tensor(name=name, axes=("batch", f"area.{index}", f"channels.{index}"))


def _convolved(
    name: str, convolution: Convolution, x: Tensor, out: Tensor, taps: str
) -> list[Operator]:
    """A convolution, priced as the GEMM (pixels, channels, taps) that reads `x` once."""
    width = out.axes[-1:]
    weights = [Tensor(name=f"{name}.weight", axes=(*width, taps), dtype="param")]
    if convolution.bias:
        weights.append(Tensor(name=f"{name}.bias", axes=width, dtype="param"))
    ops = [
        Operator(
            name=name,
            kind="conv",
            price_axes=(out.axes[:-1], width, (taps,), x.axes),
            inputs=(x,),
            outputs=(out,),
            saves=(x,),
            weights=tuple(weights),
        )
    ]
    if convolution.norm:
        ops.append(_batch_norm(f"{name}.norm", ops[-1].outputs[0]))
    if convolution.relu:
        ops.append(_relu(f"{name}.relu", ops[-1].outputs[0]))
    return ops


def _batch_norm(name: str, x: Tensor) -> Operator:
    """Batch norm over the samples of one rank's micro-batch."""
    width = x.axes[-1:]
    statistics = tuple(
        Tensor(name=f"{name}.{n}", axes=width, dtype="fp32") for n in ("mean", "rstd")
    )
    op = elementwise(
        name, "batchnorm", (x,), replace(x, name=f"{name}.out"), saves=(x, *statistics)
    )
    return replace(
        op,
        weights=tuple(
            Tensor(name=f"{name}.{n}", axes=width, dtype="param") for n in ("weight", "bias")
        ),
    )


def _relu(name: str, x: Tensor) -> Operator:
    out = replace(x, name=f"{name}.out")
    return elementwise(name, "relu", (x,), out, saves=(out,))


def _residual(block: ConvBlock, x: Tensor, y: Tensor, ops: list[Operator]) -> Tensor:
    """Adds the input, or its shortcut, to `y`."""
    skip = x
    if block.shortcut is not None:
        out = replace(y, name="shortcut.out")
        ops += _convolved("shortcut", block.shortcut, x, out, "taps.shortcut")
        skip = ops[-1].outputs[0]
    total = replace(y, name="sum")
    ops += [elementwise("residual", "add", (y, skip), total), _relu("residual.relu", total)]
    return ops[-1].outputs[0]


def _pool(x: Tensor, ops: list[Operator]) -> None:
    """A max pool, which keeps the place of each maximum; priced by what it reads."""
    axes = (x.axes[0], "area.pooled", x.axes[-1])
    out = Tensor(name="pool.out", axes=axes)
    places = Tensor(name="pool.places", axes=axes, dtype="int64")
    op = elementwise("pool", "max_pool", (x,), out, saves=(x, places))
    ops.append(replace(op, price_axes=(x.axes,)))
