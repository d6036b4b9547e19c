"""What a router is trained by besides the tokens' loss, and what it did: losses and statistics.

The fractions f of the balance loss are those of one micro-batch, or of the whole step so far: the
counts of all ranks are added to those of the step's earlier micro-batches, since later ones are not
known yet (Qiu et al. 2025, Demons in the Detail, section 3). The sum over ranks runs beside the
experts' matmuls. A recomputation in backward counts nothing and sums nothing.

Losses are scaled as the trainer scales that of tokens: a mean over micro-batches and replicas,
whose gradients tensor-parallel ranks add up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_compat import backward_node
from .routing import BalanceLoss, Routed, WithLoss, count_choices, z_loss


class RouterTraining:
    """Losses and statistics of one router on one rank."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.balance: Literal["none", "micro-batch", "global-batch"] = "none"
        self.balance_scale = 0.0
        """Weight of the balance loss in what is differentiated."""
        self.z_scale = 0.0
        self.group: dist.ProcessGroup | None = None
        """Ranks over which choices are counted; None = this one."""
        self.tokens_X: Tensor | None = None
        """Choices of this rank since the last `forget`."""
        self.balance_sum: Tensor | None = None
        """Sum of E sum f p over the forward passes since then."""
        self.passes = 0
        self.weight_sum: Tensor | None = None
        """Sum of all routing weights: not a number once a router gave one."""
        self._step_X: Tensor | None = None

    def begin_step(self) -> None:
        """A step begins: nothing is counted yet."""
        self._step_X = None

    def forget(self) -> None:
        """Start the statistics anew."""
        self.tokens_X, self.balance_sum, self.passes = None, None, 0

    def observe(self, logits_TX: Tensor, routed: Routed) -> Pending:
        """Count the choices of one forward pass, and send the counts on their way."""
        if backward_node() is not None:
            return Pending(self, logits_TX, routed, None, None)
        weight = routed.weights_TK.detach().sum()
        self.weight_sum = weight if self.weight_sum is None else self.weight_sum + weight
        counts_X = count_choices(routed.expert_TK, self.num_experts)
        self.tokens_X = counts_X if self.tokens_X is None else self.tokens_X + counts_X
        work: Any = None
        summed_X = counts_X.to(torch.int32)
        if self.balance != "none" and self.group is not None:
            work = dist.all_reduce(summed_X, group=self.group, async_op=True)
        return Pending(self, logits_TX, routed, summed_X, work)

    def fractions(self, counts_X: Tensor) -> Tensor:
        """Of all choices, those of each expert: with the step's earlier ones for a global batch."""
        if self.balance == "global-batch":
            counts_X = counts_X if self._step_X is None else counts_X + self._step_X
            self._step_X = counts_X
        return counts_X / counts_X.sum()

    @property
    def gave_nan(self) -> bool:
        """Whether a routing weight was not a finite number."""
        return self.weight_sum is not None and not bool(torch.isfinite(self.weight_sum))


class Pending:
    """The losses of one forward pass, while the counts are on their way."""

    def __init__(
        self,
        training: RouterTraining,
        logits_TX: Tensor,
        routed: Routed,
        counts_X: Tensor | None,
        work: Any,
    ) -> None:
        self.training, self.logits_TX, self.routed = training, logits_TX, routed
        self.counts_X, self.work = counts_X, work

    def weights(self) -> Tensor:
        """The routing weights, with what the losses want of them and of the scores."""
        training, routed = self.training, self.routed
        weights_TK = routed.weights_TK
        if training.z_scale:
            loss = z_loss(self.logits_TX)
            weights_TK = WithLoss.apply(weights_TK, loss, training.z_scale)
        slope_X = self._slope()
        if training.balance != "none":
            weights_TK = BalanceLoss.apply(weights_TK, routed.probabilities_TX, slope_X)
        return weights_TK  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def _slope(self) -> Tensor | None:
        """d loss / d score of each expert, the same for all tokens; None in a recomputation."""
        if self.counts_X is None:
            return None
        if self.work is not None:
            self.work.wait()
        training, probabilities_TX = self.training, self.routed.probabilities_TX
        fraction_X = training.fractions(self.counts_X)
        value = training.num_experts * (fraction_X * probabilities_TX.mean(dim=0)).sum()
        total = training.balance_sum
        training.balance_sum = value if total is None else total + value
        training.passes += 1
        scale = training.balance_scale * training.num_experts / len(probabilities_TX)
        return fraction_X * scale


def routers(module: nn.Module) -> dict[str, RouterTraining]:
    """The router trainings of a module's layers, by the name of the layer."""
    found = {name: getattr(m, "training_of_router", None) for name, m in module.named_modules()}
    return {name: own for name, own in found.items() if isinstance(own, RouterTraining)}
