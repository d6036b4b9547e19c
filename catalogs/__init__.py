"""What is known: hardware, models, software stacks, techniques, lengths, workloads - data files.

One TOML document per entry, and one small loader. Loading a name reads that one file.
"""

from __future__ import annotations

from .evidence import load_evidence, save_evidence
from .loader import (
    KINDS,
    Hardware,
    Lengths,
    Technique,
    WorkloadEntry,
    entries,
    entry,
    load_hardware,
    load_lengths,
    load_stack,
    load_technique,
    names,
    read_lengths,
)
from .profiles import load_user_profile, save_user_profile, user_profile_path
from .spellings import Resolved, load_cluster, load_model, resolve_gpus

__all__ = [
    "KINDS",
    "Hardware",
    "Lengths",
    "Resolved",
    "Technique",
    "WorkloadEntry",
    "entries",
    "entry",
    "load_cluster",
    "load_evidence",
    "load_hardware",
    "load_lengths",
    "load_model",
    "load_stack",
    "load_technique",
    "load_user_profile",
    "names",
    "read_lengths",
    "resolve_gpus",
    "save_evidence",
    "save_user_profile",
    "user_profile_path",
]  # fmt: skip
