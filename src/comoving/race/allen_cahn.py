r"""Allen-Cahn in three dimensions: random fields and how they separate into phases, by our own spectral solver.

    u_t = eps^2 Laplacian(u) + u - u^3   on the unit cube, periodic

Space: u is a trigonometric polynomial, its values are taken on m points per side and only modes |k| < m/4 along each
side are kept. The product of three such polynomials then has no mode that aliases onto a kept one (the rule of one
half), so u^3 is projected exactly: the semi-discrete system is the gradient flow of the energy restricted to these
polynomials, and its energy cannot grow. Convergence in m is faster than any power for smooth u.

Time: exponential Runge-Kutta, ETDRK4 of Cox and Matthews (2002), fourth order, with u + eps^2 Laplacian(u) exact; its
coefficients are means over a circle in the complex plane (Kassam and Trefethen 2005), which are accurate at a zero of
the linear part too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comoving.race import cache
from comoving.race.extras import require

Array = NDArray[np.float64]
Stored = NDArray[np.float32]

CIRCLE = 32
TOGETHER = 8
AXES = (-3, -2, -1)


@dataclass(frozen=True)
class AllenCahnData:
    """What fixes a data set completely; its hash names the file in the cache.

    Args:
        samples: number of fields, at least 1.
        resolution: saved points per side, even and at least 4.
        frames: saved times final/frames, 2 final/frames, ..., final; at least 1.
        seed: seeds sample i with (seed, i), so a longer set begins with a shorter one.
        final: the last time, positive.
        eps: thickness of an interface, positive.
        amplitude: standard deviation of the initial field at a point, positive.
        tau, alpha: spectrum of the initial field, (4 pi^2 |k|^2 + tau^2)^-alpha, both positive.
        refinement: the solver has this many points per side for each saved one, at least 2.
        steps: time steps from one frame to the next, at least 1.
    """

    samples: int
    resolution: int = 12
    frames: int = 8
    seed: int = 0
    final: float = 6.0
    eps: float = 0.05
    amplitude: float = 0.2
    tau: float = 9.0
    alpha: float = 3.0
    refinement: int = 3
    steps: int = 2

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("resolution", 4), ("frames", 1), ("refinement", 2), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.resolution % 2:
            raise ValueError(f"resolution is {self.resolution}; it must be even")
        for name in ("final", "eps", "amplitude", "tau", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")


def wavenumbers(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """Integer wavenumbers along the three axes of a real transform of ``shape``, each shaped to broadcast."""
    a, b, c = shape
    first, second = (np.rint(np.fft.fftfreq(n) * n).astype(np.int64) for n in (a, b))
    return first[:, None, None], second[None, :, None], np.arange(c // 2 + 1)[None, None, :]


def kept(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The modes of a real transform of ``shape`` that the solver keeps: |k| < m/4 along each axis."""
    x, y, z = (4 * abs(k) < m for k, m in zip(wavenumbers(shape), shape, strict=True))
    return x & y & z


def laplacian(shape: tuple[int, ...]) -> Array:
    """Symbol of the Laplacian on the unit cube, -4 pi^2 |k|^2."""
    x, y, z = wavenumbers(shape)
    return -4 * np.pi**2 * (x**2 + y**2 + z**2).astype(np.float64)


def coefficients(linear: Array, h: float) -> tuple[Array, ...]:
    """ETDRK4 for the symbol ``linear`` and step ``h``: exp(h L), exp(h L/2), the half step's and the three weights."""
    circle = np.exp(2j * np.pi * (np.arange(CIRCLE) + 0.5) / CIRCLE)
    values, inverse = np.unique(h * linear, return_inverse=True)
    z: Any = values[:, None] + circle
    e: Any = np.exp(z)

    def mean(f: Any) -> Array:
        return h * f.mean(1).real[inverse].reshape(linear.shape)

    return (
        np.exp(h * linear),
        np.exp(h * linear / 2),
        mean((np.exp(z / 2) - 1) / z),
        mean((-4 - z + e * (4 - 3 * z + z**2)) / z**3),
        mean((2 + z + e * (z - 2)) / z**3),
        mean((-4 - 3 * z - z**2 + e * (4 - z)) / z**3),
    )


