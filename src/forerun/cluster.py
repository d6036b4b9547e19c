"""Cluster: what it runs on - devices, links, nodes, and measured curves.

Two kinds of evidence stand here. A `Stack` (see `stack.py`) holds the efficiencies of a software
stack on a device as constants (catalog evidence). A `Profile` holds what was measured on the
machine itself as curves; where one is present it takes the place of the constants.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from .document import Document, Value
from .errors import InputError
from .stack import Stack

Dtype = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "fp4", "int8"]
DTYPE_BYTES: dict[str, float] = {
    "int64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "fp4": 0.5, "int8": 1,
    "fp8_g16": 1 + 2 / 16, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16,
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
    **{
        f"gptq{bits}_g{group}": bits / 8 + (2 + bits / 8) / group
        for bits in (4, 3, 2) for group in (128, 64, 32)
    },
}  # fmt: skip
"""Bytes per element, scales included. fp8_g16: a 16-bit scale per 16 elements (COAT, arXiv
2410.19313). mxfp8: an 8-bit scale per 32 (OCP Microscaling 1.0). nvfp4: an 8-bit scale per 16. nf4:
an 8-bit scale per 64, and an fp32 one per 256 of those (QLoRA, arXiv 2305.14314). gptqB_gG: codes
of B bits, a 16-bit scale and a zero of B bits per G inputs of an output (GPTQ, arXiv 2210.17323).
"""


class Link(Value, frozen=True, kw_only=True):
    """A link as one rank sees it: one direction, all of its lanes together."""

    latency_s: float
    """Of one step of a collective's plain protocol, or of one message."""
    bytes_per_s: float
    in_switch_share: float = 0.0
    """Part of the rate that all-reduce in the switch reaches (NVLink SHARP); 0 = there is none."""
    source: str = ""


class Device(Value, frozen=True, kw_only=True):
    """One accelerator, or one process of a CPU node."""

    name: str
    kind: Literal["gpu", "cpu"]
    memory_bytes: int
    tensors_only: bool = False
    """Whether `memory_bytes` is a budget on live tensors alone, as for an emulated device."""
    memory_bytes_per_s: float
    peak_flops_per_s: dict[str, float]
    """Dense peak by dtype name, without sparsity."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for other makes."""
    num_sms: int | None = None
    sustained_fraction: float = 1.0
    """Rate that matmuls hold at `nominal_watts`, relative to others of its family."""
    power_watts: float | None = None
    """The power limit that is set."""
    nominal_watts: float | None = None
    """The power limit that its peaks and `sustained_fraction` stand for; None = the one set."""
    source: str = ""

    @property
    def clock_fraction(self) -> float:
        """Clock of matmuls under the power limit that is set, relative to the nominal one.

        Switching takes power in proportion to f V^2, and the voltage follows the clock: what a
        limit P leaves beside the static part s of the nominal limit P0 sets the clock,

            f = ((P - s P0) / ((1 - s) P0))^(1/3)        s = 0.2: assumed

        >>> device = Device(name="x", kind="gpu", memory_bytes=1, memory_bytes_per_s=1.0,
        ...                 peak_flops_per_s={}, power_watts=500.0, nominal_watts=700.0)
        >>> round(device.clock_fraction, 3)
        0.863
        """
        if self.power_watts is None or self.nominal_watts is None:
            return 1.0
        static = STATIC_SHARE * self.nominal_watts
        left = (self.power_watts - static) / (self.nominal_watts - static)
        return min(1.0, max(left, LEAST_POWER) ** (1 / 3))


STATIC_SHARE = 0.2
"""Of the nominal power limit: memory, links, leakage. Assumed."""
LEAST_POWER = 0.05
"""Of the power for switching: clocks have a floor. Assumed."""


class OperatorCurve(Value, frozen=True, kw_only=True):
    """Measured times of one operator over sizes, with `busy` processes at work on the node.

    `axes` names the columns of `sizes`; `forward_s` and `backward_s` are seconds per call. For
    `matmul` the axes are (m, n, k) of one GEMM and `backward_s` is empty: the backward of a linear
    is two more GEMMs. For others the axes are the operator's own (see `costmodel/operators.py`).
    """

    operator: str
    dtype: str
    busy: int = 1
    runtime: Literal["eager", "compiled"] = "eager"
    axes: tuple[str, ...]
    sizes: tuple[tuple[float, ...], ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...] = ()


