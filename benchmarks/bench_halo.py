"""HALO on this machine: what fine-tuning loses by each level, and kernels against references.

    python benchmarks/bench_halo.py fine-tuning [--steps 100]   a byte-level language model
    python benchmarks/bench_halo.py kernels                     on a CUDA device: equality, times

`fine-tuning` trains a model in bf16, gives it outliers (channels of its norms 100 times as large,
the columns that read them as much smaller, so that it computes the same), and trains it on from
there in bf16 and at each level: the gap of the loss is of the mean of the last steps. It also
prints the error of a first gradient. `kernels` prints how codes differ from the plain reference,
the time, and the rate of the bytes that must move at least. Both print Markdown tables.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import msgspec
import numpy as np
import torch
from bench_coat import MATRICES, differing, median_s, on_reference, plan_of, row
from torch import Tensor

from forerun.costmodel.halo_levels import LEVELS
from forerun.executors import corpus
from forerun.executors.build import build
from forerun.executors.data import batch
from forerun.executors.torch_compat import local_tensor
from forerun.executors.trainer import Trainer
from forerun.kernels import hadamard

READERS = {"attention_norm": ("attention.wq", "attention.wk", "attention.wv"),
           "mlp_norm": ("mlp.gate", "mlp.up")}  # fmt: skip
"""Linears that read a norm."""
EVERY, SIZE = 64, 100.0


def add_outliers(weights: dict[str, Tensor]) -> None:
    """Make every 64th channel of what norms give out 100 times as large, in a model that computes
    the same."""
    for name in list(weights):
        block, _, rest = name.rpartition(".attention_norm.weight")
        if rest or not block:
            continue
        for norm, readers in READERS.items():
            weights[f"{block}.{norm}.weight"][::EVERY] *= SIZE
            for reader in readers:
                weights[f"{block}.{reader}.weight"][:, ::EVERY] /= SIZE


def put(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    """These parameters in place of a trainer's own."""
    with torch.no_grad():
        for piece in trainer.pieces:
            for name, parameter in piece.named_parameters():
                local_tensor(parameter).copy_(weights[name])


def train(trainer: Trainer, text: Any, first: int, steps: int) -> list[float]:
    """Losses of some steps."""
    losses: list[float] = []
    for step in range(first, first + steps):
        plan = trainer.plan
        tokens = batch(text, plan.workload.seed, step, plan.phase, 0).to(trainer.device)
        losses.append(float(trainer.forward_backward(tokens)))
        trainer.optimizer_step()
    return losses


def first_gradient(trainer: Trainer, text: Any) -> dict[str, Tensor]:
    """Gradients of the first batch; dropped from the parameters."""
    plan = trainer.plan
    tokens = batch(text, plan.workload.seed, 0, plan.phase, 0).to(trainer.device)
    trainer.forward_backward(tokens)
    found = {name: g.detach().clone() for name, g in trainer.named_gradients().items()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def fine_tuning(options: argparse.Namespace) -> None:
    """The table of losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = options.gpus or ("1xcpu" if device.type == "cpu" else "1xH200")
    if device.type == "cpu":
        torch.set_num_threads(1)
    backend = "gloo" if device.type == "cpu" else "nccl"

    def trainer_of(precision: dict[str, Any]) -> Trainer:
        plan = plan_of(options.model, gpus, precision, "adamw", steps=options.steps,
                       seq=options.seq, seqs=options.seqs)  # fmt: skip
        gentle = msgspec.structs.replace(plan.workload, learning_rate=1e-4)
        return build(msgspec.structs.replace(plan, workload=gentle), device=device)

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        text = np.frombuffer(corpus.load(None), dtype=np.uint8)
        start = build(plan_of(options.model, gpus, {"compute": "bf16"}, "adamw",
                              steps=options.steps, seq=options.seq, seqs=options.seqs),
                      device=device)  # fmt: skip
        trained = train(start, text, 0, options.steps)
        weights = {name: w.detach().clone() for name, w in start.named_parameters_full().items()}
        add_outliers(weights)
        print(f"{options.model}, {options.steps} steps of {options.seqs} x {options.seq} bytes in "
              f"bf16 to {statistics.mean(trained[-10:]):.4f}, then as many with outliers; "
              f"{device.type}, torch {torch.__version__}\n")  # fmt: skip
        print("| fine-tuned in | first gradient off | loss | gap to bf16 | s/step |")
        print("|---|---|---|---|---|")
        exact: float | None = None
        wide: dict[str, Tensor] = {}
        levels = [name for name in LEVELS if options.only in (None, name)]
        for compute, recipe in (("bf16", None), *((options.compute, name) for name in levels)):
            trainer = trainer_of({"compute": compute} | ({"recipe": recipe} if recipe else {}))
            put(trainer, weights)
            gradient = first_gradient(trainer, text)
            wide = wide or gradient
            off = sum(float((gradient[n] - g).norm()) ** 2 for n, g in wide.items())
            whole = sum(float(g.norm()) ** 2 for g in wide.values())
            started = time.perf_counter()
            losses = train(trainer, text, options.steps, options.steps)
            seconds = (time.perf_counter() - started) / options.steps
            loss = statistics.mean(losses[-min(20, options.steps) :])
            exact = exact if exact is not None else loss
            print(f"| {compute} {recipe or ''} | {(off / whole) ** 0.5:.2%} | {loss:.4f} "
                  f"| {loss / exact - 1:+.3%} | {seconds:.3f} |", flush=True)  # fmt: skip
        torch.distributed.destroy_process_group()


def kernels() -> None:
    """The table of kernels; rotated codes may differ where a sum was rounded otherwise."""
    print("| kernel | size | differ | ms | GB/s | of peak |")
    print("|---|---|---|---|---|---|")
    for rows, columns in (*MATRICES, (8192, 11008)):
        size, count = f"{rows} x {columns}", rows * columns
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        for rotated in (False, True):
            scale = hadamard.scale_of(hadamard.top(x, rotated=rotated), "int8")

            def call(x=x, scale=scale, rotated=rotated) -> Any:
                return hadamard.cast_low(x, "int8", scale, rotated=rotated)

            off = differing(call().codes_MK, on_reference(hadamard, call).codes_MK)
            assert off < 1e-2, f"codes of {size}: {off:.1e} differ"
            seconds = median_s(call)
            line = row(f"cast int8{', rotated' if rotated else ''}", size, off, seconds,
                            3 * count)  # fmt: skip
            print(line, flush=True)
        seconds = median_s(lambda x=x: hadamard.top(x, rotated=True))
        print(row("largest, rotated", size, 0.0, seconds, 2 * count), flush=True)
        seconds = median_s(lambda x=x: hadamard.rotate(x))
        print(row("rotate", size, 0.0, seconds, 4 * count), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["fine-tuning", "kernels"])
    parser.add_argument("--model", default="tiny-1m")
    parser.add_argument("--compute", default="int8", choices=list(hadamard.FORMATS))
    parser.add_argument("--gpus", help="device of the plans; default 1xcpu, or 1xH200 with CUDA")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--only", choices=list(LEVELS), help="this level alone, beside bf16")
    options = parser.parse_args()
    if options.what == "kernels" and not torch.cuda.is_available():
        parser.error("kernels needs a CUDA device")
    if options.what == "kernels":
        kernels()
    else:
        fine_tuning(options)


if __name__ == "__main__":
    main()
