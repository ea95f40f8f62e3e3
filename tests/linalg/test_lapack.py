"""Decompositions return finite orthonormal factors of what was decomposed, whatever LAPACK does."""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import comoving
from comoving.linalg import eigh, lapack, orthogonal, orthonormalize, pinv, qr, qr_triangle, svd
from contract.support import COMPLEX, REAL, close, randn
from fake_lapack import FakeLapack, always, thirds

DTYPES = [torch.float32, torch.complex64, REAL, COMPLEX]
EVERY = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUGH = {torch.float32: 3e-4, torch.complex64: 3e-4, REAL: 1e-10, COMPLEX: 1e-10}


def gradients(dtype):
    """Matrices as gradients really are, by name."""
    live = (torch.rand(24, 1, generator=torch.Generator().manual_seed(3)) < 0.2).to(dtype)
    one = torch.zeros(24, 16, dtype=dtype)
    one[5, 3] = 2
    yield "live rows", (live * randn((24, 4), dtype)) @ randn((4, 16), dtype, 1)
    yield "zero", torch.zeros(24, 16, dtype=dtype)
    yield "constant", torch.ones(8, 8, dtype=dtype)
    yield "rank 1", randn((24, 1), dtype, 2) @ randn((1, 16), dtype, 3)
    yield "one entry", one
    yield "denormal", randn((24, 16), dtype, 4) * 1e-40
    yield "graded", randn((24, 16), dtype, 5) * torch.logspace(0, -37, 24, dtype=REAL).to(dtype).unsqueeze(1)
    yield "huge", randn((24, 16), dtype, 6) * 1e30
    yield "wide", randn((5, 24), dtype, 7)
    yield "large", randn((96, 70), dtype, 8)
    yield "a batch", torch.stack([torch.ones(6, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype), randn((6, 4), dtype)])


def check_eigh(a, tolerance):
    dtype = a.dtype
    a = a.to(COMPLEX if a.dtype.is_complex else REAL)
    a = (a / a.abs().amax().clamp_min(1e-60)).to(dtype)
    h = a @ a.mH
    values, vectors = eigh(h)
    orthonormal(vectors, tolerance)
    assert values.dtype is dtype.to_real()
    assert (values.diff() >= 0).all()
    return (vectors * values.unsqueeze(-2)) @ vectors.mH - h


def check_qr(a, tolerance):
    q, r = qr(a)
    orthonormal(q, tolerance)
    assert torch.equal(r, r.triu())
    close(qr_triangle(a).abs(), r.abs(), tolerance * float(a.abs().amax()) + 1e-30)
    return q @ r - a


def check_svd(a, tolerance):
    u, s, vh = svd(a)
    orthonormal(u, tolerance)
    orthonormal(vh.mH, tolerance)
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    return (u * s.unsqueeze(-2)) @ vh - a


def orthonormal(q, tolerance):
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    assert ((q.mH @ q - eye).abs() <= tolerance).all()


CHECKS = {"eigh": check_eigh, "qr": check_qr, "svd": check_svd}
DECOMPOSED = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@DECOMPOSED
@EVERY
@pytest.mark.parametrize("wrong", [None, thirds, always], ids=["lapack", "every third call fails", "every call fails"])
def test_factors_of_any_gradient_whatever_lapack_does(check, dtype, wrong, monkeypatch):
    """They multiply to what was decomposed, but for eigenvectors where all of LAPACK fails: these are coordinates."""
    given = dict(gradients(dtype))
    fake = FakeLapack(monkeypatch, wrong) if wrong else None
    for name, a in given.items():
        left = check(a, ROUGH[dtype])
        assert left.isfinite().all(), name
        if wrong is always and check in (check_eigh, check_svd):
            continue
        size = 10.0 if check is check_eigh else max(float(a.abs().max()), 1e-38)
        # Without LAPACK's, singular vectors come from a Gram matrix, at half the digits.
        assert left.abs().max() <= size * max(ROUGH[dtype], 1e-7 if wrong and check is check_svd else 0), name
    assert fake is None or fake.spoilt > 3


@EVERY
def test_single_precision_takes_gram_matrices_with_few_live_rows(dtype):
    """A quarter of these are NaN, or raise, in LAPACK's own single precision."""
    for seed in range(60):
        source = torch.Generator().manual_seed(seed)
        d = (8, 16, 32, 64, 96, 128)[seed % 6]
        x = torch.randn(d, 4, generator=source, dtype=dtype) * (torch.rand(d, 1, generator=source) < 0.2)
        assert check_eigh(x, ROUGH[dtype]).abs().max() <= ROUGH[dtype]


