"""What settings of techniques may say: modes, dtypes, kinds and kernels by name."""

from __future__ import annotations

RECOMPUTE_MODES: tuple[str, ...] = (
    "none", "selective", "full", "full_keep_attn", "per_op", "elementwise"
)  # fmt: skip
TENSORS = "tensors"
"""The recompute mode that names every tensor of a layer that is kept (setting `keep`)."""
OFFLOAD_RESTS: tuple[str, ...] = ("keep", "recompute")
"""What becomes of activations that are not offloaded: they stay, or are made again token by token.
"""
OFFLOAD_STATES: tuple[str, ...] = ("optimizer", "experts", "parameters")
"""What else may wait off the device; with parameters go gradients and optimiser states."""
TIERS: tuple[str, ...] = ("host", "disk")
"""Where it waits."""
CP_KINDS: tuple[str, ...] = ("zigzag", "ring", "ulysses", "lightseq")
"""How the sequence is cut: balanced ring, contiguous blocks in a ring, all by all-to-all, or
contiguous blocks whose early ranks help the late ones."""
KINDS_OF_CP: tuple[str, ...] = (*CP_KINDS, "usp")
"""What a user may ask for; usp is a balanced ring of groups that exchange by all-to-all."""
RUNTIMES: tuple[str, ...] = ("eager", "compiled")
"""How a run launches a layer's operators: one by one, or compiled as a whole."""
ATTENTION_KERNELS: tuple[str, ...] = ("flash", "flash1", "flash2", "flash3", "unfused", "eager")
COMPUTE_DTYPES: tuple[str, ...] = (
    "fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4", "int8", "fp6", "fp4",
)  # fmt: skip
HALO_RECIPES: tuple[str, ...] = (
    "halo0", "halo1", "halo1-hq", "halo1-hq-xh", "halo2", "halo2-xh", "halo2-hq-xh",
)  # fmt: skip
"""Those of int8, fp6 and fp4."""
RECIPES: tuple[str, ...] = ("tensorwise", "rowwise", "coat", *HALO_RECIPES)
"""How matmuls below 16 bits are scaled."""
STORAGE_DTYPES: tuple[str, ...] = ("fp8",)
"""Of saved activations, where it is not the dtype of the tensors."""
