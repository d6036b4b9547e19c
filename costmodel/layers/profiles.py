"""The pieces of models other than plain decoders: which graph each of them is."""

from __future__ import annotations

from ...model import Layer, Model
from ..graph import Graph
from ..options import Options
from .convolution import conv_layer
from .decoder import decoder_layer
from .encoder import cross_decoder_layer, encoder_layer
from .heads import head
from .inputs import inputs


def stack_graph(
    build: str, model: Model, layer: Layer, *, sp: bool, fused: bool, options: Options
) -> Graph:
    """The graph of a piece: "embedding", "head", or any other word for the layer."""
    if build == "embedding":
        return inputs(model, sequence_parallel=sp, fused=fused)
    if build == "head":
        return head(model, sequence_parallel=sp, fused=fused)
    if layer.conv is not None:
        return conv_layer(model, layer)
    kinds = {"encoder": encoder_layer, "cross_decoder": cross_decoder_layer}
    expand = kinds.get(layer.kind, decoder_layer)
    return expand(model, layer, sequence_parallel=sp, fused=fused, options=options)
