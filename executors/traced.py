"""A user's module as this rank's part of a run: built for real, cut, staged, recomputed, sharded.

Every rank calls the user's function under the same seed, on the CPU, and so starts from the same
parameters, those that the module gives itself. What draws from generators in a step - dropout, the
module's own batches - is seeded by the step, so that a resumed run draws the same again.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plan import Phase, Plan
from . import data_parallel, module_cuts, module_stages
from .away import Away
from .data import Rows
from .landing import Landing
from .marks import Marks
from .module_cuts import GroupLinks
from .module_stages import Stage
from .pipeline import Pipeline, local_stages
from .techniques.offload import Setting
from .techniques.recompute import recomputed
from .torch_compat import DeviceMesh
from .trainer import Trainer, tied_groups
from .user_module import Inputs, Trainable, UserModule, load, seed_everything

Batch = list[Inputs]
"""The inputs of every micro-batch of a step."""


def check_supported(plan: Plan) -> None:
    """Raise InputError for techniques that a traced module does not run with."""
    phase = plan.phase
    if phase.recompute not in ("none", "full"):
        raise InputError("recompute", phase.recompute, "a traced module recomputes whole blocks",
                         "use none or full")  # fmt: skip
    traced = plan.model.traced
    if traced is not None and phase.seq_tokens != traced.seq_tokens:
        raise InputError("seq-len", phase.seq_tokens,
                         f"{traced.target} was traced for {traced.seq_tokens}",
                         "plan again for this length")  # fmt: skip


NO_SAMPLE = 2**40
"""Beyond all samples: what a replica draws besides them."""


def sample_seed(seed: int, step: int, sample: int) -> int:
    """What a sample of the global batch of a step is drawn from."""
    return hash((seed, step, sample)) % 2**63


class TracedTrainer(Trainer):
    """The trainer of a user's module, which makes its own batches where it takes no tokens."""

    user: UserModule

    def own_batch(self, step: int, dp_rank: int) -> Batch | None:
        """The step's micro-batches from the user's function; None where the corpus gives them.

        Sample i of the global batch depends on (seed, step, i) alone, as a corpus' sequence does.
        """
        if self.user.make_batch is None:
            return None
        size, num = self.phase.micro_batch_seqs, self.phase.num_microbatches
        made: Batch = []
        for index in range(num):
            first = (dp_rank * num + index) * size
            seeds = [
                sample_seed(self.plan.workload.seed, step, sample)
                for sample in range(first, first + size)
            ]
            inputs = self.user.samples(seeds, self.phase.seq_tokens)
            made.append(tuple(x.to(self.device) for x in inputs))
        return made

    def seed_step(self, step: int, dp_rank: int) -> None:
        """Seed what the module draws in a step: alike on all ranks of a replica."""
        seed_everything(sample_seed(self.plan.workload.seed, step, NO_SAMPLE + dp_rank))

    def forward_backward(self, tokens_BS1: Tensor | Rows | Batch) -> Tensor:
        """Mean loss of this replica's samples, whose gradients now stand on the parameters."""
        if isinstance(tokens_BS1, (Tensor, Rows)):
            return super().forward_backward(tokens_BS1)
        if self.pipeline is not None:
            inputs = tuple(torch.cat(column) for column in zip(*tokens_BS1, strict=True))
            behind = {f"given_{index}": x for index, x in enumerate(inputs)}
            loss = self.pipeline.run(inputs, behind, inputs[0])
        else:
            loss = self._accumulate_batches(tokens_BS1)
        self.reduce_shared_gradients()
        return loss

    def _accumulate_batches(self, batches: Batch) -> Tensor:
        total = torch.zeros((), device=self.device)
        num = len(batches)
        for index, inputs in enumerate(batches):
            with data_parallel.microbatch(self.modules[0], self.phase, index == num - 1):
                with self.marks.chunk("forward", "F0"):
                    loss = self.modules[0](*inputs) / num
                with self.marks.chunk("backward", "B0"):
                    loss.backward()
            total += loss.detach()
        return total


