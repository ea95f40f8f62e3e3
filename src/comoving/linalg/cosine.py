"""The orthonormal discrete cosine transform of type II, by FFT and column by column.

D has entries D_ik = sqrt(2/d) cos(pi (2i + 1) k / 2d), its column k = 0 divided by sqrt(2): D^T D = I.
"""

from math import pi, sqrt

import torch
from torch import Tensor


def cosine_transform(x: Tensor, dim: int) -> Tensor:
    """D^T x along one dimension, by one FFT of the same length (Makhoul, 1980); x real or complex."""
    if x.is_complex():
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(cosine_transform(parts, dim % x.ndim).contiguous())
    moved = x.movedim(dim, -1)
    d = moved.shape[-1]
    spectrum = torch.fft.fft(torch.cat([moved[..., ::2], moved[..., 1::2].flip(-1)], dim=-1))
    angles = torch.arange(d, device=x.device, dtype=torch.float64) * (-pi / (2 * d))
    twiddle = torch.polar(torch.full_like(angles, sqrt(2 / d)), angles).to(spectrum.dtype)
    result = (spectrum * twiddle).real.clone()
    result[..., 0] *= sqrt(0.5)
    return result.movedim(-1, dim)


def cosine_columns(d: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The columns of D with these indices, (*rows, r), as (*rows, d, r) on the indices' device.

    Angles are reduced modulo 2 pi in integers and evaluated in float64, so that large d cost no accuracy.
    """
    odd = 2 * torch.arange(d, device=indices.device) + 1
    angles = (odd.unsqueeze(-1) * indices.unsqueeze(-2)).remainder(4 * d).double() * (pi / (2 * d))
    first = torch.where(indices == 0, 0.5, 1.0).double().unsqueeze(-2)  # exact in any precision
    return (angles.cos() * (first * (2 / d)).sqrt()).to(dtype)
