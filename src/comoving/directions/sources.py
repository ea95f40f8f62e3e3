"""Where the directions of an extraction come from."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..linalg import orthonormalize, svd
from . import carry

Source = Literal["weight", "change", "momentum", "random"]
SOURCES: tuple[Source, ...] = ("weight", "change", "momentum", "random")


def source_of(
    name: str, p: Tensor, source: Source, initial: Mapping[str, Tensor] | None, optimizer: Optimizer
) -> Tensor:
    """What the directions of a layer are taken from.

    Raises:
        ValueError: it is not there, does not fit, or is not finite.
    """
    if source == "weight":
        return p.detach()
    if source == "momentum":
        found = carry.momentum(optimizer, p)
        if found is None:
            raise ValueError(f"extract: the optimizer has no momentum of {name}; take a step first, or another source")
        return found
    assert initial is not None
    first = initial.get(f"{name}.weight", initial.get(name))
    if first is None:
        raise ValueError(f"extract: initial holds neither {name}.weight nor {name}")
    if first.shape != p.shape:
        raise ValueError(f"extract: initial has {name} of shape {tuple(first.shape)}, the model {tuple(p.shape)}")
    if not bool(first.isfinite().all()):
        raise ValueError(f"extract: initial has a {name} that is not finite")
    return p.detach() - first.to(p.device, p.dtype)


def leading(name: str, x: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Leading left and right singular vectors.

    Raises:
        ValueError: the matrix is zero.
    """
    if not bool(x.any()):
        raise ValueError(f"extract: what the directions of {name} are taken from is zero")
    u, _, vh = svd(x.to(dtype))
    # Roundoff of single precision in U^T U would be as much of C in R.
    return orthonormalize(u[:, :rank]), orthonormalize(vh[:rank].mT)
