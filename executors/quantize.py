"""Quantises the frozen weights of a plan with GPTQ, layer by layer, on a calibration text.

One layer of the model is in memory at a time, with the hidden states of all samples. A first pass
takes the moments of every linear's inputs, a second one makes the next layer's inputs with the
weights as they have become. Written is a folder that `run --base` reads: a checkpoint in form,
codes, scales and zeros in the place of the weights of linears, all else as it was.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..costmodel.diff import plan_digest
from ..document import Value
from ..errors import InputError, RunFailed
from ..plan import Plan
from . import corpus, data, init
from .checkpoints import folder
from .checkpoints.folder import Checkpoint
from .checkpoints.planners import save_alone
from .checkpoints.shards import PARAMETER, whole
from .decoder import Block, Decoder
from .frozen import gptq, grid
from .frozen.base import Base
from .frozen.stored import NF4
from .linear import Linear, run_plainly
from .support import check_executed
from .techniques.lora import linears_of

SAMPLES = 128
MOST_TOKENS = 2048
"""Of a sample: as long as a sequence of the plan, and no longer than this."""
STEP = 2**31
"""The step whose sequences samples are; a training does not get there."""
AT_ONCE_TOKENS = 8192
READ_BY = {"wq": "wq", "wk": "wq", "wv": "wq", "wo": "wo", "gate": "up", "up": "up",
           "down": "down"}  # fmt: skip
"""Linears by the one that has the same input and is looked at."""

OnLayer = Callable[[int, int], None]


class Loss(Value, frozen=True, kw_only=True):
    """What one matrix has lost."""

    name: str
    shape: tuple[int, int]
    error: float
    """Mean square of its outputs' change on the calibration text, over that of its outputs."""
    nearest_error: float
    """The same of rounding to nearest."""


class Quantization(Value, frozen=True, kw_only=True):
    """What was quantised, and how well."""

    path: str
    base: str
    samples: int
    sample_tokens: int
    act_order: bool
    losses: tuple[Loss, ...]
    seconds: float

    @property
    def gain(self) -> float:
        """How much less the error of a matrix is than that of rounding to nearest, in the mean."""
        shares = [loss.error / loss.nearest_error for loss in self.losses if loss.nearest_error]
        return 1.0 - sum(shares) / len(shares) if shares else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where weights come from."""

    plan: Plan
    base: Base | None
    device: torch.device

    def fill(self, piece: Decoder) -> None:
        """Have a piece's parameters on the device."""
        shapes = {name: tuple(p.shape) for name, p in piece.named_parameters()}
        piece.to_empty(device=self.device)
        for name, parameter in piece.named_parameters():
            seed, model = self.plan.workload.seed, self.plan.model
            if self.base is not None:
                parameter.copy_(self.base.parameter(name, shapes[name]))
            else:
                parameter.copy_(init.full_parameter(name, shapes[name], model, seed, self.device))


@torch.no_grad()
def quantize(
    plan: Plan,
    output: Path,
    *,
    base: Path | None = None,
    data: str | None = None,
    samples: int = SAMPLES,
    act_order: bool = False,
    device: torch.device | None = None,
    on_layer: OnLayer | None = None,
) -> Quantization:
    """Quantise the linears of a plan whose adapters have a base `gptqB_gG`, into a new folder.

    `base` holds a checkpoint of the weights (default: initial ones), `data` takes the place of the
    workload's text. With `act_order` inputs with large moments come first, on static groups.
    """
    start_s = time.monotonic()
    formats = _formats(plan, samples)
    if base is not None:
        folder.check_base(base, plan.model)
    folder.check_fresh(output)
    device = device or torch.device("cpu")
    source = _Source(plan=plan, base=None if base is None else Base.of(base, plan), device=device)
    tokens = _samples(plan, data, samples)
    state: dict[str, Tensor] = {}
    losses: list[Loss] = []
    hidden: Tensor | None = None
    for index in range(plan.model.num_layers):
        if on_layer is not None:
            on_layer(index, plan.model.num_layers)
        with torch.device("meta"):
            piece = Decoder(plan.model, index, index)
        source.fill(piece)
        if hidden is None:
            hidden = torch.cat([piece.embed(part.to(device), None) for part in _batches(tokens)])
        hidden, found = _layer(piece, index, hidden, formats[index], act_order, state)
        losses += found
    path = _write(plan, state, output)
    return Quantization(
        path=str(path), base=", ".join(sorted({f for f in formats if f})), samples=samples,
        sample_tokens=tokens.shape[1], act_order=act_order, losses=tuple(losses),
        seconds=time.monotonic() - start_s,
    )  # fmt: skip


def _formats(plan: Plan, samples: int) -> list[str | None]:
    """The base of every layer that is a grid's, else None."""
    check_executed(plan)
    if samples < 1:
        raise InputError("samples", samples, "not positive", "give 1 or more")
    bases = [plan.phase.technique("lora", i).get("base") for i in range(plan.model.num_layers)]
    found = [None if base in (None, NF4) else str(base) for base in bases]
    if not any(found):
        raise InputError("lora.base", bases[0] or "(none)", "has nothing to calibrate",
                         "plan with --lora RANK,base=gptq4_g128")  # fmt: skip
    return found


