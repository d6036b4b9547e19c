"""Whether an answer is one: everything counted again from the choices, without the solver.

A layer's backward can have every needed tensor, every operator that runs again has its inputs, the
layers of each type are all there, bytes and seconds are what the choices say, limits hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from .problem import LayerType, Limits, Problem
from .solution import PolicyUse, Solution

TOLERANCE = 1e-9


def violations(problem: Problem, solution: Solution) -> list[str]:
    """What is wrong with an answer, in words; nothing where it holds."""
    limits, live = problem.limits, problem.limits.live_micro_batches
    found: list[str] = []
    device = host = seconds = 0.0
    types = {layer.name: layer for layer in problem.layers}
    for layer in problem.layers:
        count = sum(use.layers for use in solution.policies if use.layer == layer.name)
        if count != layer.count:
            found.append(f"{layer.name}: {count} of {layer.count} layers have a policy")
    for use in solution.policies:
        layer = types[use.layer]
        found += [f"{use.layer}: {problem}" for problem in _impossible(layer, use, limits)]
        stored = sum(t.stored_bytes for t in use.tensors)
        moved = sum(t.stored_bytes * t.fraction for t in use.tensors)
        device += live * use.layers * (stored - moved)
        host += live * use.layers * moved
        seconds += use.layers * _extra_s(layer, use, moved, limits)
    for what, counted, said, scale in (
        ("device bytes", device, solution.device_bytes, problem.keep_all_bytes),
        ("host bytes", host, solution.host_bytes, problem.keep_all_bytes),
        ("seconds", seconds, solution.extra_s, solution.extra_s),
    ):
        if abs(counted - said) > TOLERANCE * max(scale, abs(counted)):
            found.append(f"{what}: the choices give {counted}, the answer says {said}")
    for what, counted, limit in (
        ("device", device, limits.device_bytes),
        ("host", host, limits.host_bytes),
    ):
        if counted > limit + TOLERANCE * max(problem.keep_all_bytes, 1.0):
            found.append(f"{what}: {counted} bytes are more than {limit}")
    if not solution.lower_bound_s <= solution.extra_s:
        found.append("the lower bound is above the answer")
    return found


def _impossible(layer: LayerType, use: PolicyUse, limits: Limits) -> Iterator[str]:
    """Choices that the layer or the limits do not allow."""
    tensors = {tensor.name: tensor for tensor in layer.tensors}
    chosen = {choice.name: choice for choice in use.tensors}
    there = {name for name, choice in chosen.items() if choice.choice != "recompute"}
    for name, choice in chosen.items():
        tensor = tensors[name]
        form = tensor.compressed_bytes if choice.choice == "compress" else tensor.bytes
        expected = 0.0 if choice.choice == "recompute" else form
        if choice.bytes != tensor.bytes or choice.stored_bytes != expected:
            yield f"{name} has other bytes"
        if choice.choice == "compress" and not limits.compress:
            yield f"{name} may not be compressed"
        if not 0.0 <= choice.fraction <= 1.0 + TOLERANCE:
            yield f"{name}: {choice.fraction} is no fraction"
        if choice.fraction > 0 and not limits.offload:
            yield f"{name} may not be offloaded"
    for maker in layer.makers:
        wanted = {n for n in maker.outputs if n in chosen and chosen[n].choice == "recompute"}
        if not wanted:
            continue
        missing = [name for name in maker.inputs if name not in there]
        if missing or not maker.repeatable:
            yield f"{maker.name} cannot run again; missing: {', '.join(missing) or 'nothing'}"
        there |= wanted
    for name in sorted({t.name for t in layer.tensors if t.needed} | set(chosen)):
        if name not in there:
            yield f"{name} is not there in backward"


def _extra_s(layer: LayerType, use: PolicyUse, moved: float, limits: Limits) -> float:
    """Seconds that one layer adds to one micro-batch."""
    tensors = {tensor.name: tensor for tensor in layer.tensors}
    again = {choice.name for choice in use.tensors if choice.choice == "recompute"}
    forward = backward = 0.0
    for choice in use.tensors:
        if choice.choice == "compress":
            forward += tensors[choice.name].compress_s
            backward += tensors[choice.name].decompress_s
    backward += sum(maker.seconds for maker in layer.makers if again & set(maker.outputs))
    if moved == 0.0:
        return forward + backward
    copying = moved / limits.copy_bytes_per_s
    forward = max(forward, copying - layer.forward_s)
    return forward + max(backward, copying - layer.backward_s)
