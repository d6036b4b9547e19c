"""A user's module as this rank's part of a run: built for real, recomputed, replicated or sharded.

Every rank calls the user's function under the same seed, on the CPU, and so starts from the same
parameters, those that the module gives itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plan import Phase, Plan
from . import data_parallel
from .marks import Marks
from .optimizer import make_adamw
from .techniques.recompute import recomputed
from .torch_compat import DeviceMesh
from .trainer import Trainer
from .user_module import Inputs, Trainable, UserModule, load, seed_everything

Batch = list[Inputs]
"""The inputs of every micro-batch of a step."""


def check_supported(plan: Plan) -> None:
    """Raise InputError for layouts and techniques that a traced module does not run with."""
    phase = plan.phase
    for axis in ("tp", "pp", "cp", "ep"):
        degree = getattr(phase.mesh, axis)
        if degree > 1:
            raise InputError(axis, degree, "a traced module is divided by data parallelism alone",
                             f"use --{axis} 1")  # fmt: skip
    if phase.recompute not in ("none", "full"):
        raise InputError("recompute", phase.recompute, "a traced module recomputes whole blocks",
                         "use none or full")  # fmt: skip
    traced = plan.model.traced
    if traced is not None and phase.seq_tokens != traced.seq_tokens:
        raise InputError("seq-len", phase.seq_tokens,
                         f"{traced.target} was traced for {traced.seq_tokens}",
                         "plan again for this length")  # fmt: skip


class TracedTrainer(Trainer):
    """The trainer of a user's module, which makes its own batches where it takes no tokens."""

    user: UserModule

    def own_batch(self, step: int, dp_rank: int) -> Batch | None:
        """The step's micro-batches from the user's function; None where the corpus gives them.

        They depend on (seed, step, replica, micro-batch) alone.
        """
        if self.user.make_batch is None:
            return None
        made: Batch = []
        with torch.random.fork_rng(devices=[]):
            for index in range(self.phase.num_microbatches):
                place = dp_rank * self.phase.num_microbatches + index
                seed_everything(hash((self.plan.workload.seed, step, place)) % 2**63)
                inputs = self.user.inputs(self.phase.micro_batch_seqs, self.phase.seq_tokens)
                made.append(tuple(x.to(self.device) for x in inputs))
        return made

    def forward_backward(self, tokens_BS1: Tensor | Batch) -> Tensor:
        """Mean loss of this replica's samples, whose gradients now stand on the parameters."""
        if isinstance(tokens_BS1, Tensor):
            return super().forward_backward(tokens_BS1)
        total = torch.zeros((), device=self.device)
        num = len(tokens_BS1)
        for index, inputs in enumerate(tokens_BS1):
            with data_parallel.microbatch(self.modules[0], self.phase, index == num - 1):
                with self.marks.chunk("forward", "F0"):
                    loss = self.modules[0](*inputs) / num
                with self.marks.chunk("backward", "B0"):
                    loss.backward()
            total += loss.detach()
        return total


def build(plan: Plan, target: str, mesh: DeviceMesh, device: torch.device) -> TracedTrainer:
    """This rank's trainer of the module that `target` makes."""
    assert plan.model.traced is not None
    check_supported(plan)
    seed_everything(plan.workload.seed)
    user = load(target)
    user.module.train()
    marks = Marks()
    piece = Trainable(user, plan.model.traced.blocks).to(device)
    _recompute(piece, plan.phase, marks)
    module: nn.Module = piece
    if data_parallel.uses_fsdp(plan.phase):
        data_parallel.apply_fsdp(piece, plan.phase, mesh)  # pyright: ignore[reportArgumentType]
    elif plan.phase.mesh.dp > 1:
        module = data_parallel.apply_ddp(piece, mesh)  # pyright: ignore[reportArgumentType]
    trained = [p for p in piece.parameters() if p.requires_grad]
    optimizer = make_adamw(trained, plan.workload.learning_rate)
    pieces: list = [piece]
    trainer = TracedTrainer(plan, device, mesh, pieces, [module], None, optimizer, None, {}, marks)
    trainer.user = user
    return trainer


def _recompute(piece: Trainable, phase: Phase, marks: Marks) -> None:
    """Full recomputation of the blocks that the plan names; random operators repeat themselves."""
    for index, block in enumerate(piece.blocks.values()):
        if phase.technique("recompute", index).get("mode", "none") == "full":
            block.forward = partial(recomputed(block.forward, marks), preserve_rng_state=True)
