"""Workloads: sizes are positive, batches are counted both ways."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from forerun.errors import InputError
from forerun.workload import Workload


def test_batch_in_tokens() -> None:
    assert Workload(seq_tokens=8192, global_batch_seqs=64).global_batch_tokens == 524288


@pytest.mark.parametrize("field", ["seq_tokens", "global_batch_seqs", "steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(field: str, value: int) -> None:
    sound = Workload(seq_tokens=8, global_batch_seqs=1)
    with pytest.raises(InputError, match=f"^{field}={value}"):
        replace(sound, **{field: value})
