"""torchao's linears and optimisers, as this executor's plans name them.

Float8 linears (`torchao.float8`) come in the recipes tensorwise and rowwise; they keep their 16-bit
input for backward, and run emulated where there is no CUDA device. Low-bit and offloaded AdamW
(`torchao.optim`) keep what `costmodel/moment_bytes.py` says. Their steps are compiled on CUDA; on a
CPU they run as they are written: compiling takes longer there than short runs do.

Written for torchao 0.18.0.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

LOW_BIT = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit", "adamw_fp8_block": "AdamWFp8"}
"""Classes of `torchao.optim`."""


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings of torchao's import: it looks for CUDA libraries that others may have, and
    registers types in ways that newer versions of torch have names for."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def product(recipe: str, linear: nn.Linear, device: torch.device) -> Callable[..., Tensor]:
    """x, weight, bias -> x weight^T + bias by a Float8Linear of a recipe.

    The linear that holds the parameter stays where it is, under its name: torchao's is lent the
    weight of the moment, which FSDP exchanges.
    """
    with quietly():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    if device.type != "cuda":
        config = replace(config, emulate=True)
    bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    lent: Any = convert_to_float8_training(bare, config=config)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        lent._parameters["weight"] = weight
        try:
            out = lent(x)
        finally:
            lent._parameters["weight"] = None
        return out if bias is None else out + bias

    return multiply


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """An optimiser of torchao; `settings` are those of AdamW."""
    with quietly():
        import torchao.optim as library
    parameters = list(parameters)
    on_cpu = bool(parameters) and parameters[0].device.type == "cpu"
    if name == "adamw_offload":
        offloading: Any = library.CPUOffloadOptimizer(parameters, torch.optim.AdamW, **settings)
        on_device = offloading.d_opt
        offloading.state = {} if on_device is None else on_device.state  # it has none of its own
        return offloading
    kind: type[torch.optim.Optimizer] = getattr(library, LOW_BIT[name])
    return (_eager(kind) if on_cpu else kind)(parameters, **settings)


def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class with steps that are not compiled."""

    class Eager(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    Eager.__name__ = kind.__name__
    return Eager