class CollectiveCurve(Value, frozen=True, kw_only=True):
    """Measured times of one collective over sizes.

    `message_bytes` is the full logical buffer (gathered output, scattered input, reduced buffer,
    sent message), `group` the ranks in it, `groups` how many such groups were at work at once.
    """

    collective: str
    group: int
    groups: int = 1
    link: Literal["intra_node", "inter_node"] = "intra_node"
    message_bytes: tuple[float, ...]
    seconds: tuple[float, ...]


class WaitCurve(Value, frozen=True, kw_only=True):
    """Measured time by which ranks that compute apart meet late.

    Ranks that ran the same operators for `compute_s` and then joined a collective needed, per
    meeting, `seconds` more than that compute and that collective take on their own: they are never
    equally fast, and the threads of the transport take turns with compute. `group` and `groups` as
    for collectives.
    """

    group: int
    groups: int = 1
    compute_s: tuple[float, ...]
    seconds: tuple[float, ...]


class Profile(Document, frozen=True, kw_only=True):
    """What was measured on one machine, and when."""

    SCHEMA: ClassVar[str] = "forerun.profile/1"

    schema: str = "forerun.profile/1"
    name: str
    device: str
    date: str
    environment: dict[str, str]
    operators: tuple[OperatorCurve, ...] = ()
    collectives: tuple[CollectiveCurve, ...] = ()
    waits: tuple[WaitCurve, ...] = ()
    host_s: dict[str, float] = {}
    """Host times in seconds by name (see `costmodel/prices.py`)."""
    memory: dict[str, float] = {}
    """Measured memory constants by name: `process_bytes` before the first tensor; `fragmentation`
    and `spread` as fractions of a peak."""
    scale: dict[str, float] = {}
    """Corrections by time term from `forerun calibrate`: measured / predicted, near 1."""
    spread: float = 0.05
    """Relative standard deviation of repeated measurements on this machine."""
    shipped: bool = False
    """Whether it is the catalog's, measured on another machine of the kind."""


class Pool(Value, frozen=True, kw_only=True):
    """Equal nodes of equal devices."""

    name: str
    device: Device
    devices_per_node: int
    num_nodes: int = 1
    intra_node: Link
    inter_node: Link | None = None
    """Per device: a node's network rate divided by its devices."""
    host: Link | None = None
    """Copies between device and host, per device with all devices copying."""
    host_memory_bytes: int | None = None
    """Of a node, what offload may fill of its host's memory; None = not limited here."""
    disk: Link | None = None
    """Copies between device and a disk of the node, per device with all devices copying."""
    shared_cores: int | None = None
    """CPU nodes: cores that all processes of a node share; None = devices are independent."""
    on_one_machine: bool = False
    """Whether the nodes are processes of one machine, which share its cores: nodes whose links are
    emulated."""
    stack: Stack
    price_usd_per_hour: float | None = None
    """Of one device."""

    def __post_init__(self) -> None:
        for field in ("devices_per_node", "num_nodes"):
            if getattr(self, field) < 1:
                raise InputError(f"pools.{field}", getattr(self, field), "not positive",
                                 "give 1 or more")  # fmt: skip

    @property
    def devices_together(self) -> int:
        """Devices that share a machine."""
        return self.num_devices if self.on_one_machine else self.devices_per_node

    @property
    def num_devices(self) -> int:
        """Devices in all nodes of the pool."""
        return self.num_nodes * self.devices_per_node


class Cluster(Document, frozen=True, kw_only=True):
    """Pools of nodes, and the link between pools."""

    SCHEMA: ClassVar[str] = "forerun.cluster/1"

    schema: str = "forerun.cluster/1"
    name: str
    pools: tuple[Pool, ...]
    between_pools: Link | None = None
    """As one device sees it; None = the slower of the pools' own networks."""
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if not self.pools:
            raise InputError("pools", "[]", f"{self.name} has no pool", "give one at least")
        names = [pool.name for pool in self.pools]
        for name in names:
            if names.count(name) > 1:
                raise InputError("pools.name", name, "two pools have it", "rename one")

    @property
    def num_devices(self) -> int:
        """Devices in all pools."""
        return sum(pool.num_devices for pool in self.pools)

    def pool(self, name: str) -> Pool:
        """The pool of that name."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise InputError("pool", name, f"{self.name} has no such pool",
                         f"known: {', '.join(p.name for p in self.pools)}")  # fmt: skip
