"""Token choice: scores of experts, the top k of each token, and the losses that train a router.

    scores       s = softmax(z) or sigmoid(z) of the logits z, fp32
    weights      w of the k largest scores: s itself, or divided by their sum; times routed_scale
    balance loss E sum_i f_i p_i: f_i the fraction of choices that fall on expert i, p_i the mean
                 score of a token (a sigmoid's divided by the token's sum)
    z-loss       mean over tokens of (log sum exp z)^2

Both losses act on a router's own layer, so that they are not summed on the way to the last pipeline
stage: their gradients are put in where the backward passes by. f carries no gradient.

Sources: Fedus et al. 2021 (Switch Transformers), section 2.2; Qiu et al. 2025 (Demons in the
Detail); Zoph et al. 2022 (ST-MoE); DeepSeek-AI 2024 (arXiv 2412.19437), section 2.1.2.

Shape suffixes: T tokens that a rank routes at once, X experts, K choices per token, E hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...experts import Experts


class Routed(NamedTuple):
    """The choices of all tokens."""

    weights_TK: Tensor
    """fp32; their gradient trains the router."""
    expert_TK: Tensor
    """int64"""
    probabilities_TX: Tensor
    """fp32, of sum 1 per token."""


def route(logits_TX: Tensor, experts: Experts) -> Routed:
    """The top k experts of each token with their weights."""
    logits_TX = logits_TX.float()
    if experts.scores == "softmax":
        scores_TX = probabilities_TX = logits_TX.softmax(dim=-1)
    else:
        scores_TX = logits_TX.sigmoid()
        probabilities_TX = scores_TX / scores_TX.sum(dim=-1, keepdim=True)
    weights_TK, expert_TK = scores_TX.topk(experts.top_k, dim=-1)
    if experts.renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    if experts.routed_scale != 1.0:
        weights_TK = weights_TK * experts.routed_scale
    return Routed(weights_TK, expert_TK, probabilities_TX)


def count_choices(index: Tensor, size: int) -> Tensor:
    """How often each of 0..size-1 occurs, (size,) int64.

    Without the look at the values that `bincount` takes, which makes a GPU's host wait.
    """
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    flat = index.flatten()
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


class BalanceLoss(torch.autograd.Function):
    """Routing weights as they are; in backward the gradient of the balance loss joins.

    d (c E sum_i f_i p_i) / d score = c E f_i / T: one row for all tokens. It is kept on the node
    that the step's own forward made, not as a saved tensor: a recomputation, which must not count
    anything twice, does not need to know it.
    """

    @staticmethod
    def forward(
        ctx: Any, weights_TK: Tensor, probabilities_TX: Tensor, slope_X: Tensor | None
    ) -> Tensor:
        ctx.slope_X, ctx.shape = slope_X, probabilities_TX.shape
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        slope_X = ctx.slope_X
        return grads[0], None if slope_X is None else slope_X.expand(ctx.shape), None


class WithLoss(torch.autograd.Function):
    """Routing weights as they are; in backward a loss beside them gets the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], grads[0].new_tensor(ctx.scale), None


def z_loss(logits_TX: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of their logits."""
    return logits_TX.float().logsumexp(dim=-1).square().mean()
