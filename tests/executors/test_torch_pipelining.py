"""The adapter's own logic."""

from __future__ import annotations

from torch.distributed.pipelining.schedules import _Action

from forerun.executors.torch_pipelining import gathered_once, reduced_last

ORDER = ["0UNSHARD", "2UNSHARD", "0F0", "0RESHARD", "2F0", "4UNSHARD", "4F0", "4B0", "4RESHARD",
         "2B0", "2RESHARD", "0UNSHARD", "0B0", "0RESHARD"]  # fmt: skip


def test_each_stage_is_gathered_at_its_first_use_and_freed_at_its_last() -> None:
    actions = [_Action.from_str(text) for text in ORDER]
    kept = [str(action) for action in gathered_once(actions)]
    expected = [*ORDER[:3], *ORDER[4:11], *ORDER[12:]]
    assert kept == [str(_Action.from_str(text)) for text in expected]


def test_a_shared_table_is_reduced_when_nobody_uses_it_any_more() -> None:
    """Stage 0 holds the table that stage 3 of the same rank uses until its W."""
    texts = ["0F0", "3F0", "3I0", "0I0", "0W0", "0REDUCE_GRAD", "0RESHARD", "3W0", "3REDUCE_GRAD"]
    actions = [_Action.from_str(text) for text in texts]
    moved = [str(action) for action in reduced_last(actions, 0)]
    expected = [*texts[:5], *texts[7:], *texts[5:7]]
    assert moved == [str(_Action.from_str(text)) for text in expected]
