"""Property tests here are short, and never judged by the clock of a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("short", max_examples=30)
settings.load_profile("short")