def solve(u: Array, eps: float, final: float, frames: int, steps: int) -> Array:
    """Solve from time 0 to ``final``.

    Args:
        u: initial values, evenly spaced in the unit cube, (samples, m1, m2, m3); modes not kept are dropped first.
        eps: thickness of an interface.
        final: the last time.
        frames: how many times are returned, equally spaced and ending with ``final``.
        steps: time steps from one to the next.

    Returns:
        u at these times, (samples, m1, m2, m3, frames).

    Raises:
        ValueError: if ``u`` has another number of axes.
    """
    if u.ndim != 4:
        raise ValueError(f"u has shape {u.shape}; it must be (samples, m1, m2, m3)")
    fft: Any = require("scipy.fft", "pde")
    shape = u.shape[1:]
    mask = kept(shape)
    full, half, q, f1, f2, f3 = coefficients(1 + eps**2 * laplacian(shape), final / (frames * steps))
    # The weights carry the sign of -u^3 and the projection: what a mode outside never receives, it never holds.
    q, f1, f2, f3 = (np.where(mask, -weight, 0.0) for weight in (q, f1, f2, f3))

    def cube(v: NDArray[np.complex128]) -> NDArray[np.complex128]:
        values = fft.irfftn(v, s=shape, axes=AXES)
        return fft.rfftn(values * values * values, axes=AXES)

    v = fft.rfftn(u, axes=AXES) * mask
    out = np.empty((*u.shape, frames))
    for frame in range(frames):
        for _ in range(steps):
            at_v = cube(v)
            a = half * v + q * at_v
            at_a = cube(a)
            at_b = cube(half * v + q * at_a)
            at_c = cube(half * a + q * (2 * at_b - at_v))
            v = full * v + f1 * at_v + 2 * f2 * (at_a + at_b) + f3 * at_c
        out[..., frame] = fft.irfftn(v, s=shape, axes=AXES)
    return out


def energy(u: Array, eps: float) -> Array:
    """Integral of eps^2 |grad u|^2 / 2 + (1 - u^2)^2 / 4 over the cube, for each (m1, m2, m3) in ``u``."""
    fft: Any = require("scipy.fft", "pde")
    shape = u.shape[-3:]
    rough = fft.irfftn(laplacian(shape) * fft.rfftn(u, axes=AXES), s=shape, axes=AXES)
    return (-(eps**2) * u * rough / 2 + (1 - u**2) ** 2 / 4).mean(AXES)


def gaussian_field(n: int, rng: np.random.Generator, amplitude: float, tau: float, alpha: float) -> Array:
    """A draw of a homogeneous periodic Gaussian field, (n, n, n), with modes |k| < n/2 along each axis.

    Mode k has a variance proportional to (4 pi^2 |k|^2 + tau^2)^-alpha; the field has the deviation ``amplitude``.
    """
    fft: Any = require("scipy.fft", "pde")
    shape = (n, n, n)
    below = [2 * abs(k) < n for k in wavenumbers(shape)]
    deviation = (tau**2 - laplacian(shape)) ** (-alpha / 2) * (below[0] & below[1] & below[2])
    # A mode of the real transform stands for its conjugate too, except those with k3 = 0.
    both = np.where(np.arange(n // 2 + 1) == 0, 1, 2)
    deviation *= amplitude * n**1.5 / np.sqrt((both * deviation**2).sum())
    return fft.irfftn(fft.rfftn(rng.standard_normal(shape)) * deviation, s=shape)


def refine(u: Array, m: int) -> Array:
    """The trigonometric polynomial with the values ``u``, (samples, n, n, n), on m >= n points per side.

    Exact where ``u`` has no mode n/2, as those of :func:`gaussian_field`.
    """
    fft: Any = require("scipy.fft", "pde")
    n = u.shape[-1]
    v = fft.rfftn(u, axes=AXES)
    wide = np.zeros((len(u), m, m, m // 2 + 1), np.complex128)
    places = np.r_[0 : n // 2, m - n // 2 + 1 : m]
    sources = np.r_[0 : n // 2, n // 2 + 1 : n]
    wide[:, places[:, None], places, : n // 2] = v[:, sources[:, None], sources, : n // 2]
    return fft.irfftn(wide, s=(m, m, m), axes=AXES) * (m / n) ** 3


def generate(spec: AllenCahnData, progress: Callable[[int], None] = lambda done: None) -> tuple[Stored, Stored]:
    """Initial fields (samples, n, n, n) and their future (samples, n, n, n, frames), computed in float64.

    The initial field has no mode that the n points per side do not show, so it determines its future.
    ``progress`` is called with the number of samples done.
    """
    n, every = spec.resolution, spec.refinement
    start = np.empty((spec.samples, n, n, n), np.float32)
    future = np.empty((*start.shape, spec.frames), np.float32)
    for first in range(0, spec.samples, TOGETHER):
        rows = range(first, min(first + TOGETHER, spec.samples))
        fields = np.stack(
            [
                gaussian_field(n, np.random.default_rng((spec.seed, i)), spec.amplitude, spec.tau, spec.alpha)
                for i in rows
            ]
        )
        solution = solve(refine(fields, every * n), spec.eps, spec.final, spec.frames, spec.steps)
        start[rows.start : rows.stop] = fields
        future[rows.start : rows.stop] = solution[:, ::every, ::every, ::every]
        progress(rows.stop)
    return start, future


def load(spec: AllenCahnData, progress: Callable[[int], None] = lambda done: None) -> tuple[Stored, Stored]:
    """:func:`generate`, kept on disk by :func:`comoving.race.cache.load`."""
    return cache.load(  # pyright: ignore[reportReturnType]
        f"allen-cahn-{spec.resolution}",
        spec,
        Path(__file__),
        ("start", "future"),
        lambda: generate(spec, progress),
    )
