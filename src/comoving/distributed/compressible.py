"""Optimizers whose gradients can be sent as cores: what they become for that, and what is refused."""

from dataclasses import replace

from ..optimizer import LowRankOptimizer
from ..precondition import Plain
from ..residual import Discard, Feedback, Residual


def own_residuals(optimizer: LowRankOptimizer) -> list[Residual]:
    """The residual that each group gets under :func:`comoving.distributed.compress`.

    Raises:
        ValueError: weights in codes; nothing that is projected; a part that several processes with gradients of their
            own cannot share, or a state of another form.
    """
    coded = [site.name for site in optimizer.sites.values() if site.coded]
    if coded:
        raise ValueError(f"{', '.join(coded[:5])}: compress() takes no weights in codes: train them without it")
    if not any(site.projected for site in optimizer.sites.values()):
        raise ValueError("compress() sends cores of projected parameters, and this optimizer has none: lower rank=")
    return [_residual(optimizer, number) for number in range(len(optimizer.param_groups))]


def _residual(optimizer: LowRankOptimizer, number: int) -> Residual:
    """The residual that a group gets.

    Raises:
        ValueError: see :func:`own_residuals`.
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
        raise ValueError(f"compress() is refused for parameter group {number}: {reason}")
    residual = _own(group["residual"])
    stated = [optimizer.sites[p].name for p in projected if optimizer.state.get(p)]
    if residual != group["residual"] and stated:
        raise ValueError(
            f"{', '.join(stated[:5])} has a state already, with feedback that is read off the momentum, which all "
            f"processes share: build the optimizer with {residual}, or call compress() before the first step"
        )
    return residual


def _own(residual: Residual) -> Residual:
    return replace(residual, lazy=True, own=True) if isinstance(residual, Feedback) else residual
