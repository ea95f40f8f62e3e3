"""How far a step moves the weights of each role, relative to their size.

For the parameters of a role together, over all of their n entries,

    update = sqrt( sum |w_after - w_before|^2 / n ),  weight = sqrt( sum |w_before|^2 / n ),  ratio = update / weight

Rates mean nothing without the size of what they move: a table of embeddings that begins at a deviation of .02 and one
that begins at 1 take the same rate differently. Ratios of about 1e-3 to 1e-2 are usual; a role that is far from the
others learns too fast or hardly at all.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from .roles import Role, roles_of


@dataclass(frozen=True)
class Movement:
    """The root mean squares of a role's update, decay included, and of its weights before it."""

    update: float
    weight: float

    @property
    def ratio(self) -> float:
        """update / weight; infinite for weights of zero that move, 0 for those that do not."""
        return self.update / self.weight if self.weight > 0 else inf if self.update > 0 else 0.0


@contextmanager
def relative_updates(model: nn.Module) -> Generator[dict[Role, Movement]]:
    """Measure what happens to the weights of a model inside the ``with`` block, by role: a step of any optimizer.

    The dict is filled when the block ends. Takes a copy of the weights, and reads the device once a role.

    >>> with relative_updates(model) as moved:
    ...     optimizer.step()
    >>> moved["table"].ratio

    Args:
        model: with the parameters that are stepped.
    """
    roles = roles_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in roles}
    moved: dict[Role, Movement] = {}
    yield moved
    sums: dict[Role, list[tuple[Tensor, Tensor, int]]] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in before:
                old = before.pop(name)
                sums.setdefault(roles[name].role, []).append((_squares(p - old), _squares(old), p.numel()))
    for role, parts in sums.items():
        count = sum(n for _, _, n in parts)
        update = torch.stack([part[0].cpu() for part in parts]).sum().item()
        weight = torch.stack([part[1].cpu() for part in parts]).sum().item()
        moved[role] = Movement(sqrt(update / count), sqrt(weight / count))


def _squares(x: Tensor) -> Tensor:
    """sum |x|^2 in double precision, of all of a tensor that processes share."""
    real = torch.view_as_real(x) if x.is_complex() else x
    total: Any = real.double().square().sum()
    return total.full_tensor() if hasattr(total, "full_tensor") else total
