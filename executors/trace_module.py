"""A user's module as a Model: its forward, loss and backward recorded on fake tensors.

It is recorded at two batch sizes, so that every size is known as (fixed, per sample); one sample
alone would hide copies, since a tensor with an axis of one is contiguous either way. The sequence
length is the workload's. Fake tensors say they are on the CPU, where attention takes the fused
kernel as it does on GPUs.

Equal neighbours in a ModuleList or Sequential - the same operators of the same sizes with
parameters of the same shapes - become one layer with a repeat. What comes before or between them is
the prefix, what comes after the suffix. A module without such neighbours is one layer itself. Where
the module has a `pp_plan` the blocks are those that it names.

A module with a `tp_plan` is cut by it and recorded again, at two degrees: what a size loses between
them tells which part of it is divided by the degree.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout

import torch

from ..errors import InputError
from ..model import Layer, Model
from ..traced import (
    UNCUT,
    Divided,
    Operators,
    Size,
    Traced,
    TracedCollective,
    TracedOperator,
    TracedTensor,
    TracedWeight,
    TracedWork,
)
from . import aten, module_cuts, module_stages
from .module_stages import Composed
from .recorder import Exchange, Recorder
from .torch_compat import fake_mode
from .trace_blocks import block_of, find_runs, typical_of
from .trace_calls import call_flops, merge_losses, settle_backward
from .trace_links import TraceLinks
from .user_module import Trainable, UserModule, find, load

BATCHES = (2, 3)
BY_BYTES = {8: "int64", 4: "fp32", 2: "fp16", 1: "int8"}
LARGEST_DEGREE = 8
"""Degrees of tensor parallelism beyond it are not tried."""


def trace(target: str, seq_tokens: int) -> Model:
    """The Model of the module that the function `target` makes, for one sequence length.

    Raises InputError where the module cannot be made or trained, or is not what its `tp_plan` or
    `pp_plan` says.
    """
    find(target)  # imported here, so that no constant of its module is fake
    with fake_mode():
        user = load(target)
        recorders = [record(user, Trainable(user), batch, seq_tokens) for batch in BATCHES]
        ends = module_stages.plan_of(user.module, target)
        hidden: tuple[int, ...] = ()
        if ends is not None:
            composed = Composed(user, ends)
            check_composed(recorders[0], record(user, composed, BATCHES[0], seq_tokens), target)
            hidden = composed.hidden
        joined = _Joined(user, recorders)
        runs = find_runs(user.module, recorders[0], ends.blocks if ends is not None else None)
        parts = joined.parts(runs)
        plan = module_cuts.plan_of(user.module, target)
    divided = divide(target, plan, runs, seq_tokens) if plan else None
    shared = joined.shared_weights(runs) if ends is not None else ()
    return Model(
        name=target,
        hidden=1,
        vocab=joined.vocab() or 1,
        layers=tuple(
            Layer(kind="traced", repeat=len(run), heads=1, kv_heads=1, head_dim=1, ffn_hidden=1,
                  operators=operators)
            for run, operators in zip(runs, parts[1:-1], strict=True)
        ),
        positions="none",
        tied_embeddings=bool(shared),
        traced=Traced(
            target=target,
            tokens=user.make_batch is None,
            seq_tokens=seq_tokens,
            prefix=parts[0],
            suffix=parts[-1],
            blocks=tuple(path for run in runs for path in run),
            flops_per_sample=joined.flops(),
            divided=divided,
            hidden=hidden,
            shared=shared,
        ),
    )  # fmt: skip


def divide(
    target: str, plan: Mapping[str, str], runs: list[list[str]], seq_tokens: int
) -> Divided | None:
    """The module cut by its `tp_plan`, at every degree that it runs at; None where it is at none.

    What divides the sizes may still not divide the heads: whether it runs is tried.
    """
    with fake_mode():
        sizes = module_cuts.divided_sizes(load(target).module, plan, target)
    common = math.gcd(*sizes)
    ran: dict[int, _Recorded] = {}
    for degree in range(1, LARGEST_DEGREE + 1):
        if common % degree:
            continue
        batches = BATCHES if _alike(ran) is None else BATCHES[:1]  # beyond: does it run?
        try:
            ran[degree] = _record_cut(target, plan, degree, batches, seq_tokens)
        except InputError:
            if degree == 1:
                raise
    degrees = tuple(degree for degree in ran if degree > 1)
    if not degrees:
        return None
    pair = _alike(ran)
    if pair is None:  # one degree is known, and no other follows from it
        degrees = degrees[:1]
        pair = (degrees[0], degrees[0])
    user, recorders, names = ran[pair[0]]
    more = ran[pair[1]][1] if pair[0] != pair[1] else []
    parts = _Joined(user, [*recorders, *more], pair, names).parts(runs)
    return Divided(degrees=degrees, prefix=parts[0], layers=tuple(parts[1:-1]), suffix=parts[-1])


_Recorded = tuple[UserModule, list[Recorder], frozenset[str]]


def _alike(ran: Mapping[int, _Recorded]) -> tuple[int, int] | None:
    """The smallest two degrees that run the same operators.

    A single head needs no copy that several do: such a degree tells nothing of the others.
    """
    forms = {
        degree: _form(recorders[0])
        for degree, (_, recorders, _) in ran.items()
        if len(recorders) == len(BATCHES)
    }
    for large in sorted(forms):
        for small in sorted(forms):
            if small < large and forms[small] == forms[large]:
                return small, large
    return None


def _form(recorder: Recorder) -> object:
    """All of a recording but its sizes."""
    calls = [
        (call.name, [kind for kind, _ in call.backward], call.inputs, call.outputs, call.saves)
        for call in recorder.calls
    ]
    return calls, len(recorder.storages)


def _record_cut(
    target: str, plan: Mapping[str, str], degree: int, batches: Sequence[int], seq_tokens: int
) -> _Recorded:
    """The module cut for a degree, recorded, and the names of what was cut."""
    with fake_mode():
        user = load(target)
        numel = {name: p.numel() for name, p in user.module.named_parameters()}
        links = TraceLinks(degree)
        dims = module_cuts.cut(user.module, plan, links, target)
        whole = Trainable(user)
        if module_cuts.returns_divided_logits(plan):
            whole.links = links
        recorders = [record(user, whole, batch, seq_tokens, links) for batch in batches]
    for name, parameter in user.module.named_parameters():
        assert parameter.numel() * (degree if name in dims else 1) == numel[name]
    return user, recorders, frozenset(dims)


def check_composed(plain: Recorder, composed: Recorder, target: str) -> None:
    """Raise InputError unless a module's `pp_plan` computes what its forward does."""

    def of(recorder: Recorder) -> list[tuple[str, tuple[int, ...]]]:
        return [(call.name, call.sizes) for call in recorder.calls]

    if of(plain) != of(composed):
        raise InputError("pp_plan", target, "computes other operators than forward does",
                         "let forward be after(blocks(before(inputs)))")  # fmt: skip