@pytest.mark.parametrize("wrong", [None, thirds, always], ids=["lapack", "every third call fails", "every call fails"])
def test_pseudoinverses(wrong, monkeypatch):
    a = randn((6, 2)) @ randn((2, 9), seed=1)
    expected = torch.linalg.pinv(a, rtol=1e-12)
    if wrong:
        FakeLapack(monkeypatch, wrong)
    found = [pinv(a, 1e-12) for _ in range(4)]
    assert all(x.isfinite().all() for x in found)
    if wrong is not always:
        for x in found:
            close(x, expected)


@pytest.fixture
def unseen(monkeypatch):
    """As on a device: the host decides nothing."""
    for module in (lapack, orthogonal):
        monkeypatch.setattr(module, "asks_host", lambda x: False)


@EVERY
def test_a_device_is_not_waited_for(dtype, unseen):
    given = dict(gradients(dtype))
    for name, a in given.items():
        for check in CHECKS.values():
            assert check(a, ROUGH[dtype]).isfinite().all(), name
        if a.shape[-1] <= a.shape[-2]:
            orthonormal(orthonormalize(a), ROUGH[dtype])
    a = given["large"]
    q = orthonormalize(a)
    close(q @ (q.mH @ a), a, ROUGH[dtype])  # its span
    with FakeTensorMode():  # which raises for whatever reads a number
        for decompose in (orthonormalize, qr, svd, lambda x: eigh(x @ x.mH)):
            decompose(torch.empty(9, 5, dtype=dtype))


def test_what_fails_on_a_device_is_replaced_there(unseen, monkeypatch):
    """By coordinate vectors and what is seen in them, for the entries of a batch that failed alone."""
    true = torch.linalg.eigh

    def half(h):
        values, vectors = true(h)
        return values, torch.cat([vectors[:1] * torch.nan, vectors[1:]])

    monkeypatch.setattr(torch.linalg, "eigh", half)
    a = randn((2, 5, 5))
    h = a @ a.mT
    values, vectors = eigh(h)
    close(values[0], h[0].diagonal().sort().values)
    orthonormal(vectors, 1e-12)
    close((vectors[1] * values[1]) @ vectors[1].mT, h[1])
    monkeypatch.setattr(torch.linalg, "svd", lambda a, full_matrices: [x * torch.nan for x in known])
    for shape in ((2, 5, 3), (2, 3, 5)):
        a = randn(shape)
        known = [randn((2, shape[1], 3)), randn((2, 3)), randn((2, 3, shape[2]))]
        u, s, vh = svd(a)
        orthonormal(u, 1e-12)
        orthonormal(vh.mT, 1e-12)
        assert (s.diff() <= 0).all()
        close(((u * s.unsqueeze(-2)) @ vh).diagonal(dim1=1, dim2=2), a.diagonal(dim1=1, dim2=2))


@EVERY
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (2, 5, 3)])
@pytest.mark.parametrize("broken", [False, True])
def test_vectors_have_the_signs_of_the_convention(shape, dtype, broken, monkeypatch):
    a = randn(shape, dtype)
    if broken:
        true = torch.linalg.svd
        monkeypatch.setattr(
            torch.linalg, "svd", lambda *args, **options: [x * torch.nan for x in true(*args, **options)]
        )
    for vectors in (svd(a)[0], eigh(a @ a.mH)[1]):
        seen = torch.arange(1, vectors.shape[-2] + 1, dtype=torch.float64).cos().to(dtype) @ vectors
        assert (seen.real > 0).all()
        if dtype.is_complex:
            assert (seen.imag.abs() < 1e-5).all()


@pytest.mark.parametrize("decompose", [eigh, qr, qr_triangle, svd, lambda x: pinv(x, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
def test_what_lapack_has_no_routine_for_is_refused(decompose, dtype):
    with pytest.raises(TypeError, match=f"decomposition: float32, .* not {dtype}; cast it up first"):
        decompose(torch.eye(3).to(dtype))


def test_nothing_else_calls_lapack():
    """But for Cholesky's factors and triangular systems, which say themselves where they failed."""
    home = Path(comoving.__file__).parent
    banned = {"eigh", "eigvalsh", "eig", "eigvals", "qr", "svd", "svdvals", "pinv", "lstsq", "solve", "inv", "cholesky"}
    for file in home.rglob("*.py"):
        calls = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and ast.unparse(node.value) == "torch.linalg"
        }
        assert file.name == "lapack.py" or not calls & banned, file
