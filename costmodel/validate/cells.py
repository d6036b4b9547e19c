"""Values for the cells that a row leaves empty: those of sibling rows, or the few usual ones.

Siblings are rows of the same source, model and hardware that state the cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...errors import InputError
from ...stack import Stack
from .table import Row

FILLED = ("micro_batch_seqs", "vpp", "zero_stage", "recompute")
"""Cells that siblings may fill; tp and pp follow from the number of devices."""
LADDER = ("none", "selective", "elementwise", "full")
"""Recomputation from the fastest mode to the one that needs least memory."""
SHARES = (0.25, 0.5, 0.75)
"""Parts of the layers that recompute everything: fewer than all may do."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
UNKNOWN_BATCH_ROUNDS = 4
"""Micro-batches per pipeline stage where the global batch is not stated: assumed."""
OWN_CHUNKS = 2
"""Chunks without layers that a published pipeline may count: embedding and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to read a row's layout cells; `filled` names those that were searched."""

    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    vpp: int
    zero: int
    micro_batch_seqs: int
    global_batch_seqs: int
    filled: tuple[str, ...]

    @property
    def micro_batches(self) -> float:
        """Micro-batches per replica and step; the last one may be a fraction."""
        return self.global_batch_seqs / self.dp / self.micro_batch_seqs


