"""Error control: what projection and change of frame throw away, measured and bounded while training runs.

Per parameter and step, with g~ = g + e_{t-1} the gradient and what feedback kept, z = F'^H g~, q^2 = 1 - |z|^2/|g~|^2:

    captured   |z|^2 / |g~|^2 = 1 - q^2, the share of g~'s energy inside the frame
    overlap    max_n || I - R_n^H R_n ||_F over the modes at the last refresh: 0 for the same span, sqrt(r) at worst
    defect     max |U_n^H U_n - I| of the frame at the last refresh
    error      the Frobenius norm of what is kept (feedback), before it is encoded, or lost in this step (no feedback)
    bound      q (|g| + bound before) + b1/(1 - b1) |F m - F' m'| + codec error, the running bound on the error

Everything is computed on the parameter's device, without reading it there.
"""

import torch
from torch import Tensor

from .frames import Overlap
from .linalg import norm

_TINY = torch.finfo(torch.float32).tiny
FIELDS = ("captured", "overlap", "defect", "error", "bound")
SLOT = "diagnostics"


def measure(  # noqa: PLR0917
    figures: Tensor,
    own: Tensor,
    total: Tensor | None,
    core: Tensor,
    kept: Tensor | None,
    codec: Tensor,
    lost: Tensor,
    whole: bool,
) -> None:
    """Write "captured", "error" and "bound" of one step into the figures, in place.

    Args:
        figures: (5,) float32, in the order of :data:`FIELDS`.
        own: |g|.
        total: |g~| where it was measured; else |g~|^2 = |z|^2 + |e|^2, which holds while the frame stands.
        core: z.
        kept: |e| before it is encoded, or None without feedback.
        codec: bound on the codec's error.
        lost: b1/(1 - b1) |F m - F' m'|.
        whole: whether z is all of g~ inside the frame; later gradients of an accumulation window leave e aside, q is 1.
    """
    inside = norm(core).square()
    if kept is None:
        energy = own.square()
        error = bound = (energy - inside).clamp_min(0).sqrt()
    else:
        error = kept
        energy = inside + error.square() if total is None else total.square()
        q = (1 - inside / energy.clamp_min(_TINY)).clamp_min(0).sqrt()
        before = torch.where(figures[4].isfinite(), figures[4], error)  # a norm may overflow once, not for ever
        bound = (q if whole else 1) * (own + before) + lost + codec
    figures[0], figures[3], figures[4] = inside / energy.clamp_min(_TINY), error, bound


def overlap_defect(overlap: Overlap) -> Tensor:
    """max_n || I - R_n^H R_n ||_F over the modes that are compressed in either frame, float32."""
    turned = [r for r in overlap.matrices if r is not None]
    defects = [norm(torch.eye(r.shape[-1], dtype=r.dtype, device=r.device) - r.mH @ r) for r in turned]
    return torch.stack(defects).amax() if defects else torch.zeros(())
