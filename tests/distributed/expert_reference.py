"""Training of a mixture of experts by a plain loop, with the losses of its routers written out.

The module is the plain decoder on one process. Balance losses are computed here, from the routers'
logits, over the same tokens as a plan's: the micro-batches of all replicas, or each replica's.
Capacity is a matter of the tokens that a rank routes at once, so that the reference routes the same
groups of them: a replica's micro-batch, or its parts along the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import families
import torch
import torch.nn.functional as F
from plain_loop import train_plainly, whole_model
from torch import Tensor, nn

from forerun.executors.decoder import Decoder
from forerun.executors.experts.layer import Moe
from forerun.plan import Plan

Logits = dict[str, list[Tensor]]


def in_parts(forward: Callable[[Tensor], Tensor], parts: int, x_BSE: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in x_BSE.chunk(parts, dim=1)], dim=1)


def make_piece(plan: Plan, logits: Logits) -> Decoder:
    """The whole model, which routes as a plan's ranks do and notes its routers' logits."""
    piece = whole_model(plan.model)
    parts = plan.phase.mesh.tp if plan.phase.sequence_parallel else 1
    for name, moe in piece.named_modules():
        if isinstance(moe, Moe):
            moe.forward = partial(in_parts, moe.forward, parts)

            def note(_: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                logits.setdefault(name, []).append(out)

            moe.router.register_forward_hook(note)
    return piece


def scores(plan: Plan, logits_TX: Tensor) -> Tensor:
    """Scores that sum to one for each token."""
    experts = plan.model.layers[-1].experts
    assert experts is not None
    if experts.scores == "softmax":
        return logits_TX.softmax(dim=-1)
    return logits_TX.sigmoid() / logits_TX.sigmoid().sum(dim=-1, keepdim=True)


class RouterLosses:
    """The losses of all routers in one step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.counts: dict[str, Tensor] = {}
        """Choices of the step so far, of all replicas."""

    def of_micro_batch(self, replicas: list[Logits]) -> Tensor:
        """Of one micro-batch on every replica: the mean over replicas."""
        total = torch.zeros(())
        names = replicas[0] if replicas else {}
        for name in names:
            each = [torch.cat(logits[name]) for logits in replicas]
            own = [self._counts(logits_TX) for logits_TX in each]
            self.counts[name] = self.counts.get(name, torch.zeros(())) + sum(own)
            for logits_TX, counts_X in zip(each, own, strict=True):
                total = total + self._loss(name, logits_TX, counts_X) / len(replicas)
        return total

    def _counts(self, logits_TX: Tensor) -> Tensor:
        experts = self.plan.model.layers[-1].experts
        assert experts is not None
        chosen = logits_TX.topk(experts.top_k, dim=-1).indices
        return torch.bincount(chosen.flatten(), minlength=logits_TX.shape[-1]).float()

    def _loss(self, name: str, logits_TX: Tensor, counts_X: Tensor) -> Tensor:
        workload = self.plan.workload
        z = workload.router_z_loss_coef * logits_TX.logsumexp(dim=-1).square().mean()
        if workload.balance_loss == "none":
            return z
        if workload.balance_loss == "global-batch":
            counts_X = self.counts[name]
        fraction_X = counts_X / counts_X.sum()
        even = len(fraction_X) * (fraction_X * scores(self.plan, logits_TX).mean(dim=0)).sum()
        return z + workload.balance_loss_coef * even


def reference(plan: Plan) -> dict[str, Any]:
    """Losses of all steps and gradients of the first, as they are clipped."""
    logits: Logits = {}
    piece = make_piece(plan, logits)
    dp, num = plan.phase.mesh.dp, plan.phase.num_microbatches

    def backward_of(step: int) -> float:
        replicas = [part.chunk(num) for part in families.tokens(step).chunk(dp)]
        routers, total = RouterLosses(plan), 0.0
        for index in range(num):
            noted: list[Logits] = []
            loss = torch.zeros(())
            for replica in replicas:
                logits.clear()
                out = piece(replica[index][:, :-1]).flatten(0, 1)
                loss = loss + F.cross_entropy(out, replica[index][:, 1:].flatten()) / dp
                noted.append(dict(logits))
            total += loss.item() / num
            ((loss + routers.of_micro_batch(noted)) / num).backward()
        return total

    return train_plainly(piece, backward_of, families.STEPS, plan.workload.clip_norm)
