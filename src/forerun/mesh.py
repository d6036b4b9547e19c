"""The Mesh owns all parallel degrees: their product, their rank order, their checks."""

from __future__ import annotations

from collections.abc import Iterable

from .document import Value
from .errors import InputError


class Mesh(Value, frozen=True, kw_only=True):
    """Parallel degrees of one phase.

    The dense mesh is (pp, dp_replicate, dp_shard, cp, tp), outermost first: ranks that differ only
    in tp are neighbours. Its product is the world. `vpp` is the model chunks per pipeline rank,
    `ulysses` the part of `cp` done by all-to-all. `ep` does not multiply: expert-parallel groups
    are neighbours on (dp_replicate, dp_shard, cp), each tp rank in its own group with its cut of
    the experts, and the same experts lie on every ep-th of those ranks; where ep does not divide
    them, groups lie over tp as well and experts are whole.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    ulysses: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in ("dp_replicate", "dp_shard", "cp", "ulysses", "tp", "pp", "vpp", "ep"):
            degree = getattr(self, axis)
            if degree < 1:
                raise InputError(axis, degree, "not positive", "give 1 or more")
        if self.cp % self.ulysses:
            raise InputError("ulysses", self.ulysses, f"does not divide cp={self.cp}",
                             "give a divisor of cp")  # fmt: skip
        if (self.dp * self.cp) % self.ep and (self.dp * self.cp * self.tp) % self.ep:
            problem = f"does not divide dp*cp={self.dp * self.cp}, nor that times tp={self.tp}"
            raise InputError("ep", self.ep, problem, "give a divisor")

    AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")

    @property
    def dp(self) -> int:
        """Data-parallel replicas that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """Ranks of the dense mesh."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def expert_tp(self) -> int:
        """Ranks over which tp cuts an expert: 1 where ep lies over the ranks of tp as well."""
        return self.tp if (self.dp * self.cp) % self.ep == 0 else 1

    @property
    def expert_shards(self) -> int:
        """Ranks of the same experts over which ZeRO divides their states: those of dp_shard and cp
        (and of tp where experts are not cut by it), shared among ep."""
        return max(1, self.dp_shard * self.cp * self.tp // self.expert_tp // self.ep)

    def expert_shape(self) -> dict[str, int]:
        """Degrees of the expert mesh in rank order, outermost first; their product is the world.

        The same ranks in the same order as `shape`: ep lies over neighbours on the axes that hold
        the same dense weights, so that copies of an expert are ep (times expert_tp) apart.

        >>> Mesh(dp_shard=4, tp=2, ep=2).expert_shape()
        {'pp': 1, 'expert_replicate': 1, 'expert_shard': 2, 'ep': 2, 'expert_tp': 2}
        """
        holders = self.dp * self.cp * self.tp // self.expert_tp // self.ep
        return {
            "pp": self.pp,
            "expert_replicate": holders // self.expert_shards,
            "expert_shard": self.expert_shards,
            "ep": self.ep,
            "expert_tp": self.expert_tp,
        }

    @property
    def num_stages(self) -> int:
        """Pipeline stages: chunks over all pipeline ranks."""
        return self.pp * self.vpp

    def shape(self) -> dict[str, int]:
        """Degrees of the dense mesh in rank order, outermost first."""
        return {axis: getattr(self, axis) for axis in self.AXES}

    def wire_name(self, axes: Iterable[str] | None = None) -> str:
        """What traffic over some axes, or over all that have several ranks, is filed under.

        >>> Mesh(tp=2, dp_shard=2).wire_name(), Mesh().wire_name(["dp_replicate", "dp_shard"])
        ('dp+tp', 'dp')
        """
        over = [axis for axis in self.AXES if getattr(self, axis) > 1] if axes is None else axes
        return "+".join(dict.fromkeys("dp" if a.startswith("dp_") else a for a in over))

    def reduction_name(self) -> str:
        """What a sum over all ranks is filed under: ranks that share a sequence reduce as
        data-parallel ones.

        >>> Mesh(cp=2, dp_shard=2).reduction_name(), Mesh(cp=2, pp=2).reduction_name()
        ('dp', 'pp+cp')
        """
        return reduced_over(self.wire_name())

    def stride(self, axis: str) -> int:
        """Rank distance of neighbours along an axis: the product of the axes inside it."""
        stride = 1
        for name in reversed(self.AXES):
            if name == axis:
                return stride
            stride *= getattr(self, name)
        raise KeyError(axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on each axis.

        >>> Mesh(tp=2, pp=2).coordinates(3)["pp"], Mesh(tp=2, pp=2).coordinates(3)["tp"]
        (1, 1)
        """
        position: dict[str, int] = {}
        for axis in reversed(self.AXES):
            degree: int = getattr(self, axis)
            position[axis] = rank % degree
            rank //= degree
        return position

    def check_world(self, num_devices: int) -> None:
        """Raise InputError unless the degrees multiply to the devices there are."""
        if self.world != num_devices:
            equation = " * ".join(f"{axis}={n}" for axis, n in self.shape().items())
            raise InputError("mesh", equation, f"multiplies to {self.world}, not to {num_devices}",
                             "change a degree or the number of GPUs")  # fmt: skip


def reduced_over(name: str) -> str:
    """The name of a reduction over the axes of a wire name."""
    return "dp" if name in ("cp", "dp+cp") else name
