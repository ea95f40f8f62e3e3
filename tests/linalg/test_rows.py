"""Linear algebra of a batch: every row is what it would be alone."""

import pytest
import torch

from comoving.linalg import (
    add_multilinear,
    all_but_one,
    correlate,
    cosine_columns,
    inner,
    largest,
    norm,
    orthogonal,
    orthogonality_defect,
    orthonormalize,
    over,
    reorthonormalize,
    to_unit,
    unit_size,
)
from contract.support import mixed

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128, torch.bfloat16], ids=str
)
SIZES = pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 2, 4), (300, 250), (1, 70001)], ids=str)


def batch(shape, dtype, seed=0):
    """An ordinary row, a zero one, a large one and one of a single entry."""
    x = torch.randn(4, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[1] = 0
    x[2] *= 1e3
    x[3].view(-1)[1:] = 0
    return x


def tolerance(dtype):
    return {"rtol": 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5, "atol": 0}


@DTYPES
@SIZES
def test_figures_of_rows(shape, dtype):
    x = batch(shape, dtype)
    for figure in (norm, largest):
        alone = torch.stack([figure(row) for row in x])
        assert figure(x, 1).shape == (4,)
        assert figure(x, 1).dtype == alone.dtype
        torch.testing.assert_close(figure(x, 1), alone, **tolerance(dtype))
    strided = torch.stack([x, x], -1)[..., 0]
    torch.testing.assert_close(norm(strided, 1), norm(x, 1), **tolerance(dtype))


@DTYPES
@SIZES
def test_inner_products_of_rows(shape, dtype):
    a, b = batch(shape, dtype), batch(shape, dtype, 1)
    found, alone = inner(a, b, 1), torch.stack([inner(x, y) for x, y in zip(a, b, strict=True)])
    bound = norm(a, 1) * norm(b, 1)
    slack = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.complex64: 1e-5}.get(dtype, 1e-12)
    assert found.shape == (4,)
    assert ((found - alone).abs() <= slack * bound).all()


@DTYPES
@SIZES
def test_rows_of_unit_size(shape, dtype):
    x = batch(shape, dtype)
    alone = torch.stack([unit_size(row) for row in x])
    assert torch.equal(unit_size(x, 1), alone)
    assert torch.equal(to_unit(x.clone(), 1), torch.stack([to_unit(row.clone()) for row in x]))


def test_long_rows_keep_their_sums_exact():
    """Ten million equal squares one after the other would lose 1%."""
    x = torch.full((2, 10_000_019), 0.1)
    torch.testing.assert_close(norm(x, 1), torch.full((2,), 0.1 * 10_000_019**0.5), rtol=1e-5, atol=0)


def test_a_figure_lies_over_its_rows():
    x = torch.zeros(3, 4, 5)
    assert over(torch.ones(3), x).shape == (3, 1, 1)
    assert over(torch.ones(()), x).shape == ()
    assert over(torch.ones(3), torch.zeros(3)).shape == (3,)


# ---------------------------------------------------------------------------------------------------- orthonormal bases

FIELDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.complex64], ids=str)


