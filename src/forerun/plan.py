"""Plan: what the planner chooses, with model, cluster and workload embedded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, ClassVar, Literal, NamedTuple, cast

import msgspec

from .cluster import Cluster
from .document import Document, Value
from .errors import InputError
from .estimate import Estimate
from .experts import check_placement
from .local_sgd import TECHNIQUE as LOCAL_SGD
from .local_sgd import LocalSgd
from .mesh import Mesh
from .model import Layer, Model
from .orders import Orders, check_orders, owners, parse_orders, splits
from .traced import Traced
from .workload import Workload

Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "interleaved-zb", "zb-v", "dualpipev"
]
SCHEDULES: tuple[str, ...] = (
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "interleaved-zb", "zb-v", "dualpipev"
)  # fmt: skip
SPLIT_SCHEDULES: tuple[str, ...] = SCHEDULES[3:]
"""Those that split the backward pass: gradients of inputs first, of weights later."""
V_SCHEDULES: tuple[str, ...] = ("zb-v", "dualpipev")
"""Those of two chunks per rank, placed in a V."""
LOOPED_SCHEDULES: tuple[str, ...] = ("interleaved", "interleaved-zb")
"""Those of two or more chunks per rank, placed in rounds."""
RECOMPUTE_MODES: tuple[str, ...] = (
    "none", "selective", "full", "full_keep_attn", "per_op", "elementwise"
)  # fmt: skip
TENSORS = "tensors"
"""The recompute mode that names every tensor of a layer that is kept (setting `keep`)."""
OFFLOAD_RESTS: tuple[str, ...] = ("keep", "recompute")
"""What becomes of activations that are not offloaded: they stay, or are made again token by token.
"""
OFFLOAD_STATES: tuple[str, ...] = ("optimizer", "experts", "parameters")
"""What else may wait off the device; with parameters go gradients and optimiser states."""
TIERS: tuple[str, ...] = ("host", "disk")
"""Where it waits."""
CP_KINDS: tuple[str, ...] = ("zigzag", "ring", "ulysses", "lightseq")
"""How the sequence is cut: balanced ring, contiguous blocks in a ring, all by all-to-all, or
contiguous blocks whose early ranks help the late ones."""
KINDS_OF_CP: tuple[str, ...] = (*CP_KINDS, "usp")
"""What a user may ask for; usp is a balanced ring of groups that exchange by all-to-all."""
RUNTIMES: tuple[str, ...] = ("eager", "compiled")
"""How a run launches a layer's operators: one by one, or compiled as a whole."""
ATTENTION_KERNELS: tuple[str, ...] = ("flash", "flash1", "flash2", "flash3", "unfused", "eager")
COMPUTE_DTYPES: tuple[str, ...] = (
    "fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4", "int8", "fp6", "fp4",
)  # fmt: skip
HALO_RECIPES: tuple[str, ...] = (
    "halo0", "halo1", "halo1-hq", "halo1-hq-xh", "halo2", "halo2-xh", "halo2-hq-xh",
)  # fmt: skip
"""Those of int8, fp6 and fp4."""
RECIPES: tuple[str, ...] = ("tensorwise", "rowwise", "coat", *HALO_RECIPES)
"""How matmuls below 16 bits are scaled."""
STORAGE_DTYPES: tuple[str, ...] = ("fp8",)
"""Of saved activations, where it is not the dtype of the tensors."""


MOST_SIZES = 8
"""Stages whose sizes a label spells out."""
UNDIVIDED = (
    ("conv", "convolutions", ("tp", "cp")),
    ("cross_decoder", "attention over an encoder's output", ("cp",)),
)
"""Layer kinds, in words, and the axes that cannot divide them."""


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
            _check_phase(self, phase)


class PlanFile(Document, frozen=True, kw_only=True):
    """What `plan -o` and `predict -o` write and `run`, `diff`, `trace`, `export` read."""

    SCHEMA: ClassVar[str] = "forerun.plan-file/1"

    schema: str = "forerun.plan-file/1"
    label: str
    plan: Plan
    estimate: Estimate


def rank_of(schedule: str, stage: int, pp: int) -> int:
    """The pipeline rank that runs a stage: folded in a V for `V_SCHEDULES`, else stage mod pp.

    >>> [rank_of("zb-v", stage, 3) for stage in range(6)]
    [0, 1, 2, 2, 1, 0]
    """
    return min(stage, 2 * pp - 1 - stage) if schedule in V_SCHEDULES else stage % pp


def _refuse(field: str, value: object, problem: str, remedy: str) -> InputError:
    return InputError(field, value, problem, remedy)


