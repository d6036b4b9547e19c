"""Which software stack a published run used: an entry that names its source, or by its layout.

A stack entry may list `sources`: words of a table's `source` or `source_ref`, each optionally with
a release, such as `nemo@25.04`, which must then begin the release that the notes state. Entries
speak for the device family that their name ends with (`torchtitan-h100`).
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from ..stack import Stack
from .loader import load_stack, names


class Published(NamedTuple):
    """What a table says of the software behind a row."""

    source: str
    source_ref: str = ""
    release: str = ""


def stack_named_for(published: Published, family: str) -> Stack | None:
    """The entry whose `sources` name this source, or None.

    A word in `source` goes before one in `source_ref`, one with the release before one without,
    a longer one before a shorter.
    """
    found: list[tuple[bool, bool, int, str, Stack]] = []
    for stack in _stacks_of(family):
        for entry in stack.sources:
            word, _, release = entry.partition("@")
            if release and not published.release.startswith(release):
                continue
            for in_source, text in ((True, published.source), (False, published.source_ref)):
                if _has_word(text, word):
                    found.append((in_source, bool(release), len(entry), stack.name, stack))
    return max(found, key=lambda item: item[:4])[4] if found else None


def stack_for_layout(family: str, *, tp: int, pp: int, zero: int) -> Stack:
    """The stack that such a layout is usually run with, on this device family.

    Fully sharded parameters speak for PyTorch FSDP, model parallelism or a sharded optimiser
    without them for Megatron.
    """
    megatron = zero < 3 and (tp > 1 or pp > 1 or zero == 1)
    return load_stack_once("megatron" if megatron else "pytorch-fsdp", family)


@functools.cache
def load_stack_once(name: str, family: str) -> Stack:
    """The stack of that name for the family; its file is read once."""
    return load_stack(name, family)


@functools.cache
def _stacks_of(family: str) -> tuple[Stack, ...]:
    """Entries of a device family that name their sources."""
    stems = (stem for stem in names("stacks") if stem.endswith(f"-{family}"))
    return tuple(stack for stack in map(load_stack, stems) if stack.sources)


def _has_word(text: str, word: str) -> bool:
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"
    return bool(word) and re.search(pattern, text, re.IGNORECASE) is not None
