"""What stands before and after the layers: embedding, and head with loss."""

from __future__ import annotations

from dataclasses import replace

from ...model import Model
from ..graph import Collective, Graph, Operator, Tensor
from .parts import TOKENS, elementwise, enter, leave, linear, norm, part, whole


def embedding(model: Model, *, sequence_parallel: bool) -> Graph:
    """Token embedding (vocabulary split by tp) and learned positions."""
    ids = Tensor(name="ids", axes=TOKENS, dtype="int64")
    e, x = whole("embedding.partial"), part("embedding.out")
    table = Tensor(name="embedding.weight", axes=("vocab", "hidden"), dtype="param")
    ops = [
        Operator(
            name="embedding",
            kind="embedding",
            price_axes=(TOKENS, ("hidden",), ("vocab",)),
            inputs=(ids,),
            outputs=(e,),
            saves=(ids,),
            weights=(table,),
            grad_inputs=False,
        ),
        leave("embedding.leave", e, x, sequence_parallel),
    ]
    if model.positions == "learned":
        positions = Tensor(name="positions.weight", axes=("positions", "hidden"), dtype="param")
        op = elementwise("positions", "add", (x,), part("positions.out"))
        ops.append(replace(op, weights=(positions,)))
    return Graph(name="embedding", operators=tuple(ops), boundary=ids)


def head(model: Model, *, sequence_parallel: bool, fused: bool) -> Graph:
    """Final norm, output head (vocabulary split by tp) and the loss."""
    x, n, ng = part("x"), part("norm.out"), whole("head.in")
    logits = Tensor(name="logits", axes=(*TOKENS, "vocab"))
    loss = Tensor(name="loss", axes=("one",), dtype="fp32")
    log_softmax = Tensor(name="log_softmax", axes=logits.axes, dtype="fp32")
    stat = Tensor(name="loss.stat", axes=TOKENS, dtype="fp32")
    reduce = Collective(kind="all_reduce", axis="tp", buffer=stat)
    projection = linear("head", ng, logits, ("hidden",), ("vocab",), False)
    if model.tied_embeddings:
        table = Tensor(name="embedding.weight", axes=("vocab", "hidden"), dtype="param")
        projection = replace(projection, weights=(table,))
    ops = (
        norm("norm", model.layers[-1].norm, x, n, fused=fused),
        enter("head.enter", n, ng, sequence_parallel),
        projection,
        Operator(
            name="loss",
            kind="cross_entropy",
            price_axes=(TOKENS, ("vocab",)),
            inputs=(logits,),
            outputs=(loss,),
            saves=(log_softmax,),
            forward_collectives=(reduce, reduce, reduce),
        ),
    )
    return Graph(name="head", operators=ops, boundary=x)
