"""One rank that counts live tensors of pipelines: pipeline_memory.py RANK WORLD FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import families

from forerun.executors.build import build
from forerun.executors.measure.memory import LiveTensors
from forerun.mesh import Mesh
from forerun.model import Layer, Model
from forerun.plan import Phase, Plan, Setting, even_stages, techniques
from forerun.schedules import LOOPED_SCHEDULES, SCHEDULES, V_SCHEDULES
from forerun.workload import Workload

SEQ, BATCH, MICRO, VOCAB = 64, 16, 2, 512
RECOMPUTES = ("none", "selective", "full")


def make_plan(schedule: str, recompute: str, tied: bool) -> Plan:
    """A pipeline of two ranks whose activations outweigh its states."""
    layer = Layer(repeat=8, heads=4, kv_heads=2, head_dim=16, ffn_hidden=128)
    model = Model(name="m", hidden=64, vocab=VOCAB, layers=(layer,), tied_embeddings=tied)
    mesh = Mesh(pp=2, vpp=2 if schedule in (*LOOPED_SCHEDULES, *V_SCHEDULES) else 1)
    phase = Phase(
        steps=1,
        seq_tokens=SEQ,
        micro_batch_seqs=MICRO,
        num_microbatches=BATCH // MICRO,
        mesh=mesh,
        schedule=schedule,  # pyright: ignore[reportArgumentType]
        stages=even_stages(model.num_layers, mesh.num_stages, "cpu"),
        settings=(Setting(layers=(0, 7), techniques=techniques("fp32", recompute)),),
    )
    workload = Workload(seq_tokens=SEQ, global_batch_seqs=BATCH, steps=1)
    plan = Plan(model=model, cluster=families.cluster(2), workload=workload, phases=(phase,))
    plan.check()
    return plan


def cases() -> list[tuple[str, str, bool]]:
    """Schedule, recompute mode and whether tables are tied."""
    every = [(s, r, tied) for s in SCHEDULES for r in RECOMPUTES for tied in (False, True)]
    return [case for case in every if not case[2] or case[1] == "none"]


def live_bytes(plan: Plan) -> int:
    """The peak of live tensors in one step after the first, on this rank."""
    trainer = build(plan, device=torch.device("cpu"))
    batch = torch.arange(BATCH * (SEQ + 1)).view(BATCH, SEQ + 1) % VOCAB
    parameters = [p for piece in trainer.pieces for p in piece.parameters()]
    live: Any = None
    for _ in range(2):
        heads = [piece for piece in trainer.pieces if piece.is_last]
        live = LiveTensors(logits_shape=(MICRO * SEQ, VOCAB) if heads else None)
        hooks = [live.watch_head(piece.norm) for piece in heads]
        states = [v for state in trainer.optimizer.state.values() for v in state.values()]
        trainer.observer = live
        with live:
            live.hold(parameters, "parameters")
            live.hold([v for v in states if isinstance(v, Tensor)], "optimizer")
            trainer.forward_backward(batch)
            live.hold([p.grad for p in parameters if p.grad is not None], "gradients")
            trainer.optimizer_step()
        for hook in hooks:
            hook.remove()
    return sum(live.peak().values())


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    peaks: list[int] = []
    for index, case in enumerate(cases()):
        store = f"file://{folder}/store{index}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        peaks.append(live_bytes(make_plan(*case)))
        dist.destroy_process_group()
    (folder / f"peaks{rank}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main()