def _check_phase(plan: Plan, phase: Phase) -> None:
    mesh, model = phase.mesh, plan.model
    mesh.check_world(plan.cluster.num_devices)
    for problem in layout_problems(
        model,
        mesh,
        seq_tokens=phase.seq_tokens,
        zero=phase.zero,
        sequence_parallel=phase.sequence_parallel,
        schedule=phase.schedule,
        num_microbatches=phase.num_microbatches,
        own_orders=phase.orders is not None,
    ):
        raise problem
    _check_orders(phase)
    seqs = phase.micro_batch_seqs * phase.num_microbatches * mesh.dp
    if seqs != plan.workload.global_batch_seqs:
        raise _refuse("global-batch", plan.workload.global_batch_seqs,
                      f"is not micro_batch_seqs={phase.micro_batch_seqs} * num_microbatches="
                      f"{phase.num_microbatches} * dp={mesh.dp} = {seqs}",
                      "change the micro-batch or dp")  # fmt: skip
    if len(phase.stages) != mesh.num_stages:
        raise _refuse("stages", len(phase.stages), f"pp*vpp = {mesh.num_stages}",
                      "give one entry per stage")  # fmt: skip
    expected = 0
    for stage in phase.stages:
        first, last = stage.layers
        if first != expected or last < first:
            raise _refuse("stages", f"[{first}, {last}]",
                          "stages must cover the layers in order, one or more each",
                          f"start this one at layer {expected}")  # fmt: skip
        plan.cluster.pool(stage.pool)
        expected = last + 1
    _check_pools(plan, phase)
    if expected != model.num_layers:
        raise _refuse("stages", expected, f"{model.name} has {model.num_layers} layers",
                      "cover every layer once")  # fmt: skip
    for setting in phase.settings:
        _check_recompute(setting.techniques.get("recompute", {}))
    _check_local_sgd(plan, phase)
    if phase.compute_dtype not in COMPUTE_DTYPES:
        raise _refuse("precision", phase.compute_dtype, "unknown dtype of matmuls",
                      f"use {', '.join(COMPUTE_DTYPES)}")  # fmt: skip
    routed = plan.workload.balance_loss != "none" or plan.workload.router_z_loss_coef > 0
    if routed and not any(layer.experts for layer in model.layers):
        raise _refuse("balance_loss", plan.workload.balance_loss,
                      f"{model.name} has no routers to train by it", "leave it out")  # fmt: skip
    for setting in phase.settings:
        placed = setting.techniques.get("expert-placement")
        if placed is None:
            continue
        for index in range(setting.layers[0], min(setting.layers[1], model.num_layers - 1) + 1):
            experts = model.layer_at(index).experts
            if experts is not None:
                check_placement(placed, experts, mesh.ep)
    kind = str(phase.technique("context-parallel").get("kind", CP_KINDS[0]))
    if kind not in CP_KINDS:
        raise _refuse("cp-kind", kind, "unknown kind of context parallelism",
                      f"use {', '.join(CP_KINDS)}")  # fmt: skip
    if kind == "ulysses" and mesh.ulysses != mesh.cp:
        raise _refuse("cp-kind", kind, f"is all of cp={mesh.cp}, not ulysses={mesh.ulysses} of it",
                      f"set ulysses to {mesh.cp}, or use zigzag")  # fmt: skip
    ring = mesh.cp // mesh.ulysses
    if kind == "lightseq" and ring > 1 and ring % 2:
        raise _refuse("cp-kind", kind, f"pairs up the ranks of its ring, and {ring} is odd",
                      "use an even --cp, or zigzag")  # fmt: skip


def _check_local_sgd(plan: Plan, phase: Phase) -> None:
    """Replicas train apart in whole, all layers alike, and what they share is not shared apart."""
    own = [setting.techniques.get(LOCAL_SGD, {}) for setting in phase.settings]
    if not any(own):
        return
    if any(settings != own[0] for settings in own):
        raise _refuse("local-sgd", own, "layers differ in it", "give all settings the same")
    local, mesh = LocalSgd.of(own[0]), phase.mesh
    assert local is not None
    for problem in local.problems(plan.model.num_layers):
        raise problem
    if mesh.dp_replicate == 1:
        raise _refuse("local-sgd", local.period, "dp_replicate=1: there is one replica, and none "
                      "to meet", "raise --dp, or leave --dp-shard below it")  # fmt: skip
    for axis, why in (
        ("pp", "stages of a pipeline would meet apart"),
        ("cp", "ranks that share a sequence hold equal weights as replicas do"),
        ("ep", "experts are shared between replicas"),
    ):
        if getattr(mesh, axis) > 1:
            raise _refuse("local-sgd", local.period, f"{axis}={getattr(mesh, axis)}: {why}",
                          f"use --{axis} 1, or no --local-sgd")  # fmt: skip
    if plan.workload.balance_loss == "global-batch":
        raise _refuse("balance_loss", "global-batch", "replicas that train apart share no counts",
                      "use micro-batch, or no --local-sgd")  # fmt: skip


