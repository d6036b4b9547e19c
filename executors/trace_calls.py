"""Recorded operators as the cost model knows them: losses, backwards, FLOPs."""

from __future__ import annotations

from collections.abc import Iterable

from . import aten
from .recorder import Call, Recorder

OWN_BACKWARD = frozenset({"gelu", "layernorm", "embedding", "attention", "attention_full"})
"""Kinds that bring their backward along, which is not recorded beside them."""


def merge_losses(recorder: Recorder) -> None:
    """Log-softmax and the negative log-likelihood of it as one cross-entropy.

    Its first saved tensor is the log-softmax, its output the loss.
    """
    made = {call.outputs[-1]: call for call in recorder.calls if call.name == "_log_softmax"}
    kept: list[Call] = []
    for call in recorder.calls:
        source = next((made[i] for i in call.inputs if i in made), None)
        if call.name.startswith("nll_loss") and source is not None and source.kind == "copy":
            log_softmax = source.outputs[-1]
            elements = recorder.storages[log_softmax].nbytes // 4
            vocab = recorder.log_softmax_widths[log_softmax]
            source.kind, source.sizes = "cross_entropy", (elements // vocab, vocab)
            others = [i for i in (*source.saves, *call.saves) if i != log_softmax]
            source.saves = list(dict.fromkeys([log_softmax, *others]))
            source.outputs = [call.outputs[-1]]
            source.backward = []
            continue
        kept.append(call)
    recorder.calls = kept


def settle_backward(call: Call, recorder: Recorder) -> None:
    """Keep of the recorded backward what the kind does not bring along."""
    if call.kind in OWN_BACKWARD or call.kind == "cross_entropy":
        call.backward = []
    if call.kind != aten.MATMUL:
        return
    work = _product(call.sizes)
    matmuls = [w for w in call.backward if w[0] == aten.MATMUL]
    if len(matmuls) == 2 and all(_product(w[1]) == work for w in matmuls) and call.weights:
        call.kind = "linear"
        call.backward = [w for w in call.backward if w[0] != aten.MATMUL]


def call_flops(call: Call) -> int:
    """FLOPs of an operator and its backward."""
    backward = sum(2 * _product(sizes) for kind, sizes in call.backward if kind == aten.MATMUL)
    if call.kind == "attention":
        heads, seq, size = call.sizes
        return 7 * heads * seq * seq * size
    factor = {"linear": 6, aten.MATMUL: 2, "attention_full": 14}.get(call.kind, 0)
    return factor * _product(call.sizes) + backward


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
