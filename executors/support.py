"""Which models can be executed at all; answered without torch, before any process starts."""

from __future__ import annotations

from ..errors import InputError
from ..model import Model


def check_model_kind(model: Model) -> None:
    """Raise InputError for a model that is predicted and planned but not executed yet."""
    if model.traced is None and not model.is_decoder:
        raise InputError("model", model.name,
                         "encoders, images and convolutions are not executed yet",
                         "run a decoder; this model can be planned and predicted")  # fmt: skip