def build(
    plan: Plan, target: str, mesh: DeviceMesh, device: torch.device, marks: Marks, away: Away
) -> TracedTrainer:
    """This rank's trainer of the module that `target` makes."""
    assert plan.model.traced is not None
    check_supported(plan)
    phase, traced = plan.phase, plan.model.traced
    seed_everything(plan.workload.seed)
    user = load(target)
    user.module.train()
    pieces: list = []
    modules: list[nn.Module] = []
    tp_dims: dict[str, int] = {}
    stages = local_stages(phase, mesh.get_local_rank("pp"))
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        own = user if last else _copied(user)
        dims, links = _cut(own, plan, mesh)
        if phase.mesh.pp > 1:
            ends = module_stages.plan_of(own.module, target)
            assert ends is not None
            piece: Trainable = Stage(own, ends, traced, phase.stages[stage].layers)
        else:
            piece = Trainable(own, traced.blocks)
        piece.links = links
        piece.to(device)
        first = phase.stages[stage].layers[0]
        _recompute(piece, phase, marks, first)
        _offload(piece, phase, away, device, first)
        pieces.append(piece)
        modules.append(_replicate_or_shard(piece, phase, mesh))
        names = dict(piece.named_parameters())
        tp_dims |= {f"module.{n}": dim for n, dim in dims.items() if f"module.{n}" in names}
    pipeline = None
    if phase.mesh.pp > 1:
        pipeline = Pipeline(pieces, phase, plan.model, mesh, device, marks,
                            first=_first_inputs(user, phase))  # fmt: skip
    trained = [p for piece in pieces for p in piece.named_parameters() if p[1].requires_grad]
    optimizer = away.make_optimizer(plan.workload, trained)
    trainer = TracedTrainer(plan, device, mesh, pieces, modules, pipeline, optimizer,
                            tied_groups(plan), tp_dims, marks, away)  # fmt: skip
    trainer.shared = tuple(f"module.{weight.name}" for weight in traced.shared)
    trainer.user = user
    return trainer


def _copied(user: UserModule) -> UserModule:
    """The same with a module of its own, for another stage of the rank."""
    return UserModule(
        target=user.target, module=copy.deepcopy(user.module), make_batch=user.make_batch
    )


def _cut(
    user: UserModule, plan: Plan, mesh: DeviceMesh
) -> tuple[dict[str, int], GroupLinks | None]:
    """Cut a module over tp: dimension by parameter, and the group where the loss needs it."""
    if plan.phase.mesh.tp == 1:
        return {}, None
    styles = module_cuts.plan_of(user.module, user.target)
    links = GroupLinks(mesh.get_group("tp"), mesh.get_local_rank("tp"))
    dims = module_cuts.cut(user.module, styles, links, user.target)
    return dims, links if module_cuts.returns_divided_logits(styles) else None


def _replicate_or_shard(piece: Trainable, phase: Phase, mesh: DeviceMesh) -> nn.Module:
    """The module to call: the piece under FSDP, DDP around it, or the piece itself."""
    if data_parallel.uses_fsdp(phase):
        data_parallel.apply_fsdp(piece, phase, mesh)  # pyright: ignore[reportArgumentType]
    elif data_parallel.uses_ddp(phase):
        return data_parallel.apply_ddp(piece, phase, mesh)  # pyright: ignore[reportArgumentType]
    return piece


def _first_inputs(user: UserModule, phase: Phase) -> tuple[Tensor, ...]:
    """The form of what the first stage takes: one micro-batch, on the meta device."""
    made = user.inputs(phase.micro_batch_seqs, phase.seq_tokens)
    taken = made[:1] if user.make_batch is None else made
    return tuple(torch.empty(x.shape, dtype=x.dtype, device="meta") for x in taken)


def _recompute(piece: Trainable, phase: Phase, marks: Marks, first: int) -> None:
    """Full recomputation of the blocks that the plan names; random operators repeat themselves."""
    for index, block in enumerate(piece.blocks.values(), start=first):
        if phase.technique("recompute", index).get("mode", "none") == "full":
            block.forward = partial(recomputed(block.forward, marks), preserve_rng_state=True)


def _offload(piece: Trainable, phase: Phase, away: Away, device: torch.device, first: int) -> None:
    """Blocks move what the plan says of what they keep; without a mover nothing."""
    if away.mover is None:
        return
    landing = Landing(device)
    for index, block in enumerate(piece.blocks.values(), start=first):
        setting = Setting.of(phase, index)
        block.forward = away.mover.around(block, index, landing, setting, None)
