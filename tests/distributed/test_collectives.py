"""What each layout communicates in one step, counted: no collective more than its definition asks.

Expected counts follow from the definitions: per unit (block, rest) of FSDP, per block of tensor
parallelism, per micro-batch of a pipeline. `n` is the number of micro-batches.
"""

from __future__ import annotations

import families
import pytest
from families import BATCH, LLAMA, SEQ, VOCAB
from selections import Group, cases

from forerun.costmodel import estimate

L, E = LLAMA.num_layers, LLAMA.hidden
BLOCK = 4 * LLAMA.layers[0].num_params(E)
REST = 4 * LLAMA.num_params - L * BLOCK
WHOLE = 4 * LLAMA.num_params
HIDDEN, TOKENS = BATCH * SEQ * E * 4, BATCH * SEQ * 4
"""Bytes of hidden states, and of one fp32 number per token, of the whole batch."""
NORMS = 4 * E * (2 * L + 1)
TP_PAIRS = 4 * L + 2
"""Two in forward and two in backward per block, one for the embedding, one for the head."""
TABLE = 4 * VOCAB * E
Calls = dict[tuple[str, str, int], int]


def units(kind: str, blocks: int, rest: int, scale: float = 1.0) -> Calls:
    return {(kind, "dp", int(BLOCK * scale)): L * blocks, (kind, "dp", int(REST * scale)): rest}


EXPECTED: list[tuple[int, str, Calls]] = [
    (1, "bf16", {}),
    (2, "ddp accumulation", {("all_reduce", "dp", WHOLE): 1}),
    (2, "zero1", units("all_gather", 1, 1) | units("reduce_scatter", 1, 1)),
    (2, "zero2", units("all_gather", 1, 1) | units("reduce_scatter", 2, 2)),
    (2, "zero3", units("all_gather", 4, 2) | units("reduce_scatter", 2, 2)),
    (2, "zero3 recompute full", units("all_gather", 2, 1) | units("reduce_scatter", 1, 1)),
    (2, "bf16 ddp", units("all_reduce", 1, 1)),
    (2, "bf16 zero3", units("all_gather", 2, 1, 0.5) | units("reduce_scatter", 1, 1)),
    (2, "tp", {("all_reduce", "tp", HIDDEN): TP_PAIRS, ("all_reduce", "tp", TOKENS): 3}),
    (
        2,
        "tp-sp",
        {
            ("all_gather", "tp", HIDDEN): TP_PAIRS,
            ("reduce_scatter", "tp", HIDDEN): TP_PAIRS,
            ("all_reduce", "tp", TOKENS): 3,
            ("all_reduce", "tp", NORMS): 1,
        },
    ),
    (  # n = 4; recomputation enters twice per block and leaves once, after attention
        2,
        "tp-sp full accumulation",
        {
            ("all_gather", "tp", HIDDEN // 4): 4 * (TP_PAIRS + 2 * L),
            ("reduce_scatter", "tp", HIDDEN // 4): 4 * (TP_PAIRS + L),
            ("all_reduce", "tp", TOKENS // 4): 4 * 3,
            ("all_reduce", "tp", NORMS): 1,
        },
    ),
    (2, "gpipe", {("send", "pp", HIDDEN // 4): 4}),
    (2, "1f1b", {("send", "pp", HIDDEN // 4): 4}),
    (2, "interleaved", {("send", "pp", HIDDEN // 4): 4 * 3}),
    (2, "zb-h1", {("send", "pp", HIDDEN // 4): 4}),
    (2, "zb-v", {("send", "pp", HIDDEN // 4): 4 * 2}),
    (2, "dualpipev", {("send", "pp", HIDDEN // 4): 4 * 2}),
    (
        2,
        "clip zero3",
        units("all_gather", 2, 1) | units("reduce_scatter", 1, 1) | {("all_reduce", "dp", 4): 1},
    ),
    (
        4,
        "hsdp zero3",
        units("all_gather", 4, 2) | units("reduce_scatter", 2, 2) | units("all_reduce", 1, 1, 0.5),
    ),
]


@pytest.mark.parametrize(("world", "family", "expected"), EXPECTED)
def test_collectives_of_a_step(group: Group, world: int, family: str, expected: Calls) -> None:
    assert group(world, "quick")[0]["llama", family]["collectives"] == expected


@pytest.mark.parametrize(
    ("selection", "world", "model", "family"), cases(families.names, (2, 4, 8))
)
def test_predicted_bytes_are_those_counted(
    group: Group, selection: str, world: int, model: str, family: str
) -> None:
    counted: dict[str, float] = {}
    for rank in group(world, selection):
        for name, size in rank[model, family]["bytes_on_wire"].items():
            counted[name] = counted.get(name, 0.0) + size / world
    predicted = estimate(families.plan_of(world, model, family)).bytes_on_wire
    assert predicted == pytest.approx(counted)


def test_tied_tables_are_summed_once_between_first_and_last_stage(group: Group) -> None:
    for rank in group(2, "quick"):
        calls = rank["gpt", "1f1b"]["collectives"]
        assert calls == {("send", "pp", HIDDEN // 4): 4, ("all_reduce", "pp", TABLE): 1}
    assert families.GPT.tied_embeddings
