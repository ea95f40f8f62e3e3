r"""Darcy flow: random coefficients and their pressure fields, by our own finite-volume solver.

    -div(a grad u) = f  on the unit square,   u = 0 on its boundary

The square is cut into n x n cells of side h = 1/n; a, f and u are their values at the cell centers. The flux through
the face between two cells is -(u_right - u_left)/h times the *harmonic* mean of their coefficients, which is exact for
a coefficient that jumps at the face. At the boundary the wall is half a cell away, so the flux is 2 a u / h. The matrix
is symmetric, positive definite and an M-matrix (f >= 0 gives u >= 0); the error is O(h^2) for smooth a and u.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comoving.race import cache
from comoving.race.extras import require

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DarcyData:
    """What fixes a data set completely; its hash names the file in the cache.

    Args:
        samples: number of (a, u) pairs, at least 1.
        resolution: cells per side, at least 4.
        seed: seeds sample i with (seed, i), so a longer set begins with a shorter one.
        tau, alpha: prior of the Gaussian field, (-Laplacian + tau^2)^-alpha, both positive.
        low, high: the two values of the coefficient, both positive.
    """

    samples: int
    resolution: int = 32
    seed: int = 0
    tau: float = 3.0
    alpha: float = 2.0
    low: float = 3.0
    high: float = 12.0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; it must be at least 1")
        if self.resolution < 4:
            raise ValueError(f"resolution is {self.resolution}; it must be at least 4")
        for name in ("tau", "alpha", "low", "high"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


def assemble(a: Array):
    """The n^2 x n^2 sparse matrix of -div(a grad .) for cell values ``a`` of shape (n, n), in CSC form."""
    sparse = require("scipy.sparse", "pde")
    n = a.shape[0]
    index = np.arange(n * n).reshape(n, n)
    diagonal = np.zeros((n, n))
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    entries: list[Array] = []
    # The second axis is the first one of the transpose; .T gives views, so `diagonal` is filled in place.
    for coefficient, place, total in ((a, index, diagonal), (a.T, index.T, diagonal.T)):
        face = 2 * coefficient[1:] * coefficient[:-1] / (coefficient[1:] + coefficient[:-1]) * n**2
        total[1:] += face
        total[:-1] += face
        total[0] += 2 * coefficient[0] * n**2
        total[-1] += 2 * coefficient[-1] * n**2
        rows += [place[1:].ravel(), place[:-1].ravel()]
        columns += [place[:-1].ravel(), place[1:].ravel()]
        entries += [-face.ravel(), -face.ravel()]
    rows.append(index.ravel())
    columns.append(index.ravel())
    entries.append(diagonal.ravel())
    triplets = (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.coo_matrix(triplets, shape=(n * n, n * n)).tocsc()


def solve(a: Array, f: Array | float = 1.0) -> Array:
    """Solve -div(a grad u) = f with u = 0 on the boundary, by a sparse direct method.

    Args:
        a: coefficient at the cell centers, (n, n), positive.
        f: source at the cell centers, (n, n) or one number.

    Returns:
        u at the cell centers, (n, n).

    Raises:
        ValueError: if ``a`` is not square or not positive.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"a has shape {a.shape}; it must be square")
    if not (a > 0).all():
        raise ValueError(f"a has the value {a.min()}; the coefficient must be positive everywhere")
    linalg = require("scipy.sparse.linalg", "pde")
    source = np.broadcast_to(np.asarray(f, dtype=np.float64), a.shape)
    # Symmetric ordering and no pivoting: safe for a positive definite matrix, and half the fill.
    factor = linalg.splu(
        assemble(a), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    return factor.solve(source.ravel()).reshape(a.shape)


def gaussian_field(n: int, rng: np.random.Generator, tau: float, alpha: float) -> Array:
    """A draw of N(0, (-Laplacian + tau^2)^-alpha) with Neumann boundary and zero mean, (n, n) at the cell centers.

    A cosine series: mode (j, k) has standard deviation (pi^2 (j^2 + k^2) + tau^2)^(-alpha/2).
    """
    fft = require("scipy.fft", "pde")
    k = np.arange(n)
    deviation = (np.pi**2 * (k[:, None] ** 2 + k[None, :] ** 2) + tau**2) ** (-alpha / 2)
    coefficients = rng.standard_normal((n, n)) * deviation
    coefficients[0, 0] = 0.0
    return n * fft.idctn(coefficients, norm="ortho")


def generate(spec: DarcyData, progress: Callable[[int], None] = lambda done: None) -> tuple[Array, Array]:
    """Coefficients and pressures, both (samples, n, n); ``progress`` is called with the number of samples done."""
    shape = (spec.samples, spec.resolution, spec.resolution)
    a, u = np.empty(shape), np.empty(shape)
    for i in range(spec.samples):
        rng = np.random.default_rng((spec.seed, i))
        field = gaussian_field(spec.resolution, rng, spec.tau, spec.alpha)
        a[i] = np.where(field >= 0, spec.high, spec.low)
        u[i] = solve(a[i])
        progress(i + 1)
    return a, u


def load(spec: DarcyData, progress: Callable[[int], None] = lambda done: None) -> tuple[Array, Array]:
    """:func:`generate`, kept on disk by :func:`comoving.race.cache.load`."""
    return cache.load(  # pyright: ignore[reportReturnType]
        f"darcy-{spec.resolution}",
        spec,
        Path(__file__),
        ("a", "u"),
        lambda: generate(spec, progress),
    )
