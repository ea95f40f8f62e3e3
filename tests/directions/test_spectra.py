"""Leading triplets against NumPy in float64, cosines against SciPy, and matrices that have no directions."""

import numpy as np
import pytest
import scipy.linalg
import torch

from comoving.directions.spectra import exact, leading, principal_cosines, projected_energy, vector_cosines

SHAPES = [(40, 90), (90, 40), (64, 64), (12, 9)]


def matrix(m, n, decay=0.8, dtype=torch.float64, seed=0):
    """Random singular vectors, singular values decay^i."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)
    u = torch.linalg.qr(torch.randn(m, r, generator=g, dtype=dtype)).Q
    v = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=dtype)).Q
    return (u * decay ** torch.arange(r, dtype=torch.float64)) @ v.mH


def reference(a, k):
    u, s, vh = np.linalg.svd(a.to(torch.complex128 if a.is_complex() else torch.float64).numpy(), full_matrices=False)
    return u[:, :k], s[:k], vh[:k].conj().T


def check(spectrum, a, k, tolerance):
    u, s, v = reference(a, k)
    np.testing.assert_allclose(spectrum.s.double().numpy(), s, rtol=tolerance, atol=tolerance * s[0])
    for found, want in ((spectrum.u, u), (spectrum.v, v)):
        overlap = np.abs(np.sum(found.to(torch.complex128).numpy().conj() * want, 0))
        np.testing.assert_allclose(overlap, 1, atol=tolerance)
    # The phases of u and v belong together.
    inside = (spectrum.u.mH @ a.to(spectrum.u.dtype) @ spectrum.v).to(torch.complex128).numpy()
    np.testing.assert_allclose(inside, np.diag(s), atol=10 * tolerance * s[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_both_ways_against_numpy(shape, dtype):
    a = matrix(*shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    check(exact(a, 5), a, 5, 2e-5)
    check(leading(a, 5, iterations=4), a, 5, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_up(dtype):
    a = matrix(50, 60).to(dtype)
    found = leading(a, 4, iterations=6)
    assert found.u.dtype == torch.float32
    check(found, a, 4, 1e-4)


def test_all_triplets():
    a = matrix(20, 70)
    check(leading(a, 20), a, 20, 1e-10)
    with pytest.raises(ValueError, match=r"k = 21 is outside \[1, 20\]"):
        leading(a, 21)


def test_a_warm_start_becomes_exact_when_the_matrix_stands_still():
    a = torch.randn(150, 260, generator=torch.Generator().manual_seed(3))  # flat: the hardest spectrum
    want = exact(a.double(), 8)
    found, errors = leading(a, 8), []
    for reading in range(25):
        errors.append(1 - float(principal_cosines(found.u.double(), want.u)[-1]))
        found = leading(a, 8, found.u, seed=reading)
    assert errors[0] > 0.1 and errors[-1] < 1e-6, errors
    check(found, a, 8, 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_whose_squares_leave_float32(scale):
    a = (matrix(90, 80) * scale).float()
    check(leading(a, 4, iterations=5), a, 4, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 2])
def test_rank_deficient_matrices_keep_orthonormal_vectors(shape, rank):
    u, s, v = reference(matrix(*shape), rank)
    a = torch.from_numpy(u * s @ v.T).float()
    for found in (leading(a, 6), leading(a, 6, leading(a, 6)[2 if shape[0] >= shape[1] else 0])):
        for x in (found.u, found.v):
            torch.testing.assert_close(x.T @ x, torch.eye(6), atol=1e-5, rtol=0)
        want = np.concatenate([s, np.zeros(6 - rank)])
        np.testing.assert_allclose(found.s.numpy(), want, atol=2e-6)


def test_batches_are_stacks():
    a = torch.stack([matrix(60, 70, seed=i) for i in range(3)])
    start = torch.stack([torch.linalg.qr(torch.randn(60, 4, dtype=torch.float64)).Q for _ in range(3)])
    together = leading(a, 4, start)
    for i in range(3):
        for whole, single in zip(together, leading(a[i], 4, start[i]), strict=True):
            torch.testing.assert_close(whole[i].abs(), single.abs())
    with pytest.raises(ValueError, match="does not fit 8 directions of 60 entries"):
        leading(a, 4, start.mT)


def test_principal_cosines_against_scipy():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.linalg.qr(torch.randn(30, k, generator=g, dtype=torch.float64)).Q for k in (5, 3))
    b = torch.linalg.qr(b + a[:, :3]).Q
    want = np.sort(np.cos(scipy.linalg.subspace_angles(a.numpy(), b.numpy())))[::-1]
    np.testing.assert_allclose(principal_cosines(a, b).numpy(), want, atol=1e-12)
    np.testing.assert_allclose(vector_cosines(a[:, :3], -b).numpy(), np.abs(np.diag(a[:, :3].T @ b)), atol=1e-12)


def test_projected_energy():
    a = matrix(30, 20)
    u, s, v = (torch.from_numpy(np.ascontiguousarray(x)) for x in reference(a, 20))
    want = float((s[1:4] ** 2).sum() / (s**2).sum())
    assert float(projected_energy(a, u[:, 1:4], v[:, 1:4])) == pytest.approx(want, rel=1e-10)
    assert float(projected_energy(a.float() * 1e-30, u[:, 1:4].float(), v[:, 1:4].float())) == pytest.approx(want, 1e-4)
    assert float(projected_energy(a, u[:, :2], v[:, 2:4])) == pytest.approx(0, abs=1e-20)
    assert float(projected_energy(torch.zeros(30, 20), u, v)) == 0
