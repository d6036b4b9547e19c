"""Every kernel compiles for GPUs without one: what the interpreter cannot say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.version.cuda = "0"  # kernels leave Triton alone where torch has no GPU to run them
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from forerun.kernels import adamw_fp8, dequantize, fp8_cast, hadamard

POINTERS = {"p_ptr": "*fp32", "g_ptr": "*fp32", "m_codes": "*u8", "v_codes": "*u8",
            "m_groups": "*fp32", "v_groups": "*fp32", "skipped_ptr": "*i32", "x_ptr": "*bf16",
            "tops_ptr": "*fp32", "scale_ptr": "*fp32", "codes_ptr": "*u8", "transposed_ptr": "*u8",
            "scales_ptr": "*i16", "out_ptr": "*i16", "table_ptr": "*fp32", "zeros_ptr": "*u8",
            "block_ptr": "*fp32"}
WHOLE = ("num_groups", "columns", "per_row", "count", "rows", "width", "blocks", "first_row",
         "first_block", "row_bytes", "zero_rows", "order")
STEP = dict(LOG2_RANGE=adamw_fp8.LOG2_RANGE, STEPS=16, LEAST=1 / 16, LARGEST=64.0,
            SMALLEST=adamw_fp8.SMALLEST, IS_BF16=False, BLOCK=8, GROUP=128)
KERNELS = [
    (adamw_fp8._step_kernel, STEP),
    (adamw_fp8._step_kernel, {**STEP, "IS_BF16": True}),
    (fp8_cast._top_kernel, dict(BLOCK=fp8_cast.TOP_BLOCK)),
    (fp8_cast._cast_kernel, dict(PLAIN=True, TRANSPOSED=True, IS_E4M3=True, TILE=64)),
    (fp8_cast._cast_kernel, dict(PLAIN=True, TRANSPOSED=False, IS_E4M3=False, TILE=64)),
    (fp8_cast._pack_kernel, dict(LEAST=1e-20, BLOCK=64, GROUP=16)),
    (fp8_cast._unpack_kernel, dict(IS_BF16=True, BLOCK=64, GROUP=16)),
    (dequantize._nf4_kernel, dict(IS_BF16=True, PER_STEP=dequantize.PER_STEP, BLOCK=64, GROUP=256,
                                  PROGRAM=1024)),
    (dequantize._grid_kernel, dict(IS_BF16=True, BITS=3, GROUP=128, PROGRAM=1024)),
    (hadamard._cast_kernel, dict(BLOCK=hadamard.CAST_BLOCK)),
    *((hadamard._rotate_kernel,
       dict(WHAT=what, IS_BF16=True, WHOLE=whole, REST=rest, WIDE=wide, SOME=min(whole, 32),
            STEPS=rest.bit_length() - 1))
      for what, whole, rest, wide in (
          (0, 1, 4096, False), (1, 32, 512, False), (2, 256, 64, False), (2, 32, 64, True))),
]
SCALES = {"_nf4_kernel": "*u8", "_grid_kernel": "*fp16"}
found = []
for capability in map(int, sys.argv[1:]):
    for kernel, constants in KERNELS:
        kinds = dict(POINTERS)
        kinds["scales_ptr"] = SCALES.get(kernel.__name__, kinds["scales_ptr"])
        if constants.get("IS_BF16") and kernel is adamw_fp8._step_kernel:
            kinds |= {"p_ptr": "*i16", "g_ptr": "*bf16"}
        if kernel in (hadamard._cast_kernel, hadamard._rotate_kernel):
            kinds["codes_ptr"] = "*i8"
        signature = {
            name: "constexpr" if name in constants
            else kinds.get(name) or ("i32" if name in WHOLE else "fp32")
            for name in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(kernel, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8 if kernel is hadamard._rotate_kernel else 4},
        )
        found.append([kernel.__name__, capability, made.metadata.shared, len(made.asm["cubin"])])
print(json.dumps(found))
"""
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """In a process of its own: Triton is an interpreter in this one."""
    program = tmp_path / "compile.py"
    program.write_text(PROGRAM)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    source = Path(__file__).parents[2] / "src"
    env |= {"PYTHONPATH": str(source), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(program), str(capability)],
        capture_output=True, text=True, env=env, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) == 14
    for name, _, shared, size in kernels:
        assert shared <= SHARED_BYTES[capability] and size > 0, name
