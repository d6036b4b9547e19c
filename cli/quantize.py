"""forerun quantize: the frozen weights of a plan in few bits, by GPTQ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import POSITIVE, common_options, plan_argument
from .plan_files import read_plan_file
from .progress import progress

if TYPE_CHECKING:
    from ..executors.quantize import Quantization


@click.command("quantize")
@plan_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write, which run --base reads.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="Folder with a checkpoint of the weights; default: initial ones.",
)
@click.option("--data", help="Calibration text, a file or folder, in place of the plan's.")
@click.option(
    "--samples",
    type=POSITIVE,
    default=128,
    show_default=True,
    help="Sequences of the calibration text.",
)
@click.option(
    "--act-order", is_flag=True, help="Inputs with large moments first, on grids made before."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where to compute.",
)  # fmt: skip
@common_options
def command(
    as_json: bool,
    plan_path: Path,
    output: Path,
    base: Path | None,
    data: str | None,
    samples: int,
    act_order: bool,
    device: str,
) -> None:
    """Quantise the weights beside which PLAN trains adapters, on a calibration text.

    The plan says how: --lora RANK,base=gptq4_g128 is 4 bits on a grid per 128 inputs.
    """
    import torch

    from ..executors.quantize import quantize
    from . import render

    plan = read_plan_file(plan_path).plan
    with progress("quantize") as move:
        found = quantize(
            plan,
            output,
            base=base,
            data=data,
            samples=samples,
            act_order=act_order,
            device=torch.device(device),
            on_layer=lambda layer, num: move(float(layer), float(num), f"layer {layer}"),
        )
    if as_json:
        render.print_json(found)
    else:
        print_quantization(found)


def print_quantization(found: Quantization) -> None:
    """Print what every matrix lost."""
    from . import render

    render.print_line(f"{'matrix':<28} {'shape':>14} {'error':>10} {'nearest':>10}")
    for loss in found.losses:
        shape = f"{loss.shape[0]} x {loss.shape[1]}"
        render.print_line(
            f"{loss.name:<28} {shape:>14} {loss.error:>10.3g} {loss.nearest_error:>10.3g}"
        )
    render.print_line(
        f"{found.base}: error of outputs {100 * found.gain:.0f} % less than of rounding to "
        f"nearest, {found.samples} samples of {found.sample_tokens} tokens, {found.seconds:.1f} s"
    )
    render.print_line(f"wrote {found.path}")