def _samples(plan: Plan, named: str | None, samples: int) -> Tensor:
    """Sequences (samples, S) of the calibration text."""
    length = min(plan.phase.seq_tokens, MOST_TOKENS)
    named = named or plan.workload.data
    text = corpus.load(named)
    corpus.check_fits(text, plan.model, length, named)
    array = np.frombuffer(text, dtype=np.uint8)
    rows = [data.sequence(array, plan.workload.seed, STEP, i, length) for i in range(samples)]
    return torch.from_numpy(np.stack(rows))


def _batches(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(1, AT_ONCE_TOKENS // rows.shape[1]))


def _layer(
    piece: Decoder,
    index: int,
    hidden: Tensor,
    base: str | None,
    act_order: bool,
    state: dict[str, Tensor],
) -> tuple[Tensor, list[Loss]]:
    """Hidden states behind a layer, whose parameters are now in `state`, and what it lost."""
    block = piece.blocks[str(index)]
    assert isinstance(block, Block)
    linears, losses = linears_of(block), list[Loss]()
    if base is not None:
        moments = {
            reader: gptq.Moments(linear.in_features, hidden.device)
            for name, linear in linears.items()
            if (reader := name.rpartition(".")[2]) == READ_BY[reader]
        }

        def observed(name: str, function: Callable[..., Any], *args: Any) -> Any:
            if name in moments:
                moments[name].add(args[0])
            return function(*args)

        block.run_by(observed)
        _forward(piece, block, hidden)
        for name, linear in linears.items():
            path = f"blocks.{index}.{name}"
            h = moments[READ_BY[name.rpartition(".")[2]]].matrix
            parts, loss = _linear(path, linear, h, grid.Format.of(base), act_order)
            losses.append(loss)
            state |= {f"{path}.stored.{part}": value.cpu() for part, value in parts.items()}
    done = {f"blocks.{index}.{name}.weight" for name in linears} if base is not None else set()
    state |= {n: p.detach().cpu() for n, p in piece.named_parameters() if n not in done}
    if piece.is_last:
        return hidden, losses
    block.run_by(run_plainly)
    return _forward(piece, block, hidden), losses


def _forward(piece: Decoder, block: Block, hidden: Tensor) -> Tensor:
    table = piece.rotary(hidden.shape[1], hidden)
    return torch.cat([block(part, table) for part in _batches(hidden)])


def _linear(
    path: str, linear: Linear, moments: Tensor, form: grid.Format, act_order: bool
) -> tuple[dict[str, Tensor], Loss]:
    """A linear's bytes and loss; it multiplies with what they stand for from now on."""
    weight = linear.weight.detach()
    found = gptq.quantize(
        path, weight, moments, form.bits, form.group, act_order=act_order, static_groups=act_order
    )
    nearest = grid.round_to_nearest(weight, form).values()
    loss = Loss(
        name=path,
        shape=(weight.shape[0], weight.shape[1]),
        error=_share(weight, found.values, moments),
        nearest_error=_share(weight, nearest, moments),
    )
    linear.weight.copy_(found.values)
    return grid.packed(grid.Quantized(found.codes, found.grids), form), loss


def _share(weight: Tensor, values: Tensor, moments: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) of the difference D."""
    lost, all_of_it = (((x @ moments) * x).sum() for x in (values - weight, weight))
    return float(lost / all_of_it.clamp(min=1e-30))


def _write(plan: Plan, state: dict[str, Tensor], output: Path) -> Path:
    """Write the folder; RunFailed where the disk does not take it."""
    output.mkdir(parents=True, exist_ok=True)
    written = folder.partial(output, 0)
    try:
        boxes = {f"{PARAMETER}.{name}": whole(value) for name, value in state.items()}
        save_alone(boxes, written)
        paths = [path for path in written.iterdir() if path.name != folder.DOCUMENT]
        facts = msgspec.structs.replace(
            _facts(plan), files={path.name: folder.digest(path) for path in paths}
        )
        return folder.complete(written, facts)
    except Exception as error:
        shutil.rmtree(written, ignore_errors=True)
        problem = folder.disk_problem(error, output)
        raise RunFailed(f"output={output}: not written, {problem}: free some space or give "
                        "another folder") from error  # fmt: skip


def _facts(plan: Plan) -> Checkpoint:
    workload = plan.workload
    return Checkpoint(
        step=0, model=plan.model.name, model_digest=folder.model_digest(plan.model),
        plan_digest=plan_digest(plan), label=plan.label, seed=workload.seed,
        seq_tokens=plan.phase.seq_tokens, global_batch_seqs=workload.global_batch_seqs,
        learning_rate=workload.learning_rate, precision=plan.phase.compute_dtype, data_digest="",
        torch=str(torch.__version__),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
