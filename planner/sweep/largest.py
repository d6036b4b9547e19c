"""The longest sequences, and the largest decoder, that a cluster can train.

    longest context    max seq_tokens   over multiples of 1,024
    largest model      max num_params   over standard decoders, two digits of parameters
    subject to         a plan fits, as surely as `Conditions.fit` says

What fits is not exactly monotone: degrees divide length, batch, heads and layers. `inverse` says
what is done about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from ...catalogs import load_model
from ...errors import InputError
from .asking import Conditions, ask_each, doubled, last_reason, unless_done, until_time
from .inverse import Neighbours, largest, rounder_above
from .result import Answer, SweepResult
from .rows import Ask, Asker

CONTEXT_STEP = 1024
LEAST_BYTES_PER_PARAM = 2
"""No layout has less than this for a parameter on all devices together: the search ends there."""
LARGEST_MODEL = 1e13


def longest_context(asks: Sequence[Ask], conditions: Conditions) -> SweepResult:
    """The longest sequences that a plan fits for each ask, whose own length is ignored.

    A step keeps the ask's tokens, rounded to whole sequences; one sequence of them all is the
    longest. The length is doubled, bisected, and then the next rounder lengths are asked.

    Raises InputError for a batch below 1,024 tokens, or a model whose sequences have one length.
    """

    def answer(asker: Asker, ask: Ask) -> Answer:
        whole = ask.workload.global_batch_tokens
        most = whole // CONTEXT_STEP
        if most < 1:
            raise InputError("global-batch", f"{whole} tokens", "less than one sequence of "
                             f"{CONTEXT_STEP} tokens", "give a larger batch")  # fmt: skip
        if ask.model.lengths(CONTEXT_STEP) == ask.model.lengths(2 * CONTEXT_STEP):
            raise InputError("model", ask.model.name, "its sequences have one length",
                             "give a model of text")  # fmt: skip

        def longer(count: int) -> Ask:
            length = count * CONTEXT_STEP
            seqs = max(1, round(whole / length))
            work = msgspec.structs.replace(ask.workload, seq_tokens=length, global_batch_seqs=seqs)
            return replace(ask, workload=work)

        coarse = sorted({*(2**k for k in range(most.bit_length())), most})
        index, reason = _greatest(asker, longer, coarse, rounder_above)
        if index is None:
            return Answer(row=None, text=f"no plan fits {CONTEXT_STEP:,} tokens: {reason}")
        row = asker.rows[index]
        text = f"{row.gpus} trains {row.model} on sequences of {row.seq_tokens:,} tokens{reason}"
        if row.seq_tokens == most * CONTEXT_STEP:
            text += "; that is the whole batch: raise --global-batch for more"
        return Answer(row=index, text=text)

    return ask_each("longest-context", asks, answer, conditions)


def largest_model(asks: Sequence[Ask], conditions: Conditions) -> SweepResult:
    """The largest standard decoder that a plan fits for each ask, whose own model is ignored.

    The size is doubled from 20m, bisected, and then the next three sizes are asked.
    """

    def answer(asker: Asker, ask: Ask) -> Answer:
        memory = sum(p.num_devices * p.device.memory_bytes for p in ask.cluster.pools)
        sizes = model_sizes(memory / LEAST_BYTES_PER_PARAM)
        texts = list(sizes)

        def larger(size: int) -> Ask:
            return replace(ask, model=load_model(texts[size]))

        index, reason = _greatest(asker, larger, doubled(list(sizes.values())), None)
        if index is None:
            return Answer(row=None, text=f"no plan fits {texts[0]} parameters: {reason}")
        row = asker.rows[index]
        count = row.model.removeprefix("standard-")
        text = f"{row.gpus} trains a decoder of {count} parameters (--model {count}){reason}"
        return Answer(row=index, text=text)

    return ask_each("largest-model", asks, answer, conditions)


def _greatest(
    asker: Asker,
    asked: Callable[[int], Ask],
    coarse: Sequence[int],
    neighbours: Neighbours | None,
) -> tuple[int | None, str]:
    """The row of the greatest rung with a plan, and what there is to say about it or its lack."""
    seen: dict[int, int] = {}

    def fits(rung: int) -> bool:
        seen[rung] = asker.ask(asked(rung), explain=False)
        return asker.rows[seen[rung]].status == "planned"

    found, stopped = until_time(lambda: largest(fits, coarse, neighbours=neighbours))
    if found is None:
        planned = (r for r, index in seen.items() if asker.rows[index].status == "planned")
        found = max(planned, default=None)
    if found is None:
        return None, last_reason(asker.rows, seen) + unless_done(stopped)
    return seen[found], unless_done(stopped)


def model_sizes(most: float) -> dict[str, float]:
    """Parameter counts of two digits from 20m up to `most` and 10t, at least one, by spelling.

    >>> list(model_sizes(2.3e7)), list(model_sizes(1.1e9))[-3:]
    (['20m', '21m', '22m', '23m'], ['990m', '1b', '1.1b'])
    """
    sizes: dict[str, float] = {}
    for power in range(6):
        for digits in range(20 if power == 0 else 10, 100):
            count = digits * 10**power * 1_000_000
            if count <= min(most, LARGEST_MODEL) or not sizes:
                scale, unit = next((s, u) for s, u in _UNITS if count >= s)
                sizes[f"{count / scale:g}{unit}"] = float(count)
    return sizes


_UNITS = ((10**12, "t"), (10**9, "b"), (10**6, "m"))
