"""Size grids of the profile: which points each operator and collective is measured at.

They span what small models on a CPU use (hidden 32 to 1024, 256 to 8192 tokens per micro-batch,
vocabularies up to 32768) and, on a GPU, what large ones use per device (hidden up to 8192, 32768
tokens). Points that would take too long on the machine at hand are skipped there.
"""

from __future__ import annotations

from itertools import product

Grid = dict[str, list[tuple[int, ...]]]

LINEAR_NK = [
    (32, 32), (128, 32), (32, 128), (128, 128), (64, 256), (256, 64), (352, 128), (128, 352),
    (256, 256), (768, 256), (256, 768), (512, 512), (1408, 512), (512, 1408), (1024, 1024),
    (4096, 256),
]  # fmt: skip
LINEAR_EXTRA = [
    (16, 32, 32), (64, 128, 128), (64, 512, 512), (512, 256, 256), (1024, 256, 256),
    (1024, 768, 256), (8192, 128, 128), (8192, 256, 256), (512, 32768, 128),
]  # fmt: skip
FEW_NK = [(32, 32), (128, 128), (352, 128), (128, 352), (256, 256), (768, 256), (512, 512)]
ATTENTION = [
    (8, 64, 32), (16, 128, 16), (8, 128, 64), (32, 256, 32), (16, 256, 64), (8, 512, 32),
    (8, 512, 64), (4, 1024, 64), (8, 256, 128), (64, 128, 32),
]  # fmt: skip
ATTENTION_FULL = [
    (16, 64, 16, 32), (32, 64, 32, 64), (8, 128, 64, 64), (32, 128, 32, 128), (16, 256, 64, 128),
    (8, 512, 32, 512), (8, 256, 128, 256),
]  # fmt: skip
FEW_ATTENTION_FULL = [(16, 64, 32, 32), (32, 128, 32, 128), (8, 512, 64, 256)]
FEW_ATTENTION = [(8, 64, 32), (16, 128, 32), (32, 256, 32), (8, 512, 64)]
NORM = [
    (64, 32), (256, 128), (1024, 64), (2048, 128), (2048, 256), (1024, 512), (8192, 128),
    (2048, 1024), (8192, 512),
]  # fmt: skip
FEW_NORM = [(64, 32), (512, 128), (2048, 256), (2048, 1024)]
ELEMENTS = [2**10, 2**14, 2**16, 2**18, 2**20, 2**22]
FEW_ELEMENTS = [2**10, 2**15, 2**18, 2**20, 2**22]
EMBEDDING = [
    (64, 32, 256), (256, 64, 256), (2048, 128, 256), (2048, 256, 4096), (1024, 256, 32768),
    (8192, 256, 256),
]  # fmt: skip
CROSS_ENTROPY = [(16, 256), (256, 256), (2048, 256), (8192, 256), (1024, 2048), (256, 32768)]
ADAMW = [
    (2**10, 8), (2**15, 20), (2**18, 20), (2**18, 100), (2**20, 40), (2**22, 40), (2**22, 100),
    (2**23, 100),
]  # fmt: skip
COPIES: list[tuple[int, ...]] = [(2**14,), (2**18,), (2**20,), (2**22,)]
COPY_OPERATORS = ("copy_d2h", "copy_h2d", "copy_to_disk", "copy_from_disk")
"""Between the device and the tiers of offload."""

GROUPED = [
    (64, 32, 32, 4), (512, 64, 128, 8), (1024, 320, 128, 8), (1024, 128, 320, 8),
    (2048, 96, 128, 16), (2048, 128, 96, 16), (2048, 512, 192, 8), (2048, 192, 512, 8),
    (4096, 256, 256, 8), (4096, 64, 256, 64), (8192, 256, 256, 16),
]  # fmt: skip
FEW_GROUPED = [(64, 32, 32, 4), (1024, 320, 128, 8), (1024, 128, 320, 8), (4096, 256, 256, 8)]
ROUTING = [(64, 8), (512, 8), (2048, 8), (2048, 64), (8192, 16)]
PERMUTE = [(2**10, 2), (2**14, 2), (2**16, 2), (2**16, 4), (2**18, 2), (2**18, 8), (2**20, 2)]


CASTS = ("quantize", "quantize_weight", "quantize_store")
CAST_ELEMENTS = [2**12, 2**16, 2**20]


