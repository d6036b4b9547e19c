"""All pieces of a model under many layouts, priced once for all plans that share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from ..model import Layer, Model
from .host_times import hiding
from .layout import Layouts, local_sizes
from .options import Options
from .packing import packing_sizes
from .piece_costs import piece_of
from .piece_graphs import GraphOf, graph_of, nearby
from .pieces import Piece, Pieces, chosen
from .prices import Prices
from .techniques import local_axes
from .traced_pieces import traced_pieces

Known = dict[bytes, Piece]
"""Pieces by all that they depend on: plans of one model share most of theirs."""


def pieces(
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
    by_layer: Sequence[Options] | None = None,
    known: Known | None = None,
) -> Pieces:
    """The costs of every piece of a model under each layout.

    `options` are those of the whole, `by_layer` those of each of `model.layers` where they differ.
    What is in `known` is taken from there, what is not is added.
    """
    each = tuple(by_layer or (options,) * len(model.layers))
    if model.traced is not None:
        return traced_pieces(model, layouts, prices, options, each)
    here: dict[tuple[str, Layer, Options], Piece] = {}

    def one(build: str, layer: Layer, options: Options) -> Piece:
        place = (build, nearby(model, layer)[1], options)
        if place not in here:
            here[place] = _priced(build, layer, model, layouts, seq_tokens, prices, options, known)
        return here[place]

    first, last = model.layers[0], model.layers[-1]
    table = model.vocab * model.hidden / layouts.tp
    if options.runtime == "compiled" and not prices.pool.stack.compiles_ends:
        options = replace(options, runtime="eager")
    found = Pieces(
        embedding=one("embedding", first, options),
        layers=tuple(one("layer", x, own) for x, own in zip(model.layers, each, strict=True)),
        head=one("head", last, options),
        tied_params=table if model.tied_embeddings else 0.0 * table,
    )
    return replace(found, head=hiding(found.head, model, [found.layers], prices))


def pieces_of_each(
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    policies: Sequence[Options],
    known: Known | None = None,
) -> list[Pieces]:
    """`pieces` under each of several options that differ in what layers keep for backward: the ends
    of the model, which keep all, are the same."""
    first = pieces(model, layouts, seq_tokens, prices, policies[0], None, known)
    if len(policies) == 1:
        return [first]
    others = [
        pieces(model, layouts, seq_tokens, prices, own, None, known).layers
        if model.traced is not None
        else tuple(
            _priced("layer", layer, model, layouts, seq_tokens, prices, own, known)
            for layer in model.layers
        )
        for own in policies[1:]
    ]
    every = [first.layers, *others]
    head = first.head if model.traced is not None else hiding(first.head, model, every, prices)
    return [replace(first, layers=layers, head=head) for layers in every]


def _priced(
    build: str,
    layer: Layer,
    model: Model,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
    known: Known | None,
) -> Piece:
    """A piece, out of those that are known; how it is updated is no matter."""
    near, layer = nearby(model, layer)
    options = replace(options, optimizer="adamw", clips=False)
    if known is None or prices.profile is not None:  # curves depend on the whole mesh
        return _both(build, near, layer, layouts, seq_tokens, prices, options)
    key = _key(build, near, layer, layouts, seq_tokens, prices, options)
    if key not in known:
        known[key] = _both(build, near, layer, layouts, seq_tokens, prices, options)
    return known[key]


def _both(
    build: str,
    near: Model,
    layer: Layer,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> Piece:
    """A piece under layouts with a split sequence and without."""
    sizes = local_axes(local_sizes(near, layer, layouts, seq_tokens), options)
    sizes = {**sizes, **packing_sizes(options.packing, options.cp_kind, layouts)}
    variants: list[Piece] = []
    for sp in np.unique(layouts.sequence_parallel):
        plain = replace(options, packing=None)  # which changes no operator
        graph = graph_of(GraphOf.on(prices.pool, build, near, layer, plain, bool(sp)))
        variants.append(piece_of(graph, sizes, layouts, prices, options, bool(sp)))
    if len(variants) == 1:
        return variants[0]
    return chosen(layouts.sequence_parallel > 0, variants[1], variants[0])


def _key(
    build: str,
    near: Model,
    layer: Layer,
    layouts: Layouts,
    seq_tokens: int,
    prices: Prices,
    options: Options,
) -> bytes:
    """All that a piece depends on without a profile: not pp, the number of nodes, nor, but for
    losses and counts over all samples and packed documents, dp."""
    degrees = [
        layouts.micro_batch_seqs, layouts.tp, layouts.cp, layouts.ulysses, layouts.ep,
        layouts.expert_tp, layouts.sequence_parallel, layouts.zero,
    ]  # fmt: skip
    over_samples = options.packing is not None or options.balance_loss == "global-batch"
    if not near.is_decoder or over_samples:
        degrees.append(layouts.replicas)
    if options.packing is not None:
        degrees += [layouts.num_microbatches, layouts.pp]
    pool = msgspec.structs.replace(prices.pool, num_nodes=1)
    local = [degree.tolist() for degree in degrees]
    return msgspec.json.encode((build, near, layer, local, seq_tokens, pool, options))
