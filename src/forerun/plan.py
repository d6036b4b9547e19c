"""Plan: what the planner chooses, with model, cluster and workload embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar, Literal, NamedTuple

import msgspec

from .choices import CP_KINDS, TENSORS
from .cluster import Cluster
from .document import Document, Value
from .errors import InputError
from .estimate import Estimate
from .local_sgd import TECHNIQUE as LOCAL_SGD
from .local_sgd import LocalSgd
from .mesh import Mesh
from .model import Model
from .orders import Orders, parse_orders
from .plan_rules import check_phase
from .schedules import Schedule
from .workload import Workload

MOST_SIZES = 8
"""Stages whose sizes a label spells out."""


class Stage(Value, frozen=True, kw_only=True):
    """One pipeline stage: its pool and its layers, first and last included (0-based)."""

    pool: str
    layers: tuple[int, int]

    @property
    def num_layers(self) -> int:
        """Layers of the stage."""
        return self.layers[1] - self.layers[0] + 1


class Setting(Value, frozen=True, kw_only=True):
    """The techniques that apply to a range of layers, first and last included."""

    layers: tuple[int, int]
    techniques: dict[str, dict[str, Any]]


class Phase(Value, frozen=True, kw_only=True):
    """One model variant, step shape and layout, for a number of steps."""

    id: str = "main"
    after: tuple[str, ...] = ()
    steps: int
    seq_tokens: int
    micro_batch_seqs: int
    """Sequences per replica in one forward pass."""
    num_microbatches: int
    """Forward passes per replica and step."""
    mesh: Mesh
    zero: Literal[0, 1, 2, 3] = 0
    """0 replicated (DDP), 1 optimiser states, 2 + gradients, 3 + parameters (FSDP)."""
    sequence_parallel: bool = False
    schedule: Schedule = "1f1b"
    """With `orders` of one's own: a schedule of the same placement and the same halves."""
    orders: dict[str, tuple[str, ...]] | None = None
    """The actions of each pipeline rank in order, such as `0F0`; None: those of `schedule`."""
    stages: tuple[Stage, ...]
    """Stage i runs on pipeline rank `rank_of(schedule, i, pp)`: i mod pp, or folded in a V."""
    settings: tuple[Setting, ...] = ()

    def technique(self, name: str, layer: int = 0) -> Mapping[str, Any]:
        """Settings of a technique at a layer; empty when it is not used there."""
        for setting in self.settings:
            if setting.layers[0] <= layer <= setting.layers[1] and name in setting.techniques:
                return setting.techniques[name]
        return {}

    def techniques_at(self, layer: int) -> dict[str, Mapping[str, Any]]:
        """Settings of all techniques that are used at a layer."""
        found: dict[str, Mapping[str, Any]] = {}
        for setting in self.settings:
            if setting.layers[0] <= layer <= setting.layers[1]:
                found = {**setting.techniques, **found}
        return found

    @property
    def compute_dtype(self) -> str:
        """Dtype of the matmuls."""
        return str(self.technique("precision").get("compute", "bf16"))

    @property
    def recompute(self) -> str:
        """Recompute mode: one of `RECOMPUTE_MODES`, or `TENSORS`."""
        return str(self.technique("recompute").get("mode", "none"))

    @property
    def local_sgd(self) -> LocalSgd | None:
        """How replicas that train apart meet; None where they are one in every step."""
        return LocalSgd.of(self.technique(LOCAL_SGD))

    @property
    def synced(self) -> Mesh:
        """The mesh of ranks that are one in every step: all, or those of one replica."""
        if not self.technique(LOCAL_SGD):
            return self.mesh
        return msgspec.structs.replace(self.mesh, dp_replicate=1)

    @property
    def label(self) -> str:
        """A readable name of the layout, such as `fsdp4_tp2-sp_pp2-1f1b_mbs1x8_ac-full_bf16`."""
        mesh = self.synced
        parts: list[str] = []
        if self.local_sgd is not None:
            parts.append(f"{self.mesh.dp_replicate}x{self.local_sgd.label}")
        if mesh.dp > 1 or self.zero:
            kind = {0: "ddp", 1: "zero1-", 2: "zero2-", 3: "fsdp"}[self.zero]
            if self.zero and mesh.dp_replicate > 1:
                parts.append(f"hsdp{mesh.dp_replicate}x{mesh.dp_shard}" if self.zero == 3 else
                             f"{kind}{mesh.dp_replicate}x{mesh.dp_shard}")  # fmt: skip
            else:
                parts.append(f"{kind}{mesh.dp}")
        if mesh.cp > 1:
            kind = str(self.technique("context-parallel").get("kind", CP_KINDS[0]))
            parts.append(f"cp{mesh.cp}" + (f"-u{mesh.ulysses}" if mesh.ulysses > 1 else "")
                         + (f"-{kind}" if kind in ("ring", "lightseq") else ""))  # fmt: skip
        if mesh.ep > 1:
            parts.append(f"ep{mesh.ep}{self._placement()}")
        if mesh.tp > 1:
            parts.append(f"tp{mesh.tp}" + ("-sp" if self.sequence_parallel else ""))
        if mesh.pp > 1:
            chunks = f"x{mesh.vpp}" if mesh.vpp > 1 else ""
            parts.append(f"pp{mesh.pp}{chunks}-{self._schedule_label()}")
            parts += self._cut()
        if mesh.world == 1 and not parts:
            parts.append("single")
        parts.append(f"mbs{self.micro_batch_seqs}x{self.num_microbatches}")
        parts += self._activations()
        parts.append(self._precision())
        parts += self._adapters()
        runtime = str(self.technique("runtime").get("mode", "eager"))
        parts += [runtime] if runtime != "eager" else []
        return "_".join(parts)

    def _placement(self) -> str:
        """A hash of the experts' placement, where there is one."""
        placed = [
            (setting.layers, setting.techniques["expert-placement"]["slots"])
            for setting in self.settings
            if "slots" in setting.techniques.get("expert-placement", {})
        ]
        if not placed:
            return ""
        return f"-placed~{sha256(msgspec.json.encode(placed)).hexdigest()[:4]}"

    def _adapters(self) -> list[str]:
        """Rank of adapters, which linears have one where not all do, and how the rest is stored."""
        settings = self.technique("lora")
        if not settings:
            return []
        targets = str(settings.get("targets", "all"))
        words = [f"lora{settings.get('rank')}", *([] if targets == "all" else [targets])]
        base = settings.get("base")
        return ["-".join([*words, *([] if base is None else [str(base).replace("_", "-")])])]

    def _precision(self) -> str:
        """Compute dtype with its recipe; a hash where matmuls of layers differ. What layers store
        is a part of its own."""
        each = [
            (s.layers, {k: v for k, v in s.techniques.get("precision", {}).items()
                        if k != "activations"})
            for s in self.settings
        ]  # fmt: skip
        if any(own != each[0][1] for _, own in each):
            return f"mixed~{sha256(msgspec.json.encode(each)).hexdigest()[:4]}"
        settings = self.technique("precision")
        recipe = f"-{settings['recipe']}" if "recipe" in settings else ""
        return f"{self.compute_dtype}{recipe}"

    def _schedule_label(self) -> str:
        """The schedule's name; a hash where the orders are the user's or a solver's."""
        if self.orders is None:
            return self.schedule
        return f"orders~{_hash(sorted(self.orders.items()))}"

    def own_orders(self) -> Orders | None:
        """The orders that the plan itself holds, parsed."""
        return None if self.orders is None else parse_orders(self.orders)

    def _cut(self) -> list[str]:
        """Layers of the stages where they are not as even as can be; a hash of many."""
        sizes = tuple(stage.num_layers for stage in self.stages)
        if sizes == even_sizes(sum(sizes), len(sizes)):
            return []
        if len(sizes) <= MOST_SIZES:
            return ["stages" + ".".join(map(str, sizes))]
        return [f"stages~{_hash(sizes)}"]

    def _activations(self) -> list[str]:
        """What layers keep for backward, in short; a hash where layers differ, or of names.

        `offload0.5x30`: the first 30 layers offload; `tokens`: they make the other tokens again.
        """
        kept = [_kept(setting.techniques) for setting in self.settings]
        distinct = list(dict.fromkeys(kept))
        count = ""
        if len(kept) == 2 and kept[0].moves and kept[0].but_for_moves() == kept[1]:
            distinct, count = distinct[:1], f"x{self.settings[0].layers[1] + 1}"
        if len(distinct) > 1:
            ranges = [(s.layers, s.techniques) for s in self.settings]
            return [f"ac-solved~{_hash(ranges)}"]
        one = distinct[0]
        parts: list[str] = []
        if one.mode == TENSORS:
            parts.append(f"ac-tensors~{_hash(one.names)}")
        elif one.mode != "none":
            parts.append(f"ac-{one.mode}")
        parts += [f"act-{one.storage}"] if one.storage else []
        where = "" if one.tier == "host" else f"-{one.tier}"
        if one.moves:
            rest = "-tokens" if one.rest == "recompute" else ""
            parts.append(f"offload{one.offload:g}{rest}{count}{where}")
        parts += [f"{one.states}-off{where}"] if one.states else []
        return parts


