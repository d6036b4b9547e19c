"""The user's own evidence on techniques (`forerun probe`), one document per probe in the user's
data folder, beside the profiles."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..document import read, write
from ..evidence import Evidence
from .profiles import user_data_folder


def evidence_folder() -> Path:
    """Where it stands; it need not exist yet."""
    return user_data_folder() / "evidence"


def load_evidence() -> tuple[Evidence, ...]:
    """All of it, in the order of its files."""
    return tuple(read(Evidence, path) for path in sorted(evidence_folder().glob("*.json")))


def save_evidence(evidence: Evidence) -> Path:
    """Write one, in place of what was measured before in the same way; returns where it stands."""
    asked = (evidence.setting, evidence.model, evidence.device, evidence.optimizer)
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:8]
    path = evidence_folder() / f"{evidence.technique}-{digest}.json"
    write(path, evidence)
    return path