def _few(points: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """`count` of the points, evenly spread, first and last included."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _elementwise(elements: list[int]) -> Grid:
    names = ("swiglu", "gelu", "squared_relu", "rope", "add", "accumulate", "copy", "cast")
    return {name: [(count,) for count in elements] for name in names}


def _by_work(points: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Smallest first, so that the time of each tells how long the next one takes."""

    def volume(point: tuple[int, ...]) -> int:
        total = 1
        for size in point:
            total *= size
        return total

    return sorted(set(points), key=lambda point: (volume(point), point))


def cpu_grid(dtype: str, busy: int, quick: bool) -> Grid:
    """Points per operator for one dtype and number of busy processes."""
    few = quick or busy > 2 or dtype != "fp32"
    linear: list[tuple[int, ...]]
    if few:
        rows = (256, 2048) if dtype == "fp32" else (64, 512) if busy <= 2 else (256,)
        linear = [(m, n, k) for m, (n, k) in product(rows, FEW_NK)]
        linear += [(16, 32, 32), (8192, 128, 128)] if dtype == "fp32" else [(16, 32, 32)]
    else:
        linear = [(m, n, k) for m, (n, k) in product((256, 2048), LINEAR_NK)] + LINEAR_EXTRA
    grid: Grid = {
        "linear": _by_work(linear),
        "linear_wgrad": _by_work(linear),
        "attention": FEW_ATTENTION if few else ATTENTION,
        "attention_full": FEW_ATTENTION_FULL if few else ATTENTION_FULL,
        "rmsnorm": FEW_NORM if few else NORM,
        "layernorm": FEW_NORM if few else NORM,
        **_elementwise(FEW_ELEMENTS if few else ELEMENTS),
        "embedding": _few(EMBEDDING, 4) if few else EMBEDDING,
        "cross_entropy": _few(CROSS_ENTROPY, 4) if few else CROSS_ENTROPY,
        "grouped_linear": FEW_GROUPED if few else GROUPED,
        "routing": _few(ROUTING, 3) if few else ROUTING,
        "permute": _few(PERMUTE, 4) if few else PERMUTE,
        "unpermute": _few(PERMUTE, 4) if few else PERMUTE,
    }
    if dtype == "fp32":
        grid["adamw"] = _few(ADAMW, 5) if few else ADAMW
        grid |= {name: COPIES for name in COPY_OPERATORS}
        grid["adamw_fp8"] = _few(ADAMW[:6], 3)
        grid |= {name: [(count,) for count in CAST_ELEMENTS] for name in CASTS}
    return grid


def cuda_grid(dtype: str) -> Grid:
    """Points per operator on a GPU."""
    square = [(n, n) for n in (256, 512, 1024, 2048, 4096, 8192)]
    shapes = [*square, (1024, 4096), (4096, 1024), (14336, 4096), (4096, 14336), (28672, 8192),
              (8192, 28672), (512, 4096), (4096, 512), (128256, 4096)]  # fmt: skip
    rows = (256, 2048, 8192) if dtype == "fp32" else (256, 2048, 8192, 32768)
    linear: list[tuple[int, ...]] = [(m, n, k) for m, (n, k) in product(rows, shapes)]
    if dtype == "fp8":
        return {"linear": _by_work(linear), "linear_wgrad": _by_work(linear)}
    tokens = [(256, 1024), (2048, 1024), (2048, 4096), (8192, 4096), (8192, 8192), (32768, 8192)]
    elements = [2**count for count in (10, 14, 17, 20, 22, 24, 26, 28)]
    grid: Grid = {
        "linear": _by_work(linear),
        "linear_wgrad": _by_work(linear),
        "attention": [
            (16, 512, 64), (32, 1024, 64), (64, 2048, 64), (32, 2048, 128), (32, 4096, 128),
            (32, 8192, 128), (8, 16384, 128), (8, 32768, 128),
        ],
        "attention_full": [
            (32, 1024, 64, 512), (32, 2048, 128, 1024), (32, 2048, 128, 2048),
            (32, 4096, 128, 4096), (8, 8192, 128, 8192), (8, 16384, 128, 16384),
        ],
        "rmsnorm": list(tokens),
        "layernorm": list(tokens),
        **_elementwise(elements),
        "embedding": [(2048, 1024, 256), (2048, 1024, 32768), (8192, 4096, 32768),
                      (8192, 4096, 128256)],
        "cross_entropy": [(2048, 256), (2048, 32768), (8192, 32768), (8192, 128256)],
        "grouped_linear": [
            (rows, out, width, groups)
            for rows in (4096, 32768)
            for out, width in ((2048, 2048), (14336, 4096), (4096, 14336), (2048, 7168))
            for groups in (8, 32)
        ],
        "routing": [(2048, 8), (8192, 64), (8192, 256), (32768, 128)],
        "permute": [(2**20, 2), (2**24, 2), (2**24, 8), (2**26, 4)],
        "unpermute": [(2**20, 2), (2**24, 2), (2**24, 8), (2**26, 4)],
        "copy_h2d": [(count,) for count in elements[2:]],
        "copy_d2h": [(count,) for count in elements[2:]],
    }  # fmt: skip
    if dtype == "fp32":
        grid["adamw"] = [(2**16, 20), (2**20, 20), (2**24, 100), (2**27, 100), (2**28, 300)]
        # one tensor each: launches of many take the host longer than the device works on them
        grid["adamw_fp8"] = [(2**20, 1), (2**24, 1), (2**27, 1)]
    else:
        grid |= {name: [(count,) for count in elements[1:7]] for name in CASTS}
    return grid


def compiled_grid() -> Grid:
    """Points per operator whose kernel is generated: few, as each is compiled anew."""
    elements = [2**count for count in (14, 20, 24, 27)]
    tokens = [(256, 1024), (2048, 4096), (32768, 4096)]
    names = ("swiglu", "gelu", "squared_relu", "rope")
    return {
        "rmsnorm": list(tokens),
        "layernorm": list(tokens),
        **{name: [(count,) for count in elements] for name in names},
    }


def message_sizes(quick: bool) -> list[int]:
    """Full logical buffers of collectives, in bytes."""
    if quick:
        return [4 << 10, 64 << 10, 512 << 10, 2 << 20, 8 << 20]
    return [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20]


def wait_calls(quick: bool) -> list[int]:
    """Reference matmuls that ranks run between two meetings."""
    return [1, 8, 48] if quick else [1, 4, 12, 32]
