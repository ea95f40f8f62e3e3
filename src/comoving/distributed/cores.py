"""An optimizer whose processes send one another cores: what it is driven by, what that counts, what it cannot share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from torch import Tensor

from ..drivers.replicas import Copies
from ..drivers.replicas import Replicas as Driver
from ..optimizer import LowRankOptimizer
from ..precondition import Plain
from ..residual import Discard, Feedback, Residual
from .comms import Replicas
from .traffic import Traffic
from .wire_frames import WireFrame
from .wires import Piece, Sending, WireName
from .wires import wire as wire_of


@dataclass(frozen=True)
class Sent:
    """What this process has put into sums over all of them, since they send cores.

    Args:
        cores: of projected parameters, and of whole frames where :class:`comoving.distributed.WireFrame` says so, with
            numbers that say whether a gradient was bad: one a bucket, and one for each parameter with a whole frame.
        frames: what frames were searched in, at refreshes.
        dense: gradients of the other parameters.
    """

    cores: Traffic = field(default_factory=Traffic)
    frames: Traffic = field(default_factory=Traffic)
    dense: Traffic = field(default_factory=Traffic)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.cores.bytes + self.frames.bytes + self.dense.bytes


def drive(
    optimizer: LowRankOptimizer,
    wire: WireName,
    group: dist.ProcessGroup | None,
    copies: Copies,
    called: str,
    accumulate: int = 1,
) -> tuple[Driver, Sent]:
    """From now on ``step()`` is by the means of what the processes have given their drivers.

    Args:
        optimizer: whose :class:`comoving.residual.Feedback` becomes its own form, ``own=True``.
        wire: of cores.
        group: the processes; None for all of them.
        copies: of what differs from process to process, in checkpoints.
        called: the name of the driver in messages.
        accumulate: how many gradients a core that is sent is made of.

    Raises:
        ValueError: a recipe that several processes cannot share so, with the reason.
    """
    residuals = own_residuals(optimizer, called)
    cores, sent = wire_of(wire), Sent()
    comm = Replicas(group, cores.products, sent.frames, cores)

    def send(given: Sequence[tuple[Tensor, int]]) -> Sending:
        return cores.start([Piece(core, rows) for core, rows in given], group, sent.cores)

    optimizer.roster.exchange("residual", residuals)
    return optimizer.driven_by(lambda guard: Driver(optimizer, guard, comm, send, copies, accumulate, called)), sent


def check_cores(optimizer: LowRankOptimizer, called: str, whole: WireFrame | None = None) -> None:
    """Raise unless there are cores to send.

    Args:
        optimizer: any.
        called: the name of what sends them, in messages.
        whole: how gradients of whole frames are sent; None for as they are.

    Raises:
        ValueError: weights in codes; nothing that is projected.
    """
    coded = [site.name for site in optimizer.sites.values() if site.coded]
    if coded:
        raise ValueError(f"{', '.join(coded[:5])}: {called} takes no weights in codes: train them without it")
    sites = optimizer.sites.values()
    if whole is not None and not any(map(whole.serves, sites)):
        raise ValueError(
            f"{called}: {whole} is of gradients of whole frames, and this optimizer has no parameter in a whole frame "
            f"of more directions than that"
        )
    if whole is not None or any(site.projected for site in sites):
        return
    if any(site.whole for site in sites):
        raise ValueError(
            f"{called} sends cores of projected parameters, and this optimizer has whole frames only: give "
            f"whole=WireFrame(rank=...), of a rank below those of the parameters, to send cores of their gradients"
        )
    raise ValueError(f"{called} sends cores of projected parameters, and this optimizer has none: lower rank=")


def own_residuals(optimizer: LowRankOptimizer, called: str) -> list[Residual]:
    """The residual that each group gets.

    Raises:
        ValueError: as for :func:`drive`.
    """
    return [_residual(optimizer, number, called) for number in range(len(optimizer.param_groups))]


def _residual(optimizer: LowRankOptimizer, number: int, called: str) -> Residual:
    """The residual that a group gets.

    Raises:
        ValueError: a part that several processes with gradients of their own cannot share, or a state of another form.
    """
    group = optimizer.param_groups[number]
    projected = [p for p in group["params"] if optimizer.sites[p].projected]
    if not projected:
        return group["residual"]
    reason = None
    if not group["finder"].joint:
        reason = f"finder {group['finder']} sees more of a gradient than contractions with it: use Power()"
    elif group["ranks"].adaptive:
        reason = f"ranks {group['ranks']} are chosen by the spectrum of a gradient that no process has: use Fixed()"
    elif group["precondition"] != Plain():
        reason = f"precondition {group['precondition']} would have to see the mean of the gradients: use Plain()"
    elif not isinstance(group["residual"], Discard | Feedback):
        reason = f"residual {group['residual']} needs the mean of the gradients: use Feedback() or Discard()"
    if reason is not None:
        raise ValueError(f"{called} is refused for parameter group {number}: {reason}")
    residual = _own(group["residual"])
    stated = [optimizer.sites[p].name for p in projected if optimizer.state.get(p)]
    if residual != group["residual"] and stated:
        raise ValueError(
            f"{', '.join(stated[:5])} has a state already, with feedback that is read off the momentum, which all "
            f"processes share: build the optimizer with {residual}, or call {called} before the first step"
        )
    return residual


def _own(residual: Residual) -> Residual:
    return replace(residual, lazy=True, own=True) if isinstance(residual, Feedback) else residual
