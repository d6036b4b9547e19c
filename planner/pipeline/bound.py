"""A lower bound of the makespan of any order under a memory limit.

Rank r with first stage a and last stage b works busy(r) per micro-batch, m times. It idles

    head(r)             until the first forward reaches it: sum over i < a of F(i) and transfers
    arrival(r) - fill   before the first gradient reaches it, which cannot be earlier than
                        arrival(r) = sum of all F + sum over i > b of I(i) + transfers,
                        while memory holds no more than `fill` of forward work

    makespan >= m busy(r) + max(head(r), arrival(r) - fill(r))
    makespan >= head(r) + m sum over its stages i of activation(i) life(i) / limit

The last counts memory times time: a micro-batch stays on stage i at least for its own F, I and W
and all that the stages behind it do in between. The bound is the largest over the ranks.
"""

from __future__ import annotations

from .actions import Pipeline


def lower_bound_s(pipeline: Pipeline, limit: float) -> float:
    """The makespan that no order with at most `limit` activations per rank can go below."""
    return max(_rank_bound_s(pipeline, rank, limit) for rank in range(pipeline.num_ranks))


def _rank_bound_s(pipeline: Pipeline, rank: int, limit: float) -> float:
    stages = pipeline.stages_of[rank]
    m = pipeline.num_micro_batches
    head_s = _forward_until(pipeline, stages[0])
    arrival_s = _forward_until(pipeline, stages[-1]) + pipeline.forward_s[stages[-1]]
    arrival_s += _behind(pipeline, stages[-1])
    idle_s = max(head_s, arrival_s - _fill_s(pipeline, stages, limit))
    held = sum(
        pipeline.activation[i]
        * (
            pipeline.forward_s[i]
            + _behind(pipeline, i)
            + pipeline.input_s[i]
            + pipeline.weight_s[i]
        )
        for i in stages
    )
    return max(m * pipeline.busy_s(rank) + idle_s, head_s + m * held / limit)


def _forward_until(pipeline: Pipeline, stage: int) -> float:
    """From the start of the first stage's forward to that of this stage."""
    return sum(pipeline.forward_s[i] + pipeline.hop_s(i, i + 1) for i in range(stage))


def _behind(pipeline: Pipeline, stage: int) -> float:
    """From the end of a stage's forward to the arrival of its gradient."""
    return sum(
        pipeline.forward_s[i] + pipeline.input_s[i] + 2 * pipeline.hop_s(i - 1, i)
        for i in range(stage + 1, pipeline.num_stages)
    )


def _fill_s(pipeline: Pipeline, stages: tuple[int, ...], limit: float) -> float:
    """The most forward work whose activations fit at once: largest time per activation first."""
    room, work_s = limit * (1 + 1e-12), 0.0
    for i in sorted(stages, key=lambda i: -pipeline.forward_s[i] / pipeline.activation[i]):
        count = min(pipeline.num_micro_batches, room / pipeline.activation[i])
        if len(stages) == 1 or len({pipeline.activation[j] for j in stages}) == 1:
            count = int(count)  # equal sizes: whole micro-batches fill the room best
        room -= count * pipeline.activation[i]
        work_s += count * pipeline.forward_s[i]
    return work_s
