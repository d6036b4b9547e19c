"""COAT on this machine: kernels against their references, and what training loses by each part.

    python benchmarks/bench_coat.py kernels                 on a CUDA device: equality, then times
    python benchmarks/bench_coat.py training [--steps 300]  a byte-level language model
    python benchmarks/bench_coat.py layer                   a Llama layer on a CUDA device

`kernels` prints, per kernel and size, how codes differ from the plain reference on the same device,
the time, the bytes that must move at least, and the rate against the device's bandwidth in the
catalog; next to the optimiser stands torch's fused AdamW with fp32 moments. `training` trains one
model on the same batches with each part of COAT and prints the gap of the loss (mean of the last
20 steps) to fp32 with plain AdamW, and the error of an update against the plain format. `layer`
times forward and backward of one layer in bf16 and in fp8, and counts what it keeps. All print
Markdown tables. A kernel that disagrees with its reference ends the run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from forerun import Mesh, Plan, Workload
from forerun.catalogs import load_cluster, load_model
from forerun.executors import corpus
from forerun.executors.adamw_fp8 import AdamWFp8
from forerun.executors.build import build
from forerun.executors.data import batch
from forerun.executors.fp8_linear import Operands, product
from forerun.executors.support import TORCHAO_OPTIMIZERS
from forerun.kernels import adamw_fp8, fp8_cast
from forerun.kernels.fp8_cast import E4M3, E5M2
from forerun.plan import Phase, Setting, even_stages

CUDA = torch.device("cuda")
ELEMENTS = (2**20, 2**24, 2**27)
MATRICES = ((4096, 4096), (16384, 4096), (16384, 14336))


def median_s(call: Callable[[], object], repeats: int = 30) -> float:
    """Median seconds of a call on the device, the cache emptied in between."""
    flush = torch.empty(2**28, dtype=torch.uint8, device=CUDA)
    for _ in range(5):
        call()
    taken: list[float] = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def row(name: str, size: str, different: float, seconds: float, num_bytes: float) -> str:
    """One line of the table of kernels."""
    rate = num_bytes / seconds
    share = rate / bandwidth()
    return (
        f"| {name} | {size} | {different:.2e} | {seconds * 1e3:.3f} | {rate / 1e9:,.0f} "
        f"| {share:.0%} |"
    )


def bandwidth() -> float:
    """Bytes per second of this device's memory, as the catalog has it."""
    from forerun.executors.profiling.runner import device_name

    properties = torch.cuda.get_device_properties(CUDA)
    found = {"device": properties.name, "device_memory_bytes": str(properties.total_memory)}
    return load_cluster(f"1x{device_name('cuda', found)}").pools[0].device.memory_bytes_per_s


def on_reference(module: Any, call: Callable[[], Any]) -> Any:
    """What a call gives with the plain reference in place of the kernel, on the same device."""
    kept = module.on_triton
    module.on_triton = lambda _: False
    try:
        return call()
    finally:
        module.on_triton = kept


