"""The chunks that paced runs are held to: what the simulator plays, in named parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forerun.costmodel import estimate
from forerun.costmodel.chunk_times import UPDATE, chunk_times, with_own_cores
from forerun.costmodel.schedule import orders, play
from forerun.plan import Plan
from forerun.schedules import SPLIT_SCHEDULES

MakePlan = Callable[..., Plan]
CASES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h2", 1), ("zb-v", 2), ("dualpipev", 2)]


@pytest.mark.parametrize(("schedule", "v"), CASES)
@pytest.mark.parametrize("gpus", ["8xH100", "8xcpu"])
def test_playing_the_chunks_gives_the_step(
    make_plan: MakePlan, gpus: str, schedule: str, v: int
) -> None:
    plan = with_own_cores(
        make_plan("tiny-1m", gpus, seq_tokens=128, global_batch_seqs=32, compute="fp32", pp=2,
                  vpp=v, tp=2, dp_replicate=2, schedule=schedule)
    )  # fmt: skip
    times = chunk_times(plan)
    seconds = {key: sum(terms.values()) for rank in times.by_rank for key, terms in rank.items()}
    order = orders(schedule, 2, v, plan.phase.num_microbatches)
    overlaps = plan.cluster.pools[0].stack.can_overlap
    hop_s = 0.0 if overlaps else times.hop_s
    played = play(order, lambda action: seconds[f"{action[0]}{action[1]}"], hop_s)
    fill_s = 2 * times.hop_s if overlaps else 0.0
    update_s = max(sum(rank[UPDATE].values()) for rank in times.by_rank)
    assert played.makespan_s + fill_s + update_s == pytest.approx(times.step_s, rel=5e-3)
    assert estimate(plan).step_s.median == pytest.approx(times.step_s)


def test_halves_of_a_backward_are_the_whole(make_plan: MakePlan) -> None:
    for schedule in SPLIT_SCHEDULES[:2]:
        plan = make_plan(pp=4, dp_replicate=2, schedule=schedule)
        for rank, chunks in enumerate(chunk_times(plan).by_rank):
            assert set(chunks) == {f"{kind}{rank}" for kind in "FBIW"} | {UPDATE}
            whole, first, second = (sum(chunks[f"{k}{rank}"].values()) for k in "BIW")
            assert whole == pytest.approx(first + second, rel=1e-6)
            assert first > 0 and second > 0