def _check_recompute(technique: Mapping[str, Any]) -> None:
    """The mode is known, and names of tensors are there where it needs them."""
    mode, keep = technique.get("mode", "none"), technique.get("keep")
    if mode not in (*RECOMPUTE_MODES, TENSORS):
        raise _refuse("recompute", mode, "unknown mode",
                      f"use {', '.join((*RECOMPUTE_MODES, TENSORS))}")  # fmt: skip
    listed = isinstance(keep, (list, tuple))
    names = cast("list[object]", keep) if listed else None
    if mode == TENSORS and (names is None or not all(isinstance(n, str) for n in names)):
        raise _refuse("recompute.keep", keep, "not a list of tensors' names",
                      "name what a layer keeps, such as [\"q\", \"k\", \"v\"]")  # fmt: skip
    if mode != TENSORS and keep is not None:
        raise _refuse("recompute.keep", keep, f"mode {mode} names no tensors",
                      f"use mode {TENSORS}, or drop keep")  # fmt: skip


def _check_pools(plan: Plan, phase: Phase) -> None:
    """Every rank lies in one pool, and every pool has as many ranks as it has devices."""
    mesh = phase.mesh
    of_rank: dict[int, str] = {}
    for index, stage in enumerate(phase.stages):
        rank = rank_of(phase.schedule, index, mesh.pp)
        if of_rank.setdefault(rank, stage.pool) != stage.pool:
            raise _refuse("stages", stage.pool,
                          f"stage {index} is on rank {rank}, whose other stage is in pool"
                          f" {of_rank[rank]}", "give both the same pool")  # fmt: skip
    for pool in plan.cluster.pools:
        ranks = sum(name == pool.name for name in of_rank.values()) * (mesh.world // mesh.pp)
        if ranks != pool.num_devices:
            raise _refuse("stages", pool.name,
                          f"{ranks} ranks lie in a pool of {pool.num_devices} devices",
                          "give every pool the stages that its devices hold")  # fmt: skip


def layout_problems(
    model: Model,
    mesh: Mesh,
    *,
    seq_tokens: int,
    zero: int,
    sequence_parallel: bool,
    schedule: str,
    num_microbatches: int,
    own_orders: bool = False,
) -> Iterator[InputError]:
    """Every rule that a layout breaks, as errors in the user's words; none when it is legal.

    Orders of one's own need not keep to the micro-batches that their schedule asks for.
    """
    tp = mesh.tp
    if model.traced is not None:
        yield from _traced_problems(model.traced, mesh, sequence_parallel, schedule)
    for layer in model.layers if model.traced is None else ():
        for what, size in (
            ("attention heads", layer.heads),
            ("key-value heads", layer.kv_heads),
            *(("ffn width", width) for width in layer.mlp_widths),
        ):
            if size % tp:
                allowed = ", ".join(str(n) for n in _divisors(size)[:8])
                yield _refuse("tp", tp, f"does not divide {size} {what} of {model.name}",
                              f"use one of {allowed} or leave tp free")  # fmt: skip
    if model.vocab % tp and model.traced is None:
        yield _refuse("tp", tp, f"does not divide the vocabulary {model.vocab} of {model.name}",
                      "pad the vocabulary or lower tp")  # fmt: skip
    if sequence_parallel and tp == 1:
        yield _refuse("sp", "on", "needs tp > 1", "drop --sp or raise --tp")
    for tokens in model.lengths(seq_tokens):
        if sequence_parallel and (tokens // mesh.cp) % tp:
            yield _refuse("sp", "on", f"tp={tp} does not divide the sequence {tokens}",
                          "use --no-sp or another length")  # fmt: skip
        if tokens % (2 * mesh.cp if mesh.cp > 1 else 1):
            yield _refuse("cp", mesh.cp, f"2*cp does not divide the sequence {tokens}",
                          "use another length or cp")  # fmt: skip
    for kind, what, axes in UNDIVIDED:
        for axis in axes if any(layer.kind == kind for layer in model.layers) else ():
            if getattr(mesh, axis) > 1:
                problem = f"{model.name} has {what}, which {axis} does not divide"
                yield _refuse(axis, getattr(mesh, axis), problem, f"drop --{axis}")
    if mesh.num_stages > model.num_layers:
        yield _refuse("pp", f"{mesh.pp} x vpp {mesh.vpp}",
                      f"more stages than the {model.num_layers} layers of {model.name}",
                      "lower pp or vpp")  # fmt: skip
    if mesh.vpp > 1 and mesh.pp == 1:
        yield _refuse("vpp", mesh.vpp, "needs pp > 1", "drop vpp or raise pp")
    yield from _chunk_problems(mesh, schedule)
    if mesh.pp > 1 and not own_orders:
        yield from _microbatch_problems(mesh, schedule, num_microbatches)
    if mesh.dp_shard > 1 and zero == 0:
        yield _refuse("zero", 0, f"dp_shard={mesh.dp_shard} shards states",
                      "use --zero 1, 2 or 3, or dp_replicate")  # fmt: skip
    yield from _expert_problems(model, mesh, sequence_parallel)
    for layer in model.layers:
        if mesh.ulysses > 1:
            yield from _ulysses_problems(model, layer, mesh)


def _traced_problems(
    traced: Traced, mesh: Mesh, sequence_parallel: bool, schedule: str
) -> Iterator[InputError]:
    """What a user's module says of how it can be divided."""
    degrees = traced.divided.degrees if traced.divided is not None else ()
    if mesh.tp > 1 and not degrees:
        yield _refuse("tp", mesh.tp, f"{traced.target} has no tp_plan that it can be cut by",
                      "give it one (docs/modules.md), or use --tp 1")  # fmt: skip
    elif mesh.tp > 1 and mesh.tp not in degrees:
        allowed = ", ".join(map(str, degrees))
        yield _refuse("tp", mesh.tp, f"{traced.target} does not run cut in so many parts",
                      f"use one of {allowed}")  # fmt: skip
    if sequence_parallel:
        yield _refuse("sp", "on", "a module of one's own keeps its sequence whole", "drop --sp")
    if mesh.pp > 1 and not traced.hidden:
        yield _refuse("pp", mesh.pp, f"{traced.target} has no pp_plan by which it could be staged",
                      "give it one (docs/modules.md), or use --pp 1")  # fmt: skip
    if mesh.pp > 1 and schedule in SPLIT_SCHEDULES:
        yield _refuse("schedule", schedule, "does not split the backward of a module of one's own",
                      "use gpipe, 1f1b or interleaved")  # fmt: skip
    for axis in ("cp", "ep"):
        if getattr(mesh, axis) > 1:
            yield _refuse(axis, getattr(mesh, axis), "does not divide a module of one's own",
                          f"drop --{axis}")  # fmt: skip


def _chunk_problems(mesh: Mesh, schedule: str) -> Iterator[InputError]:
    """Each schedule has its number of chunks per rank."""
    chunked = schedule in (*LOOPED_SCHEDULES, *V_SCHEDULES)
    if mesh.vpp > 1 and not chunked:
        yield _refuse("vpp", mesh.vpp, f"schedule {schedule} has one chunk per rank",
                      "use --schedule interleaved")  # fmt: skip
    if mesh.pp == 1:
        if schedule in SPLIT_SCHEDULES:
            yield _refuse("schedule", schedule, "needs pp > 1", "raise --pp or use 1f1b")
        return
    if schedule in V_SCHEDULES and mesh.vpp != 2:
        yield _refuse("schedule", schedule, f"has two chunks per rank, not vpp={mesh.vpp}",
                      "use --vpp 2")  # fmt: skip
    if schedule in LOOPED_SCHEDULES and mesh.vpp == 1:
        yield _refuse("schedule", schedule, "needs vpp of 2 or more", "raise --vpp or use 1f1b")


def _microbatch_problems(mesh: Mesh, schedule: str, num_microbatches: int) -> Iterator[InputError]:
    """Each schedule has its least number of micro-batches."""
    least = {"gpipe": 1, "dualpipev": 2 * mesh.pp}.get(schedule, mesh.pp)
    if num_microbatches < least:
        of_pp = f"2*pp={least}" if least > mesh.pp else f"pp={mesh.pp}"
        yield _refuse("num_microbatches", num_microbatches, f"{schedule} needs {of_pp} or more",
                      "lower the micro-batch or pp, or use gpipe")  # fmt: skip
    if schedule in LOOPED_SCHEDULES and num_microbatches % mesh.pp:
        problem = f"{schedule} needs a multiple of pp={mesh.pp}"
        yield _refuse("num_microbatches", num_microbatches, problem, "change the micro-batch")


def _expert_problems(model: Model, mesh: Mesh, sequence_parallel: bool) -> Iterator[InputError]:
    """Experts are shared out evenly, tokens routed once, and states divided into equal parts."""
    if mesh.ep > 1 and not any(layer.experts for layer in model.layers):
        yield _refuse("ep", mesh.ep, f"{model.name} has no experts", "drop --ep")
    for layer in model.layers:
        if layer.experts is not None and layer.experts.num_experts % mesh.ep:
            yield _refuse("ep", mesh.ep,
                          f"does not divide {layer.experts.num_experts} experts of {model.name}",
                          "give a divisor")  # fmt: skip
    if mesh.tp > mesh.expert_tp and not sequence_parallel:
        yield _refuse("ep", mesh.ep, f"lies over tp={mesh.tp}, whose ranks then route a part of "
                      "the sequence each", "add --sp, or let ep divide dp*cp")  # fmt: skip
    sharing = mesh.dp_shard * mesh.cp * mesh.tp // mesh.expert_tp
    if sharing % mesh.ep and mesh.ep % sharing:
        yield _refuse("ep", mesh.ep, f"neither divides nor is a multiple of the {sharing} ranks "
                      "that share states", "change ep or dp_shard")  # fmt: skip


def _check_orders(phase: Phase) -> None:
    """Orders of one's own are a schedule of this pipeline, placed as `schedule` places stages."""
    orders, mesh = phase.own_orders(), phase.mesh
    if orders is None:
        return
    if mesh.pp == 1:
        raise _refuse(
            "orders", "given", "there is one pipeline rank", "raise --pp or leave them out"
        )
    if len(orders) != mesh.pp:
        raise _refuse("orders", f"{len(orders)} ranks", f"the plan has pp={mesh.pp}",
                      f"give orders for {mesh.pp} ranks, or --pp {len(orders)}")  # fmt: skip
    count = 1 + max((micro for order in orders for _, _, micro in order), default=-1)
    if count != phase.num_microbatches:
        raise _refuse("orders", f"{count} micro-batches",
                      f"the plan has {phase.num_microbatches} of them",
                      "change --global-batch, --micro-batch or the orders")  # fmt: skip
    check_orders(orders, mesh.num_stages, phase.num_microbatches)
    places = [rank_of(phase.schedule, stage, mesh.pp) for stage in range(mesh.num_stages)]
    if owners(orders) != places:
        raise _refuse("orders", f"stages on ranks {owners(orders)}",
                      f"{phase.schedule} has them on {places}",
                      "set schedule to one with the placement of the orders")  # fmt: skip
    if splits(orders) and phase.schedule not in SPLIT_SCHEDULES:
        raise _refuse("orders", "I and W", f"{phase.schedule} does not split the backward",
                      f"set schedule to one of {', '.join(SPLIT_SCHEDULES)}")  # fmt: skip


def schedule_of(orders: Orders) -> Schedule:
    """The schedule known by name that places stages and splits backwards as these orders do.

    Raises InputError for a placement that no schedule has: stages lie on the ranks in rounds, or
    two per rank in a V.

    >>> schedule_of([[("F", 0, 0), ("I", 0, 0), ("W", 0, 0)], [("F", 1, 0), ("B", 1, 0)]])
    'zb-h1'
    """
    homes, pp = owners(orders), len(orders)
    stages = range(len(homes))
    looped = homes == [rank_of("interleaved", stage, pp) for stage in stages]
    folded = homes == [rank_of("zb-v", stage, pp) for stage in stages] and len(homes) == 2 * pp
    if looped and len(homes) % pp == 0:
        if len(homes) == pp:
            return "zb-h1" if splits(orders) else "1f1b"
        return "interleaved-zb" if splits(orders) else "interleaved"
    if folded:
        return "zb-v"
    raise _refuse("orders", f"stages on ranks {homes}", "no placement that can be run",
                  "put stage i on rank i mod pp, or stages r and 2pp-1-r on rank r")  # fmt: skip


def _ulysses_problems(model: Model, layer: Layer, mesh: Mesh) -> Iterator[InputError]:
    """Each ulysses rank gets whole heads; those of K and V are repeated where they are fewer."""
    if layer.heads % (mesh.tp * mesh.ulysses):
        problem = f"tp*ulysses does not divide {layer.heads} attention heads of {model.name}"
        yield _refuse("ulysses", mesh.ulysses, problem, "lower ulysses or tp")
    groups = layer.kv_heads // mesh.tp
    if groups and groups % mesh.ulysses and mesh.ulysses % groups:
        problem = f"neither divides nor repeats {groups} key-value heads per tp rank"
        yield _refuse("ulysses", mesh.ulysses, problem, "give a divisor or a multiple")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


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