def differing(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The part of codes that differ."""
    assert ours is not None and theirs is not None
    return float((ours.view(torch.uint8) != theirs.view(torch.uint8)).float().mean())


def bench_casts() -> Iterator[str]:
    """Casts with one scale, in one order and both, and with a scale per 16, there and back."""
    for rows, columns in MATRICES:
        size, count = f"{rows} x {columns}", rows * columns
        x = torch.randn(rows, columns, device=CUDA, dtype=torch.bfloat16)
        for dtype, name in ((E4M3, "E4M3"), (E5M2, "E5M2")):
            scale = fp8_cast.tensor_scale(x, dtype)
            for both in (False, True):

                def call(dtype=dtype, scale=scale, both=both, x=x) -> fp8_cast.Cast:
                    return fp8_cast.cast(x, dtype, scale, transposed=both)

                own, plain = call(), on_reference(fp8_cast, call)
                off = differing(own.codes_MK, plain.codes_MK)
                if both:
                    off = max(off, differing(own.codes_KM, plain.codes_KM))
                assert off < 1e-4, f"{name} of {size}: {off:.1e} of the codes differ"
                what = f"cast {name}{' and turned' if both else ''}"
                yield row(what, size, off, median_s(call), count * (3 + both))
        yield row("largest", size, 0.0, median_s(lambda x=x: fp8_cast.tensor_scale(x, E4M3)),
                  2 * count)  # fmt: skip
        codes, scales = fp8_cast.pack_groups(x)
        plain = on_reference(fp8_cast, lambda x=x: fp8_cast.pack_groups(x))
        off = differing(codes, plain[0])
        assert off < 1e-4 and torch.equal(scales, plain[1]), f"1x16 of {size}: {off:.1e}"
        yield row("pack 1x16", size, off,
                  median_s(lambda x=x: fp8_cast.pack_groups(x)), 3.125 * count)  # fmt: skip

        def back(codes=codes, scales=scales) -> Tensor:
            return fp8_cast.unpack_groups(codes, scales, torch.bfloat16)

        assert torch.equal(back(), on_reference(fp8_cast, back)), f"back from 1x16 of {size}"
        yield row("unpack 1x16", size, 0.0, median_s(back), 3.125 * count)


def decoded(state: dict[str, Tensor], name: str) -> Tensor:
    """A moment's values."""
    return adamw_fp8.unpack(state[name], state[f"{name}_groups"])


def bench_optimizer() -> Iterator[str]:
    """One step on fp32 parameters and gradients, and torch's fused AdamW beside it."""
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    for count in ELEMENTS:
        value = torch.randn(count // 4096, 4096, device=CUDA)
        gradient = torch.randn_like(value) * torch.exp(torch.randn_like(value)) * 1e-3
        weights = [nn.Parameter(value.clone()) for _ in range(2)]
        optimizers = [AdamWFp8([weight], **settings) for weight in weights]
        for weight in weights:
            weight.grad = gradient
        ours, theirs = (weight.detach() for weight in weights)  # updated in place
        for step in range(3):
            optimizers[0].step()
            on_reference(adamw_fp8, optimizers[1].step)
            if step == 0:  # from moments of zero: nothing has been rounded to 8 bits yet
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        states = [optimizer.state[w] for optimizer, w in zip(optimizers, weights, strict=True)]
        off = max(differing(states[0][n], states[1][n]) for n in ("exp_avg", "exp_avg_sq"))
        # logarithms of the device and of torch differ in the last place, and now and then a code or
        # a group's exponent with them
        moved = float((ours - theirs).norm() / (theirs - value).norm())
        assert off < 0.02 and moved < 2e-3, (off, moved)
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = (decoded(state, name) for state in states)
            assert float((ours - theirs).norm() / theirs.norm()) < 5e-3, name
        num_bytes = count * (12 + 2 * 2.1875)
        yield row("adamw_fp8", f"{count:,}", off, median_s(optimizers[0].step), num_bytes)
        plain = nn.Parameter(value)
        plain.grad = gradient
        fused = torch.optim.AdamW([plain], fused=True, **settings)
        yield row("torch's fused AdamW", f"{count:,}", 0.0, median_s(fused.step), 28 * count)


def bench_linears() -> Iterator[str]:
    """Forward and backward of a linear in bf16 and on 8-bit operands, casts included."""
    for tokens, (columns, inner) in (
        (4096, (4096, 4096)), (16384, (4096, 4096)), (16384, (14336, 4096)),
    ):  # fmt: skip
        x = torch.randn(tokens, inner, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(columns, inner, device=CUDA, dtype=torch.bfloat16) / 64
        weight.requires_grad_()
        grad = torch.randn(tokens, columns, device=CUDA, dtype=torch.bfloat16)
        low = product(Operands(1, low=True, stored=True), True)

        def both(
            multiply: Callable[[Tensor, Tensor], Tensor], x=x, weight=weight, grad=grad
        ) -> None:
            torch.autograd.grad(multiply(x, weight), (x, weight), grad)

        with torch.no_grad():
            exact = torch.nn.functional.linear(x.float(), weight.float())
            error = float((low(x, weight).float() - exact).norm() / exact.norm())
            del exact
        assert error < 0.06, error  # two operands with 3 bits of fraction: 0.0375 for Gaussians
        times = [
            median_s(lambda m=multiply: both(m)) for multiply in (torch.nn.functional.linear, low)
        ]
        yield (
            f"| {tokens} x {columns} x {inner} | {error:.3e} | {times[0] * 1e3:.3f} "
            f"| {times[1] * 1e3:.3f} | {times[0] / times[1]:.2f} |"
        )


def kernels() -> None:
    """Tables of kernels and linears."""
    print(f"{torch.cuda.get_device_name(CUDA)}, torch {torch.__version__}\n")
    print("| kernel | size | codes that differ | ms | GB/s | of bandwidth |")
    print("|---|---|---|---|---|---|")
    for line in (*bench_casts(), *bench_optimizer()):
        print(line, flush=True)
    print("\n| linear (tokens x out x in) | error | bf16 ms | fp8 ms | gain |")
    print("|---|---|---|---|---|")
    for line in bench_linears():
        print(line, flush=True)


def plan_of(
    name: str, gpus: str, precision: dict[str, Any], optimizer: str, *, steps: int, seq: int,
    seqs: int,
) -> Plan:  # fmt: skip
    """A plan of one process."""
    model, cluster = load_model(name), load_cluster(gpus)
    phase = Phase(
        steps=steps, seq_tokens=seq, micro_batch_seqs=seqs, num_microbatches=1, mesh=Mesh(),
        stages=even_stages(model.num_layers, 1, cluster.pools[0].name),
        settings=(
            Setting(layers=(0, model.num_layers - 1), techniques={"precision": precision}),
        ),
    )  # fmt: skip
    workload = Workload(seq_tokens=seq, global_batch_seqs=seqs, steps=steps, learning_rate=1e-3)
    workload = msgspec.structs.replace(workload, optimizer=optimizer)
    return Plan(model=model, cluster=cluster, workload=workload, phases=(phase,))


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "fp32, AdamW": ({"compute": "fp32"}, "adamw"),
    "fp32, AdamW of 8-bit floats (COAT)": ({"compute": "fp32"}, "adamw_fp8"),
    "fp32, stored activations": ({"compute": "fp32", "activations": "fp8"}, "adamw"),
    "bf16, AdamW": ({"compute": "bf16"}, "adamw"),
    "fp8 linears (coat)": ({"compute": "fp8", "recipe": "coat"}, "adamw"),
    "COAT": ({"compute": "fp8", "recipe": "coat", "activations": "fp8"}, "adamw_fp8"),
    "fp32, adamw8bit": ({"compute": "fp32"}, "adamw8bit"),
    "fp32, adamw4bit": ({"compute": "fp32"}, "adamw4bit"),
    "fp32, adamw_fp8_block": ({"compute": "fp32"}, "adamw_fp8_block"),
}


def training(options: argparse.Namespace) -> None:
    """The table of losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = options.gpus or ("1xcpu" if device.type == "cpu" else "1xH200")
    if device.type == "cpu":
        torch.set_num_threads(1)
    backend = "gloo" if device.type == "cpu" else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        text = np.frombuffer(corpus.load(None), dtype=np.uint8)
        print(f"{options.model}, {options.steps} steps of {options.seqs} x {options.seq} bytes, "
              f"{device.type}, torch {torch.__version__}\n")  # fmt: skip
        print("| part | loss | gap to fp32 AdamW | states B/param | s/step |")
        print("|---|---|---|---|---|")
        exact: float | None = None
        for name, (precision, optimizer) in PARTS.items():
            if options.only and options.only not in name and exact is not None:
                continue
            if optimizer in TORCHAO_OPTIMIZERS and find_spec("torchao") is None:
                print(f"| {name} | needs torchao | | | |")
                continue
            plan = plan_of(options.model, gpus, precision, optimizer, steps=options.steps,
                           seq=options.seq, seqs=options.seqs)  # fmt: skip
            trainer = build(plan, device=device)
            losses: list[float] = []
            started = time.perf_counter()
            for step in range(options.steps):
                tokens = batch(text, plan.workload.seed, step, plan.phase, 0).to(device)
                losses.append(float(trainer.forward_backward(tokens)))
                trainer.optimizer_step()
            seconds = (time.perf_counter() - started) / options.steps
            loss = statistics.mean(losses[-20:])
            exact = exact if exact is not None else loss
            states = state_bytes(trainer.optimizer) / plan.model.num_params
            print(f"| {name} | {loss:.4f} | {loss / exact - 1:+.3%} | {states:.3f} "
                  f"| {seconds:.3f} |", flush=True)  # fmt: skip
            if optimizer == "adamw" and name == "fp32, AdamW":
                update = update_errors(trainer.optimizer)
        torch.distributed.destroy_process_group()
    times = update[0] / update[1]
    print(
        "\nrelative squared error of m / (sqrt(v) + eps) of the fp32 run's moments: plain E4M3 "
        f"{update[0]:.2e}, expanded {update[1]:.2e}, {times:.1f} times less"
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's states."""
    from forerun.executors.measure.memory import local_tensors

    return sum(
        part.numel() * part.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
        for part in local_tensors(value)
    )


def update_errors(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Errors of updates made from moments in the plain and in the expanded format."""
    moments = [
        [state[name].reshape(state[name].shape[0], -1).float() for state in optimizer.state.values()
         if state[name].dim() > 1]
        for name in ("exp_avg", "exp_avg_sq")
    ]  # fmt: skip
    errors: list[float] = []
    for expand in (False, True):
        off = whole = 0.0
        for m, v in zip(*moments, strict=True):
            low = [adamw_fp8.unpack(*adamw_fp8.pack(x, expand=expand)) for x in (m, v)]
            update, exact = (a / (b.sqrt() + 1e-8) for a, b in (low, (m, v)))
            off += float((update - exact).square().sum())
            whole += float(exact.square().sum())
        errors.append(off / whole)
    return errors[0], errors[1]


def layer(options: argparse.Namespace) -> None:
    """One Llama-2-7B layer, 8 sequences of 2048: the setting of COAT's own comparison (1.65 times
    less kept, 1.47 to 1.57 times as fast)."""
    from forerun.executors.decoder import Decoder
    from forerun.executors.techniques import precision

    model = load_model("llama-2-7b")
    one = msgspec.structs.replace(
        model, layers=(msgspec.structs.replace(model.layers[0], repeat=1),), vocab=1024
    )
    print("| layer | kept MiB | forward and backward ms |")
    print("|---|---|---|")
    results: list[tuple[float, float]] = []
    for name, settings in (
        ("bf16", {"compute": "bf16"}),
        ("fp8", {"compute": "fp8", "recipe": "coat"}),
        ("bf16, stored", {"compute": "bf16", "activations": "fp8"}),
        ("COAT", {"compute": "fp8", "recipe": "coat", "activations": "fp8"}),
    ):
        phase = plan_of("llama-2-7b", "1xH200", settings, "adamw", steps=1, seq=2048, seqs=8).phase
        with torch.device("meta"):
            piece = Decoder(one, 0, 0)
        precision.apply(piece, phase, CUDA)
        block = piece.blocks["0"].to_empty(device=CUDA).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        x = torch.randn(8, 2048, model.hidden, device=CUDA, dtype=torch.bfloat16)
        x.requires_grad_()
        table = piece.rotary(2048, x)
        grad = torch.randn_like(x)

        def step(block=block, x=x, table=table, grad=grad) -> None:
            block(x, table).backward(grad)
            block.zero_grad(set_to_none=True)
            x.grad = None

        seconds = median_s(step)
        before = torch.cuda.memory_allocated()
        out = block(x, table)
        kept = (torch.cuda.memory_allocated() - before - out.nbytes) / 2**20
        results.append((kept, seconds))
        print(f"| {name} | {kept:,.0f} | {seconds * 1e3:.2f} |", flush=True)
        del out, block, piece
    wide, coat = results[0], results[-1]
    print(f"\nCOAT keeps {wide[0] / coat[0]:.2f} times less, {wide[1] / coat[1]:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["kernels", "training", "layer"])
    parser.add_argument("--model", default="tiny-1m")
    parser.add_argument("--gpus", help="device of the plans; default 1xcpu, or 1xH200 with CUDA")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--only", help="of the parts those with this in their name, and fp32")
    options = parser.parse_args()
    if options.what != "training" and not torch.cuda.is_available():
        parser.error(f"{options.what} needs a CUDA device")
    if options.what == "kernels":
        kernels()
    elif options.what == "layer":
        layer(options)
    else:
        training(options)


if __name__ == "__main__":
    main()