class _Kept(NamedTuple):
    """What a setting says of what layers keep."""

    mode: str
    """Of recompute."""
    names: tuple[str, ...]
    offload: float
    rest: str
    tier: str
    states: str
    storage: str
    """Dtype of stored activations, where it is another."""

    @property
    def moves(self) -> bool:
        return self.offload > 0 or self.rest == "recompute"

    def but_for_moves(self) -> _Kept:
        """The same with all activations on the device."""
        return self._replace(offload=0.0, rest="keep")


def _kept(techniques: Mapping[str, Mapping[str, Any]]) -> _Kept:
    recompute, offload = techniques.get("recompute", {}), techniques.get("offload", {})
    return _Kept(
        mode=str(recompute.get("mode", "none")),
        names=tuple(map(str, recompute.get("keep", ()))),
        offload=float(offload.get("activations", 0.0)),
        rest=str(offload.get("rest", "keep")),
        tier=str(offload.get("tier", "host")),
        states=str(offload.get("states") or ""),
        storage=str(techniques.get("precision", {}).get("activations") or ""),
    )


def _hash(value: object) -> str:
    """Four characters that stand for a value."""
    return sha256(msgspec.json.encode(value)).hexdigest()[:4]


class Plan(Document, frozen=True, kw_only=True):
    """Everything a run needs; loading one never executes code."""

    SCHEMA: ClassVar[str] = "forerun.plan/1"

    schema: str = "forerun.plan/1"
    model: Model
    cluster: Cluster
    workload: Workload
    phases: tuple[Phase, ...]

    @property
    def phase(self) -> Phase:
        """The first phase (most plans have one)."""
        return self.phases[0]

    @property
    def label(self) -> str:
        """The labels of the phases, an optimiser that is not AdamW with plain moments, and whether
        documents are packed into sequences."""
        label = "+".join(phase.label for phase in self.phases)
        if self.workload.optimizer != "adamw":
            label += f"_{self.workload.optimizer.replace('_', '-')}"
        return f"{label}_packed" if self.workload.lengths is not None else label

    def check(self) -> None:
        """Raise InputError when the plan contradicts itself, its model or its cluster."""
        if not self.phases:
            raise InputError("phases", "[]", "a plan needs a phase", "write the plan anew")
        for phase in self.phases:
            check_phase(self, phase)


