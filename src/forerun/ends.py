"""Parameters and FLOPs of what stands before and behind a model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Layer, Model


def norm_params(layer: Layer, hidden: int) -> int:
    """Weights of one norm of a layer's kind."""
    return hidden * (1 if layer.norm == "rmsnorm" else 2)


def takes_patches(model: Model, stack: int) -> bool:
    """Whether images enter a stack as patches."""
    return model.patches is not None and stack == 0


def takes_tokens(model: Model, stack: int) -> bool:
    """Whether token ids enter a stack."""
    return model.vocab > 0 and not takes_patches(model, stack)


def num_positions(model: Model, stack: int) -> int:
    """Learned positions of a stack's input."""
    if model.positions != "learned":
        return 0
    if model.patches is not None and stack == 0:
        return model.patches.num_tokens
    return (model.max_positions or 0) if model.vocab else 0


def input_params(model: Model) -> int:
    """Tables, patch embedding, positions and conditioning; the norm that ends an encoder."""
    first = model.stacks[0]
    hidden = model.width(first)
    params = model.token_types * hidden
    if model.patches is not None:
        params += model.patches.num_params(hidden)
    if model.conditioning is not None:
        params += model.conditioning.num_params(hidden)
    if model.embedding_norm:
        params += norm_params(first, hidden)
    if model.encoder is not None:
        params += norm_params(first, hidden)
    widths = [model.width(x) for k, x in enumerate(model.stacks) if takes_tokens(model, k)]
    if widths:  # stacks share one table
        params += model.vocab * widths[0]
    for k, layer in enumerate(model.stacks):
        params += num_positions(model, k) * model.width(layer)
        params += model.relative_buckets * layer.heads
    return params


def input_flops(model: Model) -> float:
    """FLOPs of one sample's forward before the layers; looking up tables costs none."""
    hidden, flops = model.width(model.stacks[0]), 0.0
    if model.patches is not None:
        flops += 2.0 * model.patches.num_patches * model.patches.pixels * hidden
    if model.conditioning is not None:
        flops += model.conditioning.forward_flops(hidden)
    return flops


def diffusion_outputs(model: Model) -> int:
    """Outputs per token of a diffusion head: mean and variance of each value of a patch."""
    return 2 * model.patches.pixels if model.patches is not None else 0


def head_params(model: Model) -> int:
    """Weights behind the layers."""
    last = model.layers[-1]
    hidden = model.width(last)
    norm = norm_params(last, hidden)
    table = 0 if model.tied_embeddings else hidden * model.vocab
    match model.head:
        case "lm":
            return norm + table
        case "mlm":
            return hidden * (hidden + 1) + norm + table + model.vocab
        case "classifier":
            norm = 0 if last.kind == "conv" else norm
            return norm + (hidden + 1) * model.num_classes
        case "projection":
            towers = [(x, model.width(x)) for x in model.stacks]
            return 1 + sum(norm_params(x, h) + h * model.projection for x, h in towers)
        case "diffusion":
            return 2 * hidden * (hidden + 1) + (hidden + 1) * diffusion_outputs(model)


def head_flops(model: Model, seq_tokens: int) -> float:
    """FLOPs of one sample's forward behind the layers, comparisons between samples left out."""
    last = model.layers[-1]
    hidden = model.width(last)
    tokens = last.tokens(seq_tokens)
    match model.head:
        case "lm":
            return 2.0 * tokens * hidden * model.vocab
        case "mlm":
            return 2.0 * tokens * model.head_share * hidden * (hidden + model.vocab)
        case "classifier":
            return 2.0 * hidden * model.num_classes
        case "projection":
            return sum(2.0 * model.width(x) * model.projection for x in model.stacks)
        case "diffusion":
            return 4.0 * hidden**2 + 2.0 * tokens * hidden * diffusion_outputs(model)