def record(
    user: UserModule,
    whole: Trainable,
    batch: int,
    seq_tokens: int,
    links: TraceLinks | None = None,
) -> Recorder:
    """One forward, loss and backward of a module, recorded; `links` are those of a cut one."""
    _check_parameters(user)
    user.module.train()
    user.module.zero_grad(set_to_none=True)
    recorder = Recorder(user.module)
    if links is not None:
        links.recorder = recorder
    try:
        inputs = user.inputs(batch, seq_tokens)
        with redirect_stdout(sys.stderr), recorder.recording():
            loss = whole(*inputs)
            recorder.start_backward()
            loss.backward()
    except InputError:
        raise
    except Exception as error:
        where = f" in {recorder.failed_at}" if recorder.failed_at else ""
        text = " ".join(str(error).split())[:200]
        raise InputError("model", user.target,
                         f"fails{where} without data ({type(error).__name__}: {text})",
                         "let shapes alone decide what it does") from error  # fmt: skip
    recorder.finish()
    for name, parameter in user.module.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            remedy = "use it in the loss, or freeze it by requires_grad_(False)"
            raise InputError("model", user.target, f"parameter {name} gets no gradient", remedy)
    return recorder


def _check_parameters(user: UserModule) -> None:
    parameters = dict(user.module.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise InputError("model", user.target, "has no parameters to train",
                         "return a module with parameters")  # fmt: skip
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32:
            raise InputError("model", user.target, f"parameter {name} is {parameter.dtype}",
                             "build it in float32; --precision chooses the rest")  # fmt: skip


class _Joined:
    """Recordings of a module, joined: at two batches, or at those of each of two degrees."""

    def __init__(
        self,
        user: UserModule,
        recorders: Sequence[Recorder],
        degrees: tuple[int, int] = (1, 1),
        cut: frozenset[str] = frozenset(),
    ) -> None:
        """`degrees` are those of the first two and of the last two recordings, `cut` the parameters
        that they divide; `user` is what the first two were made of."""
        self.user, self.recorders, self.degrees, self.cut = user, recorders, degrees, cut
        self.one = recorders[0]
        self._check_alike(recorders[1])
        for recorder in recorders:
            merge_losses(recorder)
            for call in recorder.calls:
                settle_backward(call, recorder)
        self.frozen = {n for n, p in user.module.named_parameters() if not p.requires_grad}
        self.numel = {
            n: p.numel() * (degrees[0] if n in cut else 1)
            for n, p in user.module.named_parameters()
        }

    def _check_alike(self, recorder: Recorder) -> None:
        names = [[call.name for call in r.calls] for r in (self.one, recorder)]
        if names[0] != names[1] or len(self.one.storages) != len(recorder.storages):
            raise InputError("model", self.user.target, "runs other operators for another batch",
                             "let the batch change sizes alone")  # fmt: skip

    def parts(self, runs: list[list[str]]) -> list[Operators]:
        """The operators of the prefix, of a block of each run, and of the suffix."""
        places = self._places([path for run in runs for path in run])
        saves = self._owned_saves(places)
        for run in runs:
            self._move_surplus(run, places, saves)
        weights = self._owned_weights(places)
        typical = [typical_of(run) for run in runs]
        return [
            self._operators(places[part], saves, weights)
            for part in ("prefix:", *typical, "suffix:")
        ]

    def shared_weights(self, runs: list[list[str]]) -> tuple[TracedWeight, ...]:
        """Parameters that both prefix and suffix use."""
        places = self._places([path for run in runs for path in run])
        before, after = (
            {name for index in places[part] for name in self.one.calls[index].weights}
            for part in ("prefix:", "suffix:")
        )
        return tuple(self._weight(name) for name in self.numel if name in before & after)

    def _places(self, blocks: list[str]) -> dict[str, list[int]]:
        """Positions of the operators of the prefix, of every block and of the suffix."""
        parts: dict[str, list[int]] = {"prefix:": [], **{b: [] for b in blocks}, "suffix:": []}
        of = [block_of(call.module, blocks) for call in self.one.calls]
        last = max(i for i, block in enumerate(of) if block is not None)
        for index, block in enumerate(of):
            parts[block if block is not None else "prefix:" if index < last else "suffix:"].append(
                index
            )
        return parts

    def _owned_saves(self, parts: dict[str, list[int]]) -> dict[int, list[int]]:
        """Saved storages of every operator, each storage in one part.

        A storage belongs to the part that makes it where that keeps it, else to the first part that
        keeps it; what several blocks keep and none makes (a mask, a table) to the prefix.
        """
        part_of = {index: part for part, indices in parts.items() for index in indices}
        holders: dict[int, list[int]] = {}
        maker: dict[int, str] = {}
        for index, call in enumerate(self.one.calls):
            for storage in call.saves:
                holders.setdefault(storage, []).append(index)
            for storage in call.outputs:
                maker.setdefault(storage, part_of[index])
        owned: dict[int, list[int]] = {}
        for storage, indices in holders.items():
            keepers = list(dict.fromkeys(part_of[i] for i in indices))
            owner = maker[storage] if maker.get(storage) in keepers else keepers[0]
            outside = parts["prefix:"] or parts["suffix:"]
            if len(keepers) > 2 and maker.get(storage) not in keepers and outside:
                indices = [outside[-1]]
            else:
                indices = [i for i in indices if part_of[i] == owner]
            for index in indices:
                owned.setdefault(index, []).append(storage)
        return owned

    def _move_surplus(
        self, run: list[str], parts: dict[str, list[int]], saves: dict[int, list[int]]
    ) -> None:
        """Give the prefix what single blocks of a run keep beyond the typical one.

        Such as the first block's input, where the others' input is kept by the block before.
        """
        outside = parts["prefix:"] or parts["suffix:"]
        kept = {s for i in parts[typical_of(run)] for s in saves.get(i, [])}
        typical = Counter(self.one.storages[storage].nbytes for storage in kept)
        for block in run if outside else ():
            left = Counter(typical)
            seen: set[int] = set()
            for index in parts[block]:
                for storage in list(saves.get(index, [])):
                    size = self.one.storages[storage].nbytes
                    if storage in seen:
                        continue
                    seen.add(storage)
                    left[size] -= 1
                    if left[size] < 0:
                        saves.setdefault(outside[-1], []).append(storage)

    def _owned_weights(self, parts: dict[str, list[int]]) -> dict[int, list[str]]:
        """Parameters at their first use in the part that owns them, each once."""
        blocks = [part for part in parts if part not in ("prefix:", "suffix:")]
        part_of = {index: part for part, indices in parts.items() for index in indices}
        owned: dict[int, list[str]] = {}
        used: dict[str, list[int]] = {}
        for index, call in enumerate(self.one.calls):
            for name in call.weights:
                used.setdefault(name, []).append(index)
        for name in self.numel:
            owner = block_of(name.rpartition(".")[0], blocks)
            mine = [i for i in used.get(name, []) if (owner or part_of[i]) == part_of[i]]
            outside = [i for i in mine if owner is not None or part_of[i] not in blocks]
            home = parts[owner] if owner is not None else parts["prefix:"] or parts["suffix:"]
            owned.setdefault((outside or home or parts[blocks[0]])[0], []).append(name)
        return owned

    def _operators(
        self, indices: list[int], saves: dict[int, list[int]], weights: dict[int, list[str]]
    ) -> Operators:
        return tuple(
            self._operator(i, saves.get(i, []), weights.get(i, []), self._joined(i, indices))
            for i in indices
        )

    def _joined(self, index: int, indices: list[int]) -> bool:
        """Whether the result of an operator is used, or is what its part hands on."""
        outputs = set(self.one.calls[index].outputs)
        later = (self.one.calls[i] for i in indices if i > index)
        return index == indices[-1] or any(outputs & set(call.inputs) for call in later)

    def _operator(
        self, index: int, saves: list[int], weights: list[str], joined: bool
    ) -> TracedOperator:
        one = self.one.calls[index]
        if one.kind == "edge":
            return self._edge(index)
        kind = one.kind
        sizes, cut = self._sizes(lambda r: r.calls[index].sizes)
        plain_add = kind == "add" and joined and len(one.inputs) > 0
        if kind == "add" and not plain_add:
            kind = "copy"
        dtype = "fp32" if kind == "cross_entropy" else None
        again: tuple[TracedWork, ...] = ()
        if kind == "linear" and not any(name not in self.frozen for name in weights[:1]):
            kind = aten.MATMUL
            again = (TracedWork(kind=kind, sizes=sizes, cut=cut),) * 2
        return TracedOperator(
            name=f"{index}.{one.name}",
            module=one.module or "",
            kind=kind,
            sizes=sizes,
            cut=cut,
            inputs=tuple(self._tensor(i) for i in one.inputs),
            outputs=tuple(self._tensor(i, dtype) for i in one.outputs),
            saves=tuple(self._tensor(i, dtype) for i in saves),
            weights=tuple(self._weight(name) for name in weights),
            backward=(*again, *(self._work(index, k) for k in range(len(one.backward)))),
        )

    def _work(self, index: int, place: int) -> TracedWork:
        """One operator of a backward."""
        sizes, cut = self._sizes(lambda r: r.calls[index].backward[place][1])
        return TracedWork(kind=self.one.calls[index].backward[place][0], sizes=sizes, cut=cut)

    def _edge(self, index: int) -> TracedOperator:
        """Collectives between the operators before and after."""
        one = self.one.calls[index]

        def collective(place: int, exchange: Exchange) -> TracedCollective:
            sizes, cut = self._sizes(lambda r: (r.calls[index].collectives[place].elements,))
            buffer = TracedTensor(
                name=f"buffer{index}.{place}",
                elements=sizes[0],
                cut=cut[0] if cut else UNCUT,
                dtype=exchange.dtype,
            )
            return TracedCollective(kind=exchange.kind, buffer=buffer, backward=exchange.backward)

        return TracedOperator(
            name=f"{index}.edge",
            module=one.module or "",
            kind="edge",
            sizes=((0, 0),),
            collectives=tuple(collective(k, x) for k, x in enumerate(one.collectives)),
        )

    def _weight(self, name: str) -> TracedWeight:
        return TracedWeight(
            name=name,
            elements=self.numel[name],
            trainable=name not in self.frozen,
            cut=name in self.cut,
        )

    def _tensor(self, index: int, dtype: str | None = None) -> TracedTensor:
        one = self.one.storages[index]
        size = one.dtype.itemsize
        name = "compute" if one.dtype is torch.float32 else BY_BYTES[size]
        if one.dtype is torch.float32 and dtype is not None:
            name = dtype
        (elements,), cut = self._sizes(lambda r: (-(-r.storages[index].nbytes // size),))
        return TracedTensor(
            name=f"t{index}", elements=elements, dtype=name, cut=cut[0] if cut else UNCUT
        )

    def _sizes(
        self, of: Callable[[Recorder], Sequence[int]]
    ) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        """Sizes as (fixed, per sample), and their cut parts; none of those where nothing is cut."""
        found = [of(recorder) for recorder in self.recorders]
        first = _linear(found[0], found[1])
        if len(found) == len(BATCHES):
            return first, ()
        small, large = self.degrees
        # a size is w + c / t: of two degrees c = (s1 - s2) / (1 / t1 - 1 / t2), and s = s1 at t1
        share = 1 / (1 / small - 1 / large)
        cut = tuple(
            (round((a - b) * share), round((p - q) * share))
            for (a, p), (b, q) in zip(first, _linear(found[2], found[3]), strict=True)
        )
        whole = tuple(
            (a + round(c * (1 - 1 / small)), p + round(d * (1 - 1 / small)))
            for (a, p), (c, d) in zip(first, cut, strict=True)
        )
        return whole, cut if any(part != UNCUT for part in cut) else ()

    def vocab(self) -> int:
        """Rows of the first table that is looked up; 0 where none is."""
        found = [call.sizes[2] for call in self.one.calls if call.kind == "embedding"]
        return found[0] if found and self.user.make_batch is None else 0

    def flops(self) -> int:
        """Model FLOPs of one sample: those of the larger batch over its size."""
        return sum(call_flops(call) for call in self.recorders[1].calls) // BATCHES[1]


def _linear(one: Sequence[int], other: Sequence[int]) -> tuple[Size, ...]:
    """Sizes at the two batches as (fixed, per sample)."""
    first, second = BATCHES
    per_sample = [(b - a) // (second - first) for a, b in zip(one, other, strict=True)]
    return tuple((a - first * p, p) for a, p in zip(one, per_sample, strict=True))
