"""What the user typed for a sweep: lists with commas, durations, amounts, one question at most."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .jobs import NEEDED, Job, is_traced, read_job
from .log import say
from .pins import search_pins

if TYPE_CHECKING:
    from ..cluster import Cluster
    from ..planner import Pins
    from ..planner.sweep import Ask
    from ..workload import Workload

QUESTIONS = ("fewest-gpus", "longest-context", "largest-model", "cheapest")
LISTS = ("model", "gpus", "seq_len", "global_batch")
STAND_IN = {"model": "20m", "seq_len": "1"}
"""Read in place of what the question is about; replaced before anything is planned."""
SEARCHED = {"longest-context": "seq_len", "largest-model": "model"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|s|h|d|w)", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbgt]?)(?:tok)?", re.IGNORECASE)
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse_duration(text: str, field: str) -> float:
    """Seconds.

    >>> parse_duration("30d", "deadline"), parse_duration("1.5h", "deadline")
    (2592000.0, 5400.0)
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not float(match[1]) > 0:
        raise InputError(field, text, "not a duration", "write 30d, 12h, 45min, 5s or 300ms")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_amount(text: str, field: str) -> float:
    """A positive number of tokens; units are decimal.

    >>> parse_amount("15T", "tokens"), parse_amount("2.5e6", "tokens")
    (15000000000000.0, 2500000.0)
    """
    match = _AMOUNT.fullmatch(text.strip())
    value = float(match[1]) * _SCALE[match[2].lower()] if match else 0.0
    if not 0 < value < math.inf:
        raise InputError(field, text, "not a number of tokens", "write 15T, 300B or 2.5e12")
    return value


