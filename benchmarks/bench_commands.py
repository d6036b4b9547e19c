"""How long the commands take that plan: medians of wall time, whole processes.

python benchmarks/bench_commands.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

LARGE = ["plan", "--model", "llama-3.1-405b", "--gpus", "2048x8xH100", "--seq-len", "8192",
         "--global-batch", "2048", "--json"]  # fmt: skip
SMALL = ["plan", "--model", "llama-3.1-8b", "--gpus", "8xH100", "--seq-len", "8192",
         "--global-batch", "64", "--json"]  # fmt: skip
COMMANDS = {
    "--help (bar 0.3 s)": ["--help"],
    "plan llama-3.1-8b on 8 H100": SMALL,
    "plan llama-3.1-405b on 16,384 H100 (bar 3 s)": LARGE,
}


def wall_s(arguments: list[str]) -> float:
    """Seconds of one whole process."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "forerun", *arguments], check=True, capture_output=True, timeout=120
    )
    return time.perf_counter() - start


def main() -> None:
    for name, arguments in COMMANDS.items():
        samples = [wall_s(arguments) for _ in range(5)]
        print(f"{name}: median {statistics.median(samples):.2f} s, best {min(samples):.2f} s")


if __name__ == "__main__":
    main()
