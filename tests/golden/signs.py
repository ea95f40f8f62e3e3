"""Decompositions whose vectors have the signs of a convention, instead of those that each CPU's LAPACK happens to give.

Recipes that leave moments in old coordinates when a frame turns depend on these signs, and so would their traces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def settled() -> Iterator[None]:
    """Inside, eigenvectors and left singular vectors have a positive product with one fixed vector."""
    eigh, svd = torch.linalg.eigh, torch.linalg.svd

    def settled_eigh(*args: Any, **options: Any) -> Any:
        values, vectors = eigh(*args, **options)
        return torch.return_types.linalg_eigh((values, vectors * _phases(vectors).conj()))

    def settled_svd(*args: Any, **options: Any) -> Any:
        u, s, vh = svd(*args, **options)
        phases, paired = _phases(u), s.shape[-1]
        left, right = torch.ones_like(phases), torch.ones_like(vh[..., :1])
        left[..., :paired] = phases[..., :paired].conj()
        right[..., :paired, :] = phases[..., :paired].mT
        return torch.return_types.linalg_svd((u * left, s, vh * right))

    with patch.object(torch.linalg, "eigh", settled_eigh), patch.object(torch.linalg, "svd", settled_svd):
        yield


def _phases(vectors: Tensor) -> Tensor:
    """The sign, or complex phase, of each column's product with the fixed vector."""
    fixed = torch.arange(1, vectors.shape[-2] + 1, dtype=torch.float64).cos().to(vectors)
    phases = (fixed.unsqueeze(-1) * vectors).sum(-2, keepdim=True).sgn()
    return torch.where(phases == 0, torch.ones_like(phases), phases)
