"""How long plans of large runs take, how sure they are, and how many candidates that needs.

    python benchmarks/bench_planner.py [--rounds 3]

Every job is planned in this process with free axes (cp, ep, offload and zero-bubble schedules
included); the table gives the median of the rounds. A candidate is a layout under one policy of
what layers keep, whose time and memory were both bounded; their rate is per CPU second of bounding.
"""

from __future__ import annotations

import argparse
import statistics
import time

from forerun.catalogs import load_cluster, load_model
from forerun.planner import Pins, search
from forerun.planner.candidates import OwnCost, Request, bound_all
from forerun.workload import Workload

JOBS = (
    ("gpt3-175b", "128x8xA100-80GB", 2048, 1536),
    ("megatron-1t", "384x8xA100-80GB", 2048, 3072),
    ("llama-3.1-405b", "2048x8xH100", 8192, 2048),
    ("deepseek-v3", "256x8xH100", 4096, 8192),
    ("llama-2-7b", "8xA100-80GB", 4096, 128),
)
"""Model, devices, tokens per sequence, sequences per step."""


def main() -> None:
    """Print one line per job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(
        f"{'job':42} {'wall s':>7} {'CPU s':>7} {'gap':>7} {'candidates':>11} {'per CPU s':>10}"
        f" {'simulated':>9}"
    )
    for name, devices, seq_tokens, batch in JOBS:
        model, cluster = load_model(name), load_cluster(devices)
        workload = Workload(seq_tokens=seq_tokens, global_batch_seqs=batch)
        walls, cpus, rates = [], [], []
        for _ in range(rounds):
            began, cpu = time.perf_counter(), time.process_time()
            result = search(model, cluster, workload)
            walls.append(time.perf_counter() - began)
            cpus.append(time.process_time() - cpu)
            cpu = time.process_time()
            bounded = bound_all(Request(model, cluster, workload, Pins(), OwnCost()))
            rates.append(bounded.evaluated / (time.process_time() - cpu))
        stats = result.stats
        job = f"{name} on {devices}"
        print(
            f"{job:42} {statistics.median(walls):7.2f} {statistics.median(cpus):7.2f}"
            f" {stats.gap or 0.0:7.2%} {stats.bounded:11,}"
            f" {statistics.median(rates):10,.0f} {stats.simulated:9}  {result.plans[0].label}"
        )


if __name__ == "__main__":
    main()
