"""Error control: what projection and change of frame throw away, measured and bounded while training runs.

Per parameter and step, with g~ = g + e_{t-1} the gradient and what feedback kept, z = F'^H g~, q^2 = 1 - |z|^2/|g~|^2:

    captured   |z|^2 / |g~|^2 = 1 - q^2, the share of g~'s energy inside the frame
    overlap    max_n || I - R_n^H R_n ||_F over the modes at the last refresh: 0 for the same span, sqrt(r) at worst
    defect     max |U_n^H U_n - I| of the frame at the last refresh
    error      the Frobenius norm of what is kept (feedback), before it is encoded, or lost in this step (no feedback)
    bound      q (|g| + bound before) + b1/(1 - b1) |F m - F' m'| + codec error, the running bound on the error

A step writes on the parameter's device what these follow from, without reading it: |g~|, |z|, and "error" and "bound"
where feedback keeps something; without feedback both are sqrt(|g~|^2 - |z|^2). The rest is arithmetic of whoever reads.
"""

from math import sqrt

import torch
from torch import Tensor

from .frames import Overlap
from .linalg import norm

_TINY = torch.finfo(torch.float32).tiny
FIELDS = ("captured", "overlap", "defect", "error", "bound")
SLOT = "diagnostics"
STORED = ("total", "inside", "overlap", "defect", "error", "bound")
"""The figures in that slot, in working precision: |g~|, |z| and four of :data:`FIELDS`."""


def measure(figures: Tensor, own: Tensor, core: Tensor) -> None:
    """Write what a step without feedback shows into the figures, in place.

    Args:
        figures: (6,), in the order of :data:`STORED`.
        own: |g|.
        core: z.
    """
    figures[:2] = torch.stack([own, norm(core)])


def measure_kept(  # noqa: PLR0917
    figures: Tensor,
    own: Tensor,
    total: Tensor | None,
    core: Tensor,
    kept: Tensor,
    codec: Tensor,
    lost: Tensor,
    whole: bool,
) -> None:
    """Write what a step with feedback shows into the figures, in place.

    Args:
        figures: (6,), in the order of :data:`STORED`.
        own: |g|.
        total: |g~| where it was measured; else |g~|^2 = |z|^2 + |e|^2, which holds while the frame stands.
        core: z.
        kept: |e| before it is encoded.
        codec: bound on the codec's error.
        lost: b1/(1 - b1) |F m - F' m'|.
        whole: whether z is all of g~ inside the frame; later gradients of an accumulation window leave e aside, q is 1.
    """
    inside = norm(core)
    total = torch.hypot(inside, kept) if total is None else total
    q = (1 - (inside / total.clamp_min(_TINY)).square()).clamp_min(0).sqrt()
    before = torch.where(figures[5].isfinite(), figures[5], kept)  # a norm may overflow once, not for ever
    bound = (q if whole else 1) * (own + before) + lost + codec
    figures[:2], figures[4:] = torch.stack([total, inside]), torch.stack([kept, bound])


def reading(figures: Tensor, feeds: bool) -> dict[str, float]:
    """The figures by the names in :data:`FIELDS`, read from the device at once.

    Args:
        figures: as :func:`measure` or :func:`measure_kept` left them.
        feeds: whether it was the latter.
    """
    total, inside, overlap, defect, error, bound = figures.tolist()
    if not feeds:
        error = bound = sqrt(max(total**2 - inside**2, 0.0))
    captured = (inside / max(total, _TINY)) ** 2
    return dict(zip(FIELDS, (captured, overlap, defect, error, bound), strict=True))


def overlap_defect(overlap: Overlap) -> Tensor:
    """max_n || I - R_n^H R_n ||_F over the modes that are compressed in either frame, float32."""
    turned = [r for r in overlap.matrices if r is not None]
    defects = [norm(torch.eye(r.shape[-1], dtype=r.dtype, device=r.device) - r.mH @ r) for r in turned]
    return torch.stack(defects).amax() if defects else torch.zeros(())
