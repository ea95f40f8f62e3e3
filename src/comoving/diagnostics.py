"""Error control: what projection and change of frame throw away, measured and bounded while training runs.

Per parameter and step, with g~ = g + e_{t-1} the gradient and what feedback kept, z = F'^H g~, and q^2 = 1 - |z|^2/|g~|^2:

    captured   |z|^2 / |g~|^2 = 1 - q^2, the share of g~'s energy inside the frame
    overlap    max_n || I - R_n^H R_n ||_F over the modes at the last refresh: 0 for the same span, sqrt(r) for none shared
    defect     max |U_n^H U_n - I| of the frame at the last refresh
    error      the Frobenius norm of what is kept (feedback) or lost in this step (no feedback)
    bound      error <= q (|g| + bound before) + b1/(1 - b1) |F m - F' m'| + codec error, the running bound on the same

Everything is computed on the parameter's device, without reading it there.
"""

import torch
from torch import Tensor

from .codecs.base import as_real
from .linalg import multilinear
from .transport import Overlap

FIELDS = ("captured", "overlap", "defect", "error", "bound")
SLOT = "diagnostics"


def norm(x: Tensor) -> Tensor:
    """The Frobenius norm, a real float32 scalar."""
    return torch.linalg.vector_norm(as_real(x)).float()


def overlap_defect(overlap: Overlap) -> Tensor:
    """max_n || I - R_n^H R_n ||_F over the modes that are compressed in either frame, float32."""
    defects = [
        norm(torch.eye(r.shape[-1], dtype=r.dtype, device=r.device) - r.mH @ r) for r in overlap if r is not None
    ]
    return torch.stack(defects).amax() if defects else torch.zeros(())


def lost_momentum(old: Tensor, new: Tensor, overlap: Overlap) -> Tensor:
    """|F m - F' m'| from coordinates alone: sqrt(|m|^2 - 2 Re<R m, m'> + |m'|^2).

    The difference of nearly equal squares is uncertain by a few rounding errors of |m|^2, which are added so that a bound
    built on it stays one.
    """
    cross = torch.sum(as_real(multilinear(old, overlap)) * as_real(new)).float()
    squares = norm(old).square() + norm(new).square()
    return (squares - 2 * cross).clamp_min(0).add(squares, alpha=8 * torch.finfo(torch.float32).eps).sqrt()
