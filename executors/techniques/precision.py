"""Precision: the dtypes of parameters in use, of gradients on the wire, and of hidden states."""

from __future__ import annotations

import torch

from ...plan import Phase
from ..torch_compat import MixedPrecisionPolicy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compute_dtype(phase: Phase) -> torch.dtype:
    """Dtype of matmuls and of hidden states."""
    return DTYPES[phase.compute_dtype]


def policy(phase: Phase) -> MixedPrecisionPolicy:
    """FSDP's policy: fp32 shards, gathered in the compute dtype, gradients reduced in fp32."""
    if compute_dtype(phase) is torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
