"""Layouts in which ranks share sequences, or documents are packed into them."""

from __future__ import annotations

from typing import Any

SPLIT = {"micro_batch_seqs": 2}
ALL_TO_ALL = {"cp_kind": "ulysses"}
TWO, FOUR = {"cp": 2, "ulysses": 2}, {"cp": 4, "ulysses": 4}
KEEP = {"recompute": "full_keep_attn"}
TENSORS = {"recompute": {"mode": "tensors", "keep": ["x1", "v"]}}
OFFLOAD: dict[str, Any] = {"offload": {"activations": 0.5}}
TOKENS = {"offload": OFFLOAD["offload"] | {"rest": "recompute"}}
LIGHTSEQ = {"cp_kind": "lightseq"}
SP = {"sequence_parallel": True}
PACKED = {"packed": True}
CLIP = 0.3
"""Below the norm of the gradients of every step."""
CLIPPED = {"clip_norm": CLIP}

FAMILIES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "full_keep_attn": KEEP | SPLIT,
        "packed": PACKED | SPLIT | {"recompute": "full"},
    },
    2: {
        "zigzag": {"mesh": {"cp": 2}} | SPLIT,
        "zigzag zero3": {"mesh": {"cp": 2}, "zero": 3, "recompute": "selective"} | SPLIT,
        "ring full": {"mesh": {"cp": 2}, "cp_kind": "ring", "zero": 1, "recompute": "full"},
        "ulysses": {"mesh": TWO} | ALL_TO_ALL,
        "ulysses keep": {"mesh": TWO, "zero": 3} | ALL_TO_ALL | KEEP,
        "lightseq keep": {"mesh": {"cp": 2}} | LIGHTSEQ | KEEP,
        "bf16 zigzag": {"mesh": {"cp": 2}, "dtype": "bf16"},
        "bf16 ulysses selective": {"mesh": TWO, "zero": 3, "dtype": "bf16",
                                   "recompute": "selective"} | ALL_TO_ALL,
        "clip zigzag zero3": {"mesh": {"cp": 2}, "zero": 3} | CLIPPED,
        "zigzag tensors": {"mesh": {"cp": 2}, "more": TENSORS | OFFLOAD} | SPLIT,
        "zigzag tokens": {"mesh": {"cp": 2}, "more": TOKENS},
        "lightseq elementwise": {"mesh": {"cp": 2}, "recompute": "elementwise"} | LIGHTSEQ,
        "ulysses offload": {"mesh": TWO, "recompute": "selective", "more": OFFLOAD} | ALL_TO_ALL,
        "packed tensors": {"mesh": {"cp": 2}, "more": TENSORS} | PACKED,
        "packed zigzag": {"mesh": {"cp": 2}} | PACKED | SPLIT,
        "packed ulysses": {"mesh": TWO, "zero": 2} | ALL_TO_ALL | KEEP | PACKED,
        "packed tp-sp": {"mesh": {"tp": 2}} | SP | PACKED,
        "packed 1f1b": {"mesh": {"pp": 2}} | PACKED | SPLIT,
    },
    4: {
        "zigzag4": {"mesh": {"cp": 4}, "recompute": "full"},
        "ring4": {"mesh": {"cp": 4}, "cp_kind": "ring"},
        "lightseq4": {"mesh": {"cp": 4}, "zero": 3} | LIGHTSEQ | KEEP,
        "ulysses4": {"mesh": FOUR} | ALL_TO_ALL,
        "usp": {"mesh": {"cp": 4, "ulysses": 2}, "zero": 2} | SPLIT,
        "usp lightseq": {"mesh": {"cp": 4, "ulysses": 2}} | LIGHTSEQ,
        "cp2 x tp2-sp": {"mesh": {"cp": 2, "tp": 2}, "recompute": "selective"} | SP,
        "cp2 x pp2": {"mesh": {"cp": 2, "pp": 2}} | KEEP | SPLIT,
        "clip cp2 x pp2 zb-h1": {"mesh": {"cp": 2, "pp": 2}, "schedule": "zb-h1"} | SPLIT | CLIPPED,
        "ulysses2 x pp2 x 2": {"mesh": TWO | {"pp": 2, "vpp": 2},
                               "schedule": "interleaved"} | ALL_TO_ALL | SPLIT,
        "cp2 x ddp2": {"mesh": {"cp": 2, "dp_replicate": 2}} | SPLIT,
        "cp2 x zero3": {"mesh": {"cp": 2, "dp_shard": 2}, "zero": 3} | LIGHTSEQ,
        "cp2 x hsdp": {"mesh": TWO | {"dp_replicate": 2}, "zero": 3} | ALL_TO_ALL,
        "bf16 lightseq4": {"mesh": {"cp": 4}, "dtype": "bf16"} | LIGHTSEQ,
        "packed lightseq4": {"mesh": {"cp": 4}} | LIGHTSEQ | PACKED,
        "packed cp2 x pp2": {"mesh": {"cp": 2, "pp": 2}, "cp_kind": "ring"} | PACKED | SPLIT,
    },
    8: {
        "lightseq8": {"mesh": {"cp": 8}} | LIGHTSEQ,
        "usp8 zero3": {"mesh": {"cp": 4, "ulysses": 2, "dp_shard": 2}, "zero": 3} | SPLIT,
        "cp2 x tp2-sp x pp2": {"mesh": {"cp": 2, "tp": 2, "pp": 2}} | SP | SPLIT,
        "packed ring8": {"mesh": {"cp": 8}, "cp_kind": "ring", "zero": 1} | PACKED,
    },
}  # fmt: skip

QUICK = (
    "llama packed", "llama zigzag", "llama ulysses keep", "llama lightseq keep",
    "llama packed zigzag", "llama usp", "llama cp2 x pp2",
)  # fmt: skip
"""Families of the default run: each kind, each composition and each way of packing once."""
