"""Precision: dtypes of parameters in use, of gradients on the wire, hidden states and matmuls.

Below 16 bits there are three makers of linears: recipe `coat` is ours (`fp8_linear.py`), those of
HALO are too (`techniques/halo.py`), `tensorwise` and `rowwise` are torchao's. Saved activations in
8 bits change linears of either dtype, but only those of coat, since they keep their operand.
"""

from __future__ import annotations

import torch

from ...plan import Phase
from .. import torchao_adapters
from ..decoder import Block, Decoder, Linear
from ..fp8_linear import Operands, product
from ..torch_compat import MixedPrecisionPolicy
from . import halo, storage

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "int8": torch.bfloat16,
    "fp6": torch.bfloat16, "fp4": torch.bfloat16,
}  # fmt: skip
"""Of the tensors between matmuls."""
GROUPS = (
    ("attention", ("wq", "wk", "wv")),
    ("attention", ("wo",)),
    ("mlp", ("gate", "up")),
    ("mlp", ("down",)),
)
"""Linears of a block that read one tensor."""
NOT_STORED = ("wo",)
"""Its input is attention's output, which attention keeps."""


def compute_dtype(phase: Phase) -> torch.dtype:
    """Dtype of hidden states, and of matmuls that are not below 16 bits."""
    return DTYPES[phase.compute_dtype]


def policy(phase: Phase) -> MixedPrecisionPolicy:
    """FSDP's policy: fp32 shards, gathered in the compute dtype, gradients reduced in fp32."""
    if compute_dtype(phase) is torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def apply(piece: Decoder, phase: Phase, device: torch.device) -> None:
    """Set what each block multiplies in and keeps; on the meta device, before anything is cut."""
    for index, block in piece.blocks.items():
        assert isinstance(block, Block)
        settings = phase.technique("precision", int(index))
        low = settings.get("compute") not in ("fp32", "bf16", None)
        stored = settings.get("activations") == "fp8"
        if stored:
            storage.apply(block)
        if not (low or stored):
            continue
        named = settings.get("linears")
        recipe = settings.get("recipe", "tensorwise")
        for part, group in GROUPS:
            module = block.get_submodule(part)
            linears = {name: getattr(module, name) for name in group if hasattr(module, name)}
            chosen = [name for name in linears if low and (named is None or name in named)]
            if halo.uses(settings):
                halo.apply(linears, chosen, settings)
                continue
            if recipe == "coat" or not low:
                _own(linears, chosen, stored and group[0] not in NOT_STORED)
                continue
            for name in chosen:
                linears[name].product = torchao_adapters.product(recipe, linears[name], device)


def _own(linears: dict[str, Linear], chosen: list[str], stored: bool) -> None:
    """Linears of one group on operands of our own; where these are kept, all of them."""
    names = list(linears) if stored else chosen
    operands = Operands(len(names), low=bool(chosen), stored=stored)
    for name in names:
        linears[name].product = product(operands, name in chosen)
