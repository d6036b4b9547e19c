"""A user's module as a Model: its forward, loss and backward recorded on fake tensors.

It is recorded at two batch sizes, so that every size is known as (fixed, per sample); one sample
alone would hide copies, since a tensor with an axis of one is contiguous either way. The sequence
length is the workload's. Fake tensors say they are on the CPU, where attention takes the fused
kernel as it does on GPUs.

Equal neighbours in a ModuleList or Sequential - the same operators of the same sizes with
parameters of the same shapes - become one layer with a repeat. What comes before or between them is
the prefix, what comes after the suffix. A module without such neighbours is one layer itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout

import torch
from torch import nn

from ..errors import InputError
from ..model import Layer, Model
from ..traced import Size, Traced, TracedOperator, TracedTensor, TracedWeight, TracedWork
from . import aten
from .recorder import Call, Recorder
from .torch_compat import fake_mode
from .user_module import Trainable, UserModule, find, load

BATCHES = (2, 3)
OWN_BACKWARD = frozenset({"gelu", "layernorm", "embedding", "attention", "attention_full"})
"""Kinds that bring their backward along, which is not recorded beside them."""

BY_BYTES = {8: "int64", 4: "fp32", 2: "fp16", 1: "int8"}
WHOLE = ""
"""Path of the module itself."""


def trace(target: str, seq_tokens: int) -> Model:
    """The Model of the module that the function `target` makes, for one sequence length.

    Raises InputError where the module cannot be made or trained.
    """
    find(target)  # imported here, so that no constant of its module is fake
    recorders: list[Recorder] = []
    for batch in BATCHES:
        with fake_mode():
            user = load(target)
            recorders.append(record(user, batch, seq_tokens))
    return _Trace(target, user, recorders).model(seq_tokens)


def record(user: UserModule, batch: int, seq_tokens: int) -> Recorder:
    """One forward, loss and backward of a module, recorded."""
    _check_parameters(user)
    user.module.train()
    recorder = Recorder(user.module)
    whole = Trainable(user)
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


class _Trace:
    """Two recordings of one module, joined."""

    def __init__(self, target: str, user: UserModule, recorders: Sequence[Recorder]) -> None:
        self.target, self.user = target, user
        self.one, self.other = recorders
        names = [[call.name for call in recorder.calls] for recorder in recorders]
        if names[0] != names[1] or len(self.one.storages) != len(self.other.storages):
            raise InputError("model", target, "runs other operators for another batch",
                             "let the batch change sizes alone")  # fmt: skip
        for recorder in recorders:
            _merge_losses(recorder)
            for call in recorder.calls:
                _settle_backward(call, recorder)
        self.frozen = {n for n, p in user.module.named_parameters() if not p.requires_grad}
        self.numel = {n: p.numel() for n, p in user.module.named_parameters()}

    def model(self, seq_tokens: int) -> Model:
        """The Model of the recordings."""
        runs = find_runs(self.user.module, self.one)
        blocks = [path for run in runs for path in run]
        parts = self._parts(blocks)
        saves = self._owned_saves(parts)
        for run in runs:
            self._move_surplus(run, parts, saves)
        weights = self._owned_weights(parts)
        layers: list[Layer] = []
        for run in runs:
            operators = self._operators(parts[typical_of(run)], saves, weights)
            layers.append(
                Layer(
                    kind="traced", repeat=len(run), heads=1, kv_heads=1, head_dim=1, ffn_hidden=1,
                    operators=operators,
                )
            )  # fmt: skip
        return Model(
            name=self.target,
            hidden=1,
            vocab=self._vocab() or 1,
            layers=tuple(layers),
            positions="none",
            traced=Traced(
                target=self.target,
                tokens=self.user.make_batch is None,
                seq_tokens=seq_tokens,
                prefix=self._operators(parts["prefix:"], saves, weights),
                suffix=self._operators(parts["suffix:"], saves, weights),
                blocks=tuple(blocks),
                flops_per_sample=self._flops(),
            ),
        )

    def _parts(self, blocks: list[str]) -> dict[str, list[int]]:
        """Positions of the operators of the prefix, of every block and of the suffix."""
        parts: dict[str, list[int]] = {"prefix:": [], **{b: [] for b in blocks}, "suffix:": []}
        of = [_block_of(call.module, blocks) for call in self.one.calls]
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
            owner = _block_of(name.rpartition(".")[0], blocks)
            mine = [i for i in used.get(name, []) if (owner or part_of[i]) == part_of[i]]
            outside = [i for i in mine if owner is not None or part_of[i] not in blocks]
            home = parts[owner] if owner is not None else parts["prefix:"] or parts["suffix:"]
            owned.setdefault((outside or home or parts[blocks[0]])[0], []).append(name)
        return owned

    def _operators(
        self, indices: list[int], saves: dict[int, list[int]], weights: dict[int, list[str]]
    ) -> tuple[TracedOperator, ...]:
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
        one, other = self.one.calls[index], self.other.calls[index]
        kind, sizes = one.kind, _sizes(one.sizes, other.sizes)
        plain_add = kind == "add" and joined and len(one.inputs) > 0
        if kind == "add" and not plain_add:
            kind = "copy"
        dtype = "fp32" if kind == "cross_entropy" else None
        if kind == "linear" and not any(name not in self.frozen for name in weights[:1]):
            kind = aten.MATMUL
            again = (TracedWork(kind=kind, sizes=sizes),) * 2
        else:
            again = ()
        works = zip(one.backward, other.backward, strict=True)
        return TracedOperator(
            name=f"{index}.{one.name}",
            module=one.module or "",
            kind=kind,
            sizes=sizes,
            inputs=tuple(self._tensor(i) for i in one.inputs),
            outputs=tuple(self._tensor(i, dtype) for i in one.outputs),
            saves=tuple(self._tensor(i, dtype) for i in saves),
            weights=tuple(
                TracedWeight(
                    name=name, elements=self.numel[name], trainable=name not in self.frozen
                )
                for name in weights
            ),
            backward=(*again, *(TracedWork(kind=a[0], sizes=_sizes(a[1], b[1])) for a, b in works)),
        )

    def _tensor(self, index: int, dtype: str | None = None) -> TracedTensor:
        one, other = self.one.storages[index], self.other.storages[index]
        size = one.dtype.itemsize
        name = "compute" if one.dtype is torch.float32 else BY_BYTES[size]
        if one.dtype is torch.float32 and dtype is not None:
            name = dtype
        (elements,) = _sizes((-(-one.nbytes // size),), (-(-other.nbytes // size),))
        return TracedTensor(name=f"t{index}", elements=elements, dtype=name)

    def _vocab(self) -> int:
        """Rows of the first table that is looked up; 0 where none is."""
        found = [call.sizes[2] for call in self.one.calls if call.kind == "embedding"]
        return found[0] if found and self.user.make_batch is None else 0

    def _flops(self) -> int:
        """Model FLOPs of one sample: those of the larger batch over its size."""
        return sum(_call_flops(call) for call in self.other.calls) // BATCHES[1]


def typical_of(run: list[str]) -> str:
    """The block that stands for all of a run: one in the middle, with neighbours of its kind."""
    return run[len(run) // 2]


def find_runs(module: nn.Module, recorder: Recorder) -> list[list[str]]:
    """Runs of equal neighbours in containers, outermost containers first, in calling order."""
    signature = {path: _signature(path, module, recorder) for path in recorder.entered}
    runs: list[list[str]] = []
    chosen: list[str] = []
    for path, container in module.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or _block_of(path, chosen):
            continue
        children = [f"{path}.{name}" if path else name for name, _ in container.named_children()]
        run: list[str] = []
        for child in [*children, None]:
            mine = signature.get(child) if child is not None else None
            if run and (mine is None or mine != signature[run[-1]]):
                if len(run) > 1:
                    runs.append(run)
                    chosen += run
                run = []
            if mine is not None and child is not None:
                run.append(child)
    return runs or [[WHOLE]]


def _signature(path: str, module: nn.Module, recorder: Recorder) -> object:
    """What makes two submodules equal; None for one that is no block."""
    if recorder.entered[path] != 1:
        return None
    calls = [call for call in recorder.calls if _block_of(call.module, [path]) is not None]
    if not calls:
        return None
    matmuls = tuple((c.name, c.sizes, tuple(w for w in c.backward if w[0] == aten.MATMUL))
                    for c in calls)  # fmt: skip
    parameters = module.get_submodule(path).named_parameters()
    return matmuls, tuple((name, tuple(p.shape), p.requires_grad) for name, p in parameters)


def _block_of(path: str | None, blocks: Iterable[str]) -> str | None:
    """The block that holds a submodule; None for none."""
    if path is None:
        return None
    for block in blocks:
        if block == WHOLE or path == block or path.startswith(f"{block}."):
            return block
    return None


def _merge_losses(recorder: Recorder) -> None:
    """Log-softmax and the negative log-likelihood of it as one cross-entropy.

    Its first saved tensor is the log-softmax, its output the loss.
    """
    made = {call.outputs[-1]: call for call in recorder.calls if call.name == "_log_softmax"}
    kept: list[Call] = []
    for call in recorder.calls:
        source = next((made[i] for i in call.inputs if i in made), None)
        if call.name.startswith("nll_loss") and source is not None and source.kind == "copy":
            log_softmax = source.outputs[-1]
            elements = recorder.storages[log_softmax].nbytes // 4
            vocab = recorder.log_softmax_widths[log_softmax]
            source.kind, source.sizes = "cross_entropy", (elements // vocab, vocab)
            others = [i for i in (*source.saves, *call.saves) if i != log_softmax]
            source.saves = list(dict.fromkeys([log_softmax, *others]))
            source.outputs = [call.outputs[-1]]
            source.backward = []
            continue
        kept.append(call)
    recorder.calls = kept


def _settle_backward(call: Call, recorder: Recorder) -> None:
    """Keep of the recorded backward what the kind does not bring along."""
    if call.kind in OWN_BACKWARD or call.kind == "cross_entropy":
        call.backward = []
    if call.kind != aten.MATMUL:
        return
    work = _product(call.sizes)
    matmuls = [w for w in call.backward if w[0] == aten.MATMUL]
    if len(matmuls) == 2 and all(_product(w[1]) == work for w in matmuls) and call.weights:
        call.kind = "linear"
        call.backward = [w for w in call.backward if w[0] != aten.MATMUL]


def _call_flops(call: Call) -> int:
    """FLOPs of an operator and its backward."""
    backward = sum(2 * _product(sizes) for kind, sizes in call.backward if kind == aten.MATMUL)
    if call.kind == "attention":
        heads, seq, size = call.sizes
        return 7 * heads * seq * seq * size
    factor = {"linear": 6, aten.MATMUL: 2, "attention_full": 14}.get(call.kind, 0)
    return factor * _product(call.sizes) + backward


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _sizes(one: Sequence[int], other: Sequence[int]) -> tuple[Size, ...]:
    """Sizes at the two batches as (fixed, per sample)."""
    first, second = BATCHES
    per_sample = [(b - a) // (second - first) for a, b in zip(one, other, strict=True)]
    return tuple((a - first * p, p) for a, p in zip(one, per_sample, strict=True))