def split_list(text: str, field: str) -> list[str]:
    """The parts of a list with commas, each once.

    >>> split_list("8k, 32k,8k", "seq-len")
    ['8k', '32k']
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(field, text or "(empty)", "a list with an empty part",
                         "write one value or more with commas between")  # fmt: skip
    return list(dict.fromkeys(parts))


def read_question(flags: Mapping[str, Any]) -> str:
    """Which question is asked: "table", or one of `QUESTIONS`; refuses what contradicts it."""
    asked = [name for name in QUESTIONS if flags[name.replace("-", "_")]]
    if len(asked) > 1:
        raise InputError(", ".join(asked), "on", "two questions at once",
                         "ask one of them at a time")  # fmt: skip
    question = asked[0] if asked else "table"
    searched = SEARCHED.get(question)
    if searched is not None and flags[searched] is not None:
        name = searched.replace("_", "-")
        raise InputError(name, flags[searched], f"--{question} searches it", f"drop --{name}")
    _check_goal(question, flags)
    return question


def _check_goal(question: str, flags: Mapping[str, Any]) -> None:
    rates = [n for n in ("deadline", "step_time", "min_tokens_per_s") if flags[n] is not None]
    allowed = {"fewest-gpus": rates, "cheapest": ["deadline"]}.get(question, [])
    for name in rates:
        if name not in allowed:
            questions = "--fewest-gpus or --cheapest" if name == "deadline" else "--fewest-gpus"
            raise InputError(name.replace("_", "-"), flags[name], "nothing is asked about it",
                             f"add {questions}, or drop it")  # fmt: skip
    if question == "fewest-gpus" and len(rates) != 1:
        named = ", ".join(name.replace("_", "-") for name in rates) or "deadline"
        raise InputError(named, "(missing)" if not rates else "given",
                         "one goal is needed" if not rates else "more than one goal",
                         "give --tokens 15T --deadline 30d, --step-time 5s or "
                         "--min-tokens-per-s 1M")  # fmt: skip
    if flags["tokens"] is None and (flags["deadline"] is not None or question == "cheapest"):
        raise InputError("tokens", "(missing)", "the length of the run is not given",
                         "write --tokens 15T")  # fmt: skip
    if flags["max_nodes"] is not None and question != "fewest-gpus":
        raise InputError("max-nodes", flags["max_nodes"], "the clusters are given as they are",
                         "add --fewest-gpus, or drop it")  # fmt: skip


def read_asks(flags: Mapping[str, Any], question: str) -> list[Ask]:
    """Every combination of the lists, models slowest, GPUs fastest; notes go to stderr once."""
    from ..planner.sweep import Ask, check_prices, read_prices, with_prices

    filled = dict(flags)
    searched = SEARCHED.get(question)
    if searched is not None:
        filled[searched] = STAND_IN[searched]
    lists: list[list[str]] = []
    for name in ("model", "seq_len", "global_batch", "gpus"):
        field = name.replace("_", "-")
        if filled[name] is None:
            raise InputError(field, "(missing)", "not given", NEEDED[name])
        lists.append(split_list(filled[name], field))
    if question == "longest-context":
        check_batch_tokens(lists[2])
    asks: list[Ask] = []
    said: dict[str, None] = {}
    for model, seq_len, batch, gpus in product(*lists):
        one = {**filled, "model": model, "seq_len": seq_len, "global_batch": batch, "gpus": gpus}
        one |= {"steps": 10, "data": None, "optimizer": None, "objective": "throughput"}
        if is_traced(model) and question == "longest-context":
            raise InputError("model", model, "a module is traced at one length",
                             "sweep --seq-len instead")  # fmt: skip
        job = read_job(one)
        warnings = () if searched else job.warnings
        said |= dict.fromkeys((*(f"note: {n}" for n in job.notes),
                               *(f"warning: {w}" for w in warnings)))  # fmt: skip
        work = job.workload
        if "tok" in batch.lower() and searched != "seq_len":
            work, note = rounded(work, batch, flags["round_batch"])
            said |= dict.fromkeys(note)
        asks.append(
            Ask(model=job.model, cluster=job.cluster, workload=work, pins=search_pins(job, one))
        )
    prices: dict[str, float] = {}
    if flags["prices"] is not None:
        prices = read_prices(Path(flags["prices"]), device_names(ask.cluster for ask in asks))
    asks = [_priced(ask, with_prices(ask.cluster, prices)) for ask in asks]
    check_prices((ask.cluster for ask in asks), needed=question == "cheapest")
    for line in said:
        say(line)
    return asks


def sized_pins(ask: Ask, flags: Mapping[str, Any]) -> Pins:
    """The pins of an ask on its cluster: --space, where not given, depends on the nodes."""
    import msgspec

    job = Job(ask.model, ask.cluster, ask.workload, (), ())
    run_only = search_pins(job, {**flags, "model": ask.model.name}).run_only
    return msgspec.structs.replace(ask.pins, run_only=run_only)


def rounded(work: Workload, batch: str, wanted: bool) -> tuple[Workload, tuple[str, ...]]:
    """The workload with a batch that many degrees divide if wanted, and a note on the choice."""
    import msgspec

    seqs, rounder = work.global_batch_seqs, rounder_batch(work.global_batch_seqs)
    if rounder == seqs:
        return work, ()
    sizes = (f"{seqs:,}", f"{rounder:,}")
    if wanted:
        note = f"note: {batch} -> {sizes[1]} sequences of {work.seq_tokens:,} tokens"
        return msgspec.structs.replace(work, global_batch_seqs=rounder), (note,)
    return work, (
        f"note: {batch} -> {sizes[0]} sequences of {work.seq_tokens:,} tokens, which few degrees "
        f"divide; --round-batch takes {sizes[1]}",
    )


def rounder_batch(seqs: int) -> int:
    """The nearest multiple of the largest power of two within a quarter of it: at most 1/8 off.

    >>> rounder_batch(122), rounder_batch(31), rounder_batch(8), rounder_batch(96), rounder_batch(3)
    (128, 32, 8, 96, 3)
    """
    step = 2 ** max(0, (seqs // 4).bit_length() - 1)
    return step * max(1, (2 * seqs + step) // (2 * step))


def _priced(ask: Ask, cluster: Cluster) -> Ask:
    from dataclasses import replace

    return replace(ask, cluster=cluster)


def device_names(clusters: Iterable[Cluster]) -> set[str]:
    """The devices of some clusters."""
    return {pool.device.name for cluster in clusters for pool in cluster.pools}


def check_batch_tokens(batches: Iterable[str]) -> None:
    """Raise InputError for a global batch that is not given in tokens."""
    for text in batches:
        if "tok" not in text.lower():
            raise InputError("global-batch", text, "sequences have no fixed length here",
                             "give tokens, such as 4Mtok")  # fmt: skip
