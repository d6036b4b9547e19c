"""Models of Hugging Face's transformers as modules of one's own: `hf:PATH`, from a local config.

PATH is a `config.json` or a folder with one. The causal language model that it names is built with
random weights; nothing is downloaded, and code that comes with a config is not run. Its own tensor-
parallel plan is used where all of its styles are known here.

Attention is torch's fused one, always causal and without a mask in memory: sequences are not
padded. The library would decide by whether tensors are fake, and so trace something else than runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .module_cuts import ALIASES, STYLES

PREFIX = "hf:"
LOGITS = "colwise_gather_output"
ATTENTION = "forerun_causal"
"""The name under which `causal_attention` is known to the library."""


def is_huggingface(target: str) -> bool:
    """Whether a model's name is `hf:PATH`.

    >>> is_huggingface("hf:llama/config.json"), is_huggingface("examples.mixer:build")
    (True, False)
    """
    return target.startswith(PREFIX)


class CausalModel(nn.Module):
    """A causal language model: tokens (B, S) to logits (B, S, V)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.tp_plan = tp_plan(inner)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.inner(input_ids=tokens_BS, use_cache=False).logits


def tp_plan(inner: nn.Module) -> dict[str, str]:
    """The model's own plan, its logits left divided; empty where a style is not known here."""
    given: dict[str, str] = dict(getattr(inner, "_tp_plan", None) or {})
    plan = {f"inner.{name}": ALIASES.get(style, style) for name, style in given.items()}
    if not set(plan.values()) <= set(STYLES):
        return {}
    return {
        name: "colwise_logits" if style == LOGITS and name.endswith("lm_head") else style
        for name, style in plan.items()
    }


def causal_attention(
    module: nn.Module,
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention (B, S, H, D), in the form that the library calls it by."""
    window = more.get("sliding_window")
    if window is not None and window < q_BHSD.shape[2]:
        raise InputError("seq-len", q_BHSD.shape[2], f"is beyond the model's window of {window}",
                         "use a shorter sequence, or a config without sliding_window")  # fmt: skip
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise InputError("model", type(module).__name__, f"its attention has {name}",
                             "use a model with plain causal attention")  # fmt: skip
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD,
        k_BGSD,
        v_BGSD,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1],
    )
    return out_BHSD.transpose(1, 2).contiguous(), None


def maker(target: str) -> Callable[[], nn.Module]:
    """A function that makes the model of `hf:PATH`; InputError where there is none."""
    path = Path(target.removeprefix(PREFIX))
    if not path.exists():
        raise InputError("model", target, "no such file or folder",
                         "give a local config.json, or its folder")  # fmt: skip
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the package is imported
    try:
        from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError("model", target, f"needs {error.name or 'transformers'}",
                         "pip install 'forerun[hf]'") from error  # fmt: skip
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError("model", target, f"is no config of a known model ({text})",
                         "give a config.json with its model_type") from error  # fmt: skip

    AttentionInterface.register(ATTENTION, causal_attention)

    def make() -> nn.Module:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
        return CausalModel(model)

    return make
