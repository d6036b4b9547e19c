"""Meetings of replicas that train apart: what the outer optimiser keeps, sends and does.

`Outer.after_step` is called after every optimiser step and does what that step is due for, as
`forerun.local_sgd` defines it. A replica is the ranks of one place on `dp_replicate`; its inner
optimiser, sharding and tensor parallelism know nothing of the others. Each rank meets those that
hold the same part of the parameters in the other replicas, and works on that part alone.

A mean that co2 uses a round late is the less worth the further the parameters have moved since it
was sent. Where no constant is given, the penalty measures that gap,

    penalty = 1 + ||x now - x when sent|| / ||mean||

over all parameters of the replica: in a direction in which a round of inner steps takes back the
share c of an error e, e_r+1 = e_r - c e_r-1 / penalty, which does not die out for c = 1 without it.
(CO2, arXiv 2401.16265, has a penalty by the measured gap; this
form of it is ours.) Two sums go over the ranks of a replica for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...local_sgd import ENDS_FRAGMENT, LocalSgd, fragment_of
from ..marks import Marks
from ..torch_compat import DTensor
from .exchange import Exchange

LAYER = re.compile(r"blocks\.(\d+)\.")


def fragment_of_parameter(name: str, fragments: int) -> int:
    """The fragment of a parameter by its global name.

    >>> fragment_of_parameter("blocks.3.wq.weight", 2), fragment_of_parameter("norm.weight", 4)
    (1, 3)
    """
    found = LAYER.search(name)
    return fragment_of(int(found[1]), fragments) if found else fragments + ENDS_FRAGMENT


class Fragment:
    """Parameters that meet together; buffers are flat, in the order of the parameters."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: LocalSgd, device: torch.device
    ) -> None:
        self.parameters = dict(parameters)
        self.sizes = [part.numel() for part in self.parts()]
        self.exchange: Exchange | None = None
        self.old: Tensor | None = None
        """The parameters of the last meeting."""
        self.momentum: Tensor | None = None
        if settings.keeps_outer:
            self.old = self.flat()
            if settings.outer_momentum or settings.outer == "co2":
                self.momentum = torch.zeros(sum(self.sizes), device=device)

    def parts(self) -> list[Tensor]:
        """What this rank stores of each parameter."""
        return [_local(p.detach()) for p in self.parameters.values()]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat buffer that lie like the parameters."""
        pairs = zip(flat.split(self.sizes), self.parts(), strict=True)
        return [view.view_as(part) for view, part in pairs]

    def flat(self) -> Tensor:
        """The parameters as they are now, copied."""
        return torch.cat([part.flatten() for part in self.parts()])

    def sent(self) -> Tensor:
        """What the replica has to say: how far it went since the last meeting, or where it is."""
        now = self.flat()
        return now if self.old is None else torch.sub(self.old, now, out=now)

    def start_from(self, flat: Tensor, keep: float = 0.0) -> None:
        """Move the parameters to `flat`, but for the part `keep` of the way that they are off."""
        for part, view in zip(self.parts(), self.views(flat), strict=True):
            if keep:
                part.lerp_(view, 1.0 - keep)
            else:
                part.copy_(view)


class Outer:
    """The outer optimiser of one rank."""

    def __init__(
        self,
        settings: LocalSgd,
        named: Mapping[str, nn.Parameter],
        copies: Mapping[str, int],
        group: dist.ProcessGroup,
        inside: dist.ProcessGroup | None,
        device: torch.device,
        marks: Marks,
    ) -> None:
        """`named` are this rank's parameters by global name and `copies` on how many ranks of its
        replica the same part lies; `group` meets, `inside` are the ranks of the replica, where they
        are several."""
        self.settings, self.group, self.inside = settings, group, inside
        self.device, self.marks, self.copies = device, marks, copies
        self.step = 0
        """Inner steps done."""
        self.fragments = [
            Fragment(
                {
                    name: parameter
                    for name, parameter in named.items()
                    if parameter.requires_grad
                    and fragment_of_parameter(name, settings.fragments) == which
                },
                settings,
                device,
            )
            for which in range(settings.fragments)
        ]

    def after_step(self) -> None:
        """What is due after one more inner step."""
        self.step += 1
        for which, fragment in enumerate(self.fragments):
            since = self._since_sent(which, self.step)
            if fragment.exchange is not None and since == self.settings.half_way:
                fragment.exchange.advance()
            if since == 0:
                self._meet(fragment)
            elif since == self.settings.steps_late and fragment.exchange is not None:
                self._use(fragment)

    def _since_sent(self, which: int, step: int) -> int:
        """Steps since a fragment was last sent, or would have been."""
        return (step - self.settings.starts(which)) % self.settings.period

    def _meet(self, fragment: Fragment) -> None:
        """Send a fragment; use what comes at once, or what was sent a round ago."""
        sent = fragment.sent()
        if self.settings.steps_late == self.settings.period:
            if fragment.exchange is not None:
                self._use(fragment)
            elif fragment.old is not None:  # the first round: nothing has come yet
                fragment.start_from(fragment.old)
        fragment.exchange = Exchange(sent, self.group, self.settings.bits, self._waiting)
        if self.settings.steps_late == 0:
            del sent
            self._use(fragment)

    def _waiting(self) -> AbstractContextManager[None]:
        return self.marks.mark("exposed.dp")

    def _use(self, fragment: Fragment) -> None:
        """The outer step with the mean that has come."""
        assert fragment.exchange is not None
        mean, settings = fragment.exchange.finish(), self.settings
        fragment.exchange = None
        rate, momentum = settings.outer_rate, settings.outer_momentum
        if fragment.old is None:
            fragment.start_from(mean)
        elif settings.outer == "diloco":
            if fragment.momentum is not None:
                fragment.momentum.mul_(momentum).add_(mean)
                mean.add_(fragment.momentum, alpha=momentum)
            fragment.old.sub_(mean, alpha=rate)
            fragment.start_from(fragment.old, settings.mixing)
        else:
            assert fragment.momentum is not None
            share = 1.0 / self._penalty(fragment, mean)
            fragment.momentum.mul_(momentum).add_(mean, alpha=share)
            fragment.momentum.clamp_(-settings.clip, settings.clip)
            fragment.old.sub_(fragment.momentum, alpha=rate)
            fragment.start_from(fragment.old)

    def _penalty(self, fragment: Fragment, mean: Tensor) -> float:
        """What a mean is divided by; see above."""
        if self.settings.penalty is not None or self.settings.steps_late == 0:
            return self.settings.penalty or 1.0
        assert fragment.momentum is not None
        moved = self._square(fragment, fragment.momentum)
        squares = torch.stack([moved, self._square(fragment, mean)])
        if self.inside is not None:
            dist.all_reduce(squares, group=self.inside)
        gone, told = squares.sqrt().tolist()
        return 1.0 + self.settings.outer_rate * gone / told if told > 0 else 1.0

    def _square(self, fragment: Fragment, flat: Tensor) -> Tensor:
        """This rank's share of the square of a buffer's norm over its replica."""
        shares = [
            part.square().sum() / self.copies[name]
            for name, part in zip(fragment.parameters, flat.split(fragment.sizes), strict=True)
        ]
        return torch.stack(shares).sum()

    # Whole rounds: what is counted, timed and kept.

    def events(self) -> Sequence[int]:
        """The steps of a round, 1 to period, after which anything is sent, goes on or is used; in
        their order from the first sending on, so that what is used has been sent before."""
        settings = self.settings
        after = {0, settings.steps_late} | ({settings.half_way} if settings.bits < 32 else set())
        found = {
            (settings.starts(which) + steps - 1) % settings.period + 1
            for which in range(settings.fragments)
            for steps in after
        }
        first = settings.starts(0)
        return sorted(found, key=lambda place: (place - first) % settings.period)

    def skip_before(self, place: int) -> None:
        """Go on as if the next step were number `place` of a round; what is on its way to a
        fragment that is sent then is used before."""
        for which, fragment in enumerate(self.fragments):
            late = self.settings.steps_late < self.settings.period
            if late and fragment.exchange is not None and self.settings.starts(which) == place:
                self._use(fragment)
        self.step = (self.step // self.settings.period + 2) * self.settings.period + place - 1

    def kept(self) -> list[Tensor]:
        """The outer optimiser's states."""
        states = [state for f in self.fragments for state in (f.old, f.momentum)]
        return [state for state in states if state is not None]

    def on_their_way(self) -> list[Tensor]:
        """Buffers of what has been sent and not been used."""
        return [buffer for f in self.fragments if f.exchange for buffer in f.exchange.buffers()]

    def is_on_its_way(self, which: int, step: int) -> bool:
        """Whether after that step a fragment has been sent and not been used."""
        if step < self.settings.starts(which):
            return False
        late = self.settings.steps_late
        return self._since_sent(which, step) < late

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """What a checkpoint holds: (what, parameter's name, this rank's part).

        A mean on its way is waited for, and used when it is due.
        """
        for fragment in self.fragments:
            held = {"old": fragment.old, "momentum": fragment.momentum}
            if fragment.exchange is not None:
                held["mean"] = fragment.exchange.finish()
            for what, flat in held.items():
                if flat is not None:
                    for name, view in zip(fragment.parameters, fragment.views(flat), strict=True):
                        yield what, name, view

    def resume_at(self, step: int) -> None:
        """Be where a training was after `step` steps; `state` is then to be read into."""
        self.step = step
        for which, fragment in enumerate(self.fragments):
            fragment.exchange = None
            if self.is_on_its_way(which, step):
                mean = torch.zeros(sum(fragment.sizes), device=self.device)
                fragment.exchange = Exchange.arrived(
                    mean, self.group, self.settings.bits, self._waiting
                )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