class PlanFile(Document, frozen=True, kw_only=True):
    """What `plan -o` and `predict -o` write and `run`, `diff`, `trace`, `export` read."""

    SCHEMA: ClassVar[str] = "forerun.plan-file/1"

    schema: str = "forerun.plan-file/1"
    label: str
    plan: Plan
    estimate: Estimate


def even_sizes(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of stages of equal size; the first stages take the remainder.

    >>> even_sizes(5, 2)
    (3, 2)
    """
    base, extra = divmod(num_layers, num_stages)
    return tuple(base + (index < extra) for index in range(num_stages))


def stages_of(sizes: Sequence[int], pools: str | Sequence[str]) -> tuple[Stage, ...]:
    """Stages with these numbers of layers, on one pool, or each on its own.

    >>> [stage.layers for stage in stages_of((3, 2), "p")]
    [(0, 2), (3, 4)]
    """
    names = [pools] * len(sizes) if isinstance(pools, str) else pools
    stages: list[Stage] = []
    first = 0
    for size, pool in zip(sizes, names, strict=True):
        stages.append(Stage(pool=pool, layers=(first, first + size - 1)))
        first += size
    return tuple(stages)


def even_stages(num_layers: int, num_stages: int, pool: str) -> tuple[Stage, ...]:
    """Cut layers into stages of equal size; the first stages take the remainder.

    >>> [stage.layers for stage in even_stages(5, 2, "p")]
    [(0, 2), (3, 4)]
    """
    return stages_of(even_sizes(num_layers, num_stages), pool)


def techniques(compute: str, recompute: str) -> dict[str, dict[str, Any]]:
    """The technique settings of a dense plan, in the form `Setting.techniques` holds."""
    chosen: dict[str, dict[str, Any]] = {"precision": {"compute": compute}}
    if recompute != "none":
        chosen["recompute"] = {"mode": recompute}
    return chosen
