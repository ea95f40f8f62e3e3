"""Error control: what projection and change of frame throw away, measured and bounded while training runs.

Per parameter and step, with g~ = g + e_{t-1} the gradient and what feedback kept, z = F'^H g~, q^2 = 1 - |z|^2/|g~|^2:

    captured   |z|^2 / |g~|^2 = 1 - q^2, the share of g~'s energy inside the frame
    overlap    max_n || I - R_n^H R_n ||_F over the modes at the last refresh: 0 for the same span, sqrt(r) at worst
    defect     max |U_n^H U_n - I| of the frame at the last refresh
    error      the Frobenius norm of what is kept (feedback), before it is encoded, or lost in this step (no feedback)
    bound      q (|g| + bound before) + b1/(1 - b1) |F m - F' m'| + codec error, the running bound on the error

Without feedback the error is q |g~|, and so is the bound. Of Dion's buffer
(:class:`comoving.residual.MomentumBuffer`), which keeps part of what the frame holds, there is no bound, and no such
figure. q^2 is a difference that rounding leaves within 32 machine epsilons: these are added to it in the bound. The
rounding of what is kept, of the size of a machine epsilon of the momentum and of the gradients since the last refresh,
is not counted.

A norm above 1.8e19 overflows in single precision: figures that need it are inf, none is NaN, and the bound begins anew
with the first error that is finite. One below 1e-19 counts as 0.

Of a batch the figures have its members in front, and so has all that they are made of.

A step writes on the parameter's device what these follow from, without reading it: |g~|, |z|, and "error" and "bound"
where feedback keeps something. The rest is arithmetic of whoever reads.
"""

from math import inf, isfinite, isnan, sqrt

import torch
from torch import Tensor

from .frames import Overlap
from .linalg import norm
from .residual import Residual

FIELDS = ("captured", "overlap", "defect", "error", "bound")
SLOT = "diagnostics"
STORED = ("total", "inside", "overlap", "defect", "error", "bound")
"""The figures in that slot, in working precision: |g~|, |z| and four of :data:`FIELDS`."""


def measure(figures: Tensor, own: Tensor, inside: Tensor) -> None:
    """Write what a step without feedback shows into the figures, in place.

    Args:
        figures: (*rows, 6), in the order of :data:`STORED`.
        own: |g|, (*rows).
        inside: |z|, (*rows).
    """
    figures[..., :2] = torch.stack([own, inside], -1)


def measure_kept(  # noqa: PLR0917
    figures: Tensor,
    own: Tensor,
    total: Tensor | None,
    inside: Tensor,
    kept: Tensor,
    codec: Tensor,
    lost: Tensor,
    whole: bool,
) -> None:
    """Write what a step with feedback shows into the figures, in place.

    Args:
        figures: (*rows, 6), in the order of :data:`STORED`.
        own: |g|, (*rows), as are all.
        total: |g~| where it was measured; else |g~|^2 = |z|^2 + |e|^2, which holds while the frame stands.
        inside: |z|.
        kept: |e| before it is encoded.
        codec: bound on the codec's error.
        lost: b1/(1 - b1) |F m - F' m'|.
        whole: whether z is all of g~ inside the frame; later gradients of an accumulation window leave e aside, q is 1.
    """
    tiny = torch.finfo(figures.dtype).tiny
    total = torch.hypot(inside, kept) if total is None else total
    q = (1 + _rounding(figures) - (inside / total.clamp_min(tiny)).square()).clamp_min(0).sqrt()
    bound = (q if whole else 1) * (own + figures[..., 5]) + lost + codec
    bound = torch.where(bound.isfinite(), bound, kept + codec)  # a norm may overflow once, not for ever
    figures[..., :2], figures[..., 4:] = torch.stack([total, inside], -1), torch.stack([kept, bound], -1)


def reading(figures: Tensor, residual: Residual) -> dict[str, float]:
    """The figures by the names in :data:`FIELDS`, read from the device at once; without "bound" where there is none.

    Args:
        figures: (6,), as :func:`measure` or, where the residual feeds, :func:`measure_kept` left them.
        residual: of the same parameter.
    """
    total, inside, overlap, defect, error, bound = (inf if isnan(x) else x for x in figures.tolist())
    seen = isfinite(total) and isfinite(inside)
    captured = (min(inside / total, 1.0) ** 2 if total else 0.0) if seen else inf
    if not residual.feeds:
        error = total * sqrt(1 - captured) if seen else inf
        bound = total * sqrt(1 - captured + _rounding(figures)) if seen else inf
    elif residual.bounded:
        error = min(error, bound)  # which is a difference as well, of numbers that may be larger
    found: dict[str, float] = dict(zip(FIELDS, (captured, overlap, defect, error, bound), strict=True))
    if not residual.bounded:
        del found["bound"]
    return found


def _rounding(figures: Tensor) -> float:
    return 32 * torch.finfo(figures.dtype).eps


def overlap_defect(overlap: Overlap) -> Tensor:
    """max_n || I - R_n^H R_n ||_F over the modes that are compressed in either frame, float32.

    Of R_n of shape (*rows, r'_n, r_n) it is (*rows); without dimensions where no mode is compressed.
    """
    turned = [r for r in overlap.matrices if r is not None]
    defects = [norm(torch.eye(r.shape[-1], dtype=r.dtype, device=r.device) - r.mH @ r, r.ndim - 2) for r in turned]
    return torch.stack(defects).amax(0) if defects else torch.zeros(())