class Siblings:
    """The values of each cell among rows of the same source, model and hardware.

    Chunks per pipeline rank go with the pipeline: siblings with the same pp count before others.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._values: dict[tuple[str, ...], set[int | str]] = {}
        for row in rows:
            for cell in FILLED:
                value = getattr(row, cell)
                if value is None or (cell == "vpp" and (row.pp or 1) == 1):
                    continue
                for key in (_key(row, cell), (*_key(row, cell), f"pp={row.pp}")):
                    self._values.setdefault(key, set()).add(value)

    def values(self, row: Row, cell: str, pp: int | None = None) -> list[int | str]:
        """What siblings of a row have in a cell, sorted; of those with that pp if there are any."""
        key = _key(row, cell)
        near = self._values.get((*key, f"pp={pp}")) if pp is not None else None
        return sorted(near or self._values.get(key, ()), key=str)


def _key(row: Row, cell: str) -> tuple[str, ...]:
    return (row.source.lower(), row.model.lower(), row.hardware.lower(), cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """How layers recompute: in a mode, or a share of them in it and the others in a lighter one."""

    mode: str
    share: float = 1.0
    lighter: str = "none"

    def __str__(self) -> str:
        return self.mode if self.share == 1.0 else f"{self.mode} of {self.share:.0%} of the layers"


def recompute_ladder(
    row: Row, siblings: Siblings, stack: Stack
) -> tuple[tuple[Recompute, ...], bool]:
    """What to try, the fastest first, and whether the cell was empty.

    Megatron and its kin can recompute a share of the layers; recipes that shard as FSDP wrap all.
    A cell that the row or its stack gives reason to doubt is as good as empty.
    """
    doubted = row.attention_kernel.startswith("none") and row.says("unknown for the baseline")
    doubted |= stack.doubts_recompute
    if row.recompute is not None and not doubted:
        return (Recompute(mode=row.recompute),), False
    stated = [] if doubted else siblings.values(row, "recompute")
    modes = tuple(mode for mode in LADDER if mode in stated) or LADDER
    ladder: list[Recompute] = []
    for lighter, mode in pairwise(("", *modes)):
        if mode == "full" and lighter and stack.sharding == "megatron":
            ladder += [Recompute(mode=mode, share=share, lighter=lighter) for share in SHARES]
        ladder.append(Recompute(mode=mode))
    return tuple(ladder), True


def layouts(row: Row, siblings: Siblings, num_layers: int, stack: Stack | None) -> list[Layout]:
    """Every reading of a row's layout cells; raises InputError when there is none.

    `stack` is the row's where its source names one.
    """
    result: list[Layout] = []
    for dp, tp, pp in _degrees(row, num_layers):
        for vpp in _vpp(row, siblings, num_layers, pp):
            zeros = _zero(row, tp * pp > 1, dp, siblings, stack)
            for zero in zeros:
                for micro, batch in _batches(row, siblings, dp, pp, stack):
                    cells = {"tp": tp, "pp": pp, "vpp": vpp, "micro_batch_seqs": micro,
                             "global_batch_seqs": batch}  # fmt: skip
                    if len(zeros) > 1:  # otherwise the layout or the siblings leave no choice
                        cells["zero_stage"] = zero
                    result.append(
                        Layout(
                            dp=dp, tp=tp, pp=pp, cp=row.cp or 1, ep=row.ep or 1, vpp=vpp,
                            zero=zero, micro_batch_seqs=micro, global_batch_seqs=batch,
                            filled=tuple(_filled(row, cells, pp)),
                        )
                    )  # fmt: skip
    legal = [r for r in result if r.vpp == 1 or r.micro_batches % r.pp == 0]
    return legal or result


def _filled(row: Row, cells: dict[str, int], pp: int) -> Iterator[str]:
    """Cells that had to be chosen; vpp without a pipeline is no choice."""
    for cell, value in cells.items():
        if getattr(row, cell) is None and not (cell == "vpp" and pp == 1):
            yield f"{cell}={value}"


def _degrees(row: Row, num_layers: int) -> list[tuple[int, int, int]]:
    """(dp, tp, pp) that multiply with cp to the devices; what is empty takes powers of two."""
    cp = row.cp or 1
    found: list[tuple[int, int, int]] = []
    for tp in _one_or_powers(row.tp, min(row.gpus, row.gpus_per_node or 8)):
        for pp in _one_or_powers(row.pp, min(row.gpus, num_layers)):
            rest, left = divmod(row.gpus, tp * pp * cp)
            dp = row.dp or rest
            if left == 0 and dp >= 1 and dp * tp * pp * cp == row.gpus and pp <= num_layers:
                found.append((dp, tp, pp))
    if not found:
        shown = " * ".join(
            f"{name}={getattr(row, name) or '(empty)'}" for name in ("dp", "tp", "pp", "cp")
        )
        raise InputError("degrees", shown,
                         f"no way to {row.gpus} devices with {num_layers} layers",
                         "correct a degree or gpus")  # fmt: skip
    return found


def _one_or_powers(stated: int | None, most: int) -> Sequence[int]:
    if stated is not None:
        return (stated,)
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _vpp(row: Row, siblings: Siblings, num_layers: int, pp: int) -> Sequence[int]:
    """Chunks per pipeline rank: as stated, or equal ones where the cell is empty.

    Embedding and head may have been chunks of their own, two more than there are layers; here they
    belong to the first and last chunk, so that a rank has as many as its layers allow.
    """
    most = num_layers // pp
    if row.vpp is not None:
        if pp > 1 and pp * row.vpp > num_layers + OWN_CHUNKS:
            raise InputError("vpp", row.vpp, f"pp={pp} leaves {most} layers per rank",
                             "correct vpp or pp")  # fmt: skip
        return (min(row.vpp, most) if pp > 1 else 1,)
    if pp == 1:
        return (1,)
    least = min(2, most) if row.says("interleaved") else 1
    stated = [int(v) for v in siblings.values(row, "vpp", pp) if least <= int(v) <= most]
    even = [v for v in range(least, most + 1) if num_layers % (pp * v) == 0]
    return stated or even or [least]


def _zero(
    row: Row, model_parallel: bool, dp: int, siblings: Siblings, stack: Stack | None
) -> Sequence[int]:
    if row.zero_stage is not None:
        return (row.zero_stage,)
    if dp == 1:
        return (0,)
    stated = [int(v) for v in siblings.values(row, "zero_stage")]
    if stated:
        return stated
    if stack is not None and stack.zero_stage is not None:
        return (stack.zero_stage,)
    whole_parameters = model_parallel if stack is None else stack.sharding == "megatron"
    if whole_parameters:
        return (1,) if model_parallel else (0, 1)
    return (0, 1, 3)


def _batches(
    row: Row, siblings: Siblings, dp: int, pp: int, stack: Stack | None
) -> list[tuple[int, int]]:
    """(micro-batch, global batch) in sequences."""
    batch = row.global_batch_seqs
    if batch is not None and batch < dp:
        raise InputError("global_batch_seqs", batch, f"fewer sequences than dp={dp} replicas",
                         "correct the batch or dp")  # fmt: skip
    each = MICRO_BATCHES[-1] if batch is None else batch // dp
    doubted = row.says("assumes no gradient accumulation")
    if row.micro_batch_seqs is not None and not doubted:
        micros = [min(row.micro_batch_seqs, -(-batch // dp)) if batch else row.micro_batch_seqs]
    else:
        others = [] if doubted else siblings.values(row, "micro_batch_seqs")
        stated = [int(v) for v in others if int(v) <= each]
        if not stated and pp > 1 and stack is not None and stack.pipeline_rounds is not None:
            by_itself, left = divmod(each, pp * stack.pipeline_rounds)
            stated = [by_itself] if by_itself and not left else []
        whole = [n for n in MICRO_BATCHES if n <= each and each % n == 0]
        micros = sorted(stated) or whole
    if batch is not None:
        return [(micro, batch) for micro in micros]
    rounds = UNKNOWN_BATCH_ROUNDS * pp if pp > 1 else 1
    return [(micro, micro * dp * rounds) for micro in micros]
