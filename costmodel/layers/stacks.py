"""Axis labels of models with several stacks: an encoder and a decoder, or two towers.

Inputs and heads work on all stacks in one graph, where lengths and widths differ. There the labels
of stack k carry its number ("seq.k"); inside a layer they do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ...ends import diffusion_outputs, num_positions
from ...model import Layer, Model
from ..graph import Axes, Collective, Operator, Sizes, Tensor
from .convolution import block_sizes

OWN = ("seq", "seq_part", "seq_whole", "hidden", "heads", "positions")
"""Labels whose sizes differ between stacks."""
SHARED = ("embedding.weight",)
"""Tensors that the stacks have in common."""


def in_stack(operators: Iterable[Operator], model: Model, stack: int) -> list[Operator]:
    """Operators with the labels and names of a stack; unchanged in a model of one stack."""
    if len(model.stacks) == 1:
        return list(operators)

    def label(axes: Axes) -> Axes:
        return tuple(f"{axis}.{stack}" if axis in OWN else axis for axis in axes)

    def tensor(t: Tensor) -> Tensor:
        name = t.name if t.name in SHARED else f"{t.name}.{stack}"
        return replace(t, name=name, axes=label(t.axes))

    def tensors(ts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(tensor, ts))

    def collectives(cs: tuple[Collective, ...]) -> tuple[Collective, ...]:
        return tuple(replace(c, buffer=tensor(c.buffer)) for c in cs)

    return [
        replace(
            op,
            name=f"{op.name}.{stack}",
            price_axes=tuple(map(label, op.price_axes)),
            inputs=tensors(op.inputs),
            outputs=tensors(op.outputs),
            saves=tensors(op.saves),
            weights=tensors(op.weights),
            forward_collectives=collectives(op.forward_collectives),
            backward_collectives=collectives(op.backward_collectives),
        )
        for op in operators
    ]


def stack_sizes(model: Model, layer: Layer, each: list[Sizes]) -> Sizes:
    """Sizes of the labels that plain decoders do not have.

    `each` holds the sizes of the last layer of every stack, of the layer's own stack among them.
    """
    own = each[layer.stack]
    one = np.ones_like(own["batch"])
    hidden = float(model.width(layer))
    patches, conditioning = model.patches, model.conditioning
    numbers = {
        "positions": num_positions(model, layer.stack),
        "patches": patches.num_patches if patches else 0,
        "pixels": patches.pixels if patches else 0,
        "extra_tokens": patches.extra_tokens if patches else 0,
        "diffusion_outputs": diffusion_outputs(model),
        "frequencies": conditioning.frequencies if conditioning else 0,
        "condition_classes": conditioning.num_classes if conditioning else 0,
        "modulation": 6 * hidden,
        "head_modulation": 2 * hidden,
        "token_types": model.token_types,
        "buckets": model.relative_buckets,
        "classes": model.num_classes,
        "projection": model.projection,
        **(block_sizes(layer.conv) if layer.conv is not None else {}),
    }
    sizes = {name: number * one for name, number in numbers.items()}
    sizes["predicted"] = model.head_share * own["seq"]
    sizes["predicted_part"] = model.head_share * own["seq_part"]
    if model.encoder is not None:
        sizes |= {f"{name}_source": each[0][name] for name in ("seq", "hidden")}
        sizes["seq_source_part"] = each[0]["seq_part"]
    if len(each) > 1:
        for stack, theirs in enumerate(each):
            positions = {"positions": num_positions(model, stack) * one}
            sizes |= {f"{name}.{stack}": {**theirs, **positions}[name] for name in OWN}
    return sizes