@FIELDS
@pytest.mark.parametrize("trusted", [False, True])
def test_an_orthonormalized_batch(dtype, trusted):
    """Each matrix goes the way that it would go alone; what no rank or a condition of 1e9 leaves open is any basis."""
    a, known = mixed(dtype), [0, 1, 2, 3] if trusted else [0, 3, 5, 6]
    if trusted:
        a = a[[0, 3, 5, 6]]
    found = orthonormalize(a, trusted=trusted)
    for b in known:
        torch.testing.assert_close(found[b], orthonormalize(a[b], trusted=trusted), **close_to(dtype))
    assert orthogonality_defect(found).max() <= 200 * torch.finfo(dtype).eps
    nested = orthonormalize(a[:4].unflatten(0, (2, 2)), trusted=trusted)
    known = [b for b in known if b < 4]
    torch.testing.assert_close(nested.flatten(0, 1)[known], found[known], **close_to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_an_ill_conditioned_mate_of_a_deficient_one_keeps_its_accuracy(dtype):
    """The basis of condition 1e4 is that of CholeskyQR in double the precision, not of Householder's QR in single."""
    a = torch.randn(3, 50, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    a[..., 1:] = a[..., :1] + 1e-4 * a[..., 1:]
    a[1] = 0
    found = orthonormalize(a)
    for b in (0, 2):
        assert torch.equal(found[b], orthonormalize(a[b]))


@FIELDS
def test_a_mended_basis_leaves_its_mates_alone(dtype):
    u = orthonormalize(mixed(dtype))
    bent = u.clone()
    bent[2] *= 1.01
    mended = reorthonormalize(bent)
    assert torch.equal(mended[[0, 1, 3, 4, 5, 6]], u[[0, 1, 3, 4, 5, 6]])
    torch.testing.assert_close(mended[2], u[2], **close_to(dtype))


# ------------------------------------------------------------------------------------------------------------- products


@FIELDS
@pytest.mark.parametrize("given", [(), (0,), (1,), (2,), (0, 2), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("beta", [1.0, -0.5])
def test_lifts_are_added_to_a_batch(dtype, given, beta):
    sizes, wide = (2, 3, 4), (5, 6, 7)
    out = torch.randn(4, *(wide[n] if n in given else sizes[n] for n in range(3)), dtype=dtype)
    x = torch.randn(4, *sizes, dtype=dtype)
    matrices = [torch.randn(4, wide[n], sizes[n], dtype=dtype) if n in given else None for n in range(3)]
    alone = [[None if a is None else a[b] for a in matrices] for b in range(4)]
    expected = torch.stack([add_multilinear(out[b].clone(), x[b], alone[b], 0.7, beta) for b in range(4)])
    for target in (out.clone(), torch.stack([out, out], -1)[..., 0]):
        assert add_multilinear(target, x, matrices, 0.7, beta).shape == out.shape
        torch.testing.assert_close(target, expected, **close_to(dtype))
    shared = [None if a is None else a[0] for a in matrices]
    expected = torch.stack([add_multilinear(out[b].clone(), x[b], shared, 0.7, beta) for b in range(4)])
    torch.testing.assert_close(add_multilinear(out.clone(), x, shared, 0.7, beta), expected, **close_to(dtype))


@FIELDS
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("whole", [None, 0, 1])
def test_all_but_one_of_a_batch(dtype, order, whole):
    sizes = (3, 4, 2, 3, 2)[:order]
    x = torch.randn(4, *sizes, dtype=dtype)
    matrices = [None if n == whole else torch.randn(4, 2, d, dtype=dtype) for n, d in enumerate(sizes)]
    mixture = [a if a is None or n % 2 else a[0] for n, a in enumerate(matrices)]
    for given in (matrices, mixture):
        found = all_but_one(x, given, range(order))
        for b in range(4):
            own = [a if a is None or a.ndim == 2 else a[b] for a in given]
            for n, y in all_but_one(x[b], own, range(order)).items():
                torch.testing.assert_close(found[n][b], y, **close_to(dtype))


@FIELDS
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_one_tensor_correlates_with_a_batch(dtype, mode):
    sizes = (3, 4, 5)
    x, z = (
        torch.randn(4, *sizes, dtype=dtype),
        torch.randn([2 if n == mode else d for n, d in enumerate(sizes)], dtype=dtype),
    )
    alone = torch.stack([correlate(row, z, mode, 3) for row in x])
    torch.testing.assert_close(correlate(x, z, mode, 3), alone, **close_to(dtype))
    each = z.expand(4, *z.shape)
    torch.testing.assert_close(correlate(x, each, mode, 3), alone, **close_to(dtype))


def test_columns_of_cosines_of_a_batch():
    indices = torch.tensor([[0, 3, 2], [1, 0, 7]])
    alone = torch.stack([cosine_columns(9, k, torch.float32) for k in indices])
    assert torch.equal(cosine_columns(9, indices, torch.float32), alone)


def close_to(dtype):
    slack = 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-4
    return {"rtol": slack, "atol": slack}


@FIELDS
def test_an_orthonormalized_batch_of_which_nothing_is_read(dtype, monkeypatch):
    """The way on devices."""
    monkeypatch.setattr(orthogonal, "asks_host", lambda x: False)
    a = mixed(dtype)
    found = orthonormalize(a)
    assert orthogonality_defect(found).max() <= 200 * torch.finfo(dtype).eps
    for b in (0, 3, 5, 6):
        torch.testing.assert_close(found[b], orthonormalize(a[b]), **close_to(dtype))
