"""The Darcy solver against manufactured solutions, the properties of its matrix, and its cache."""

import numpy as np
import pytest

from comoving.race import darcy


def manufactured(n):
    """u = sin(pi x) sin(2 pi y) exp(x) and a = 2 + sin(3x) cos(2y), with f = -div(a grad u) by hand."""
    c = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(c, c, indexing="ij")
    pi = np.pi
    a = 2 + np.sin(3 * x) * np.cos(2 * y)
    ax, ay = 3 * np.cos(3 * x) * np.cos(2 * y), -2 * np.sin(3 * x) * np.sin(2 * y)
    ex, sx, cx, sy, cy = np.exp(x), np.sin(pi * x), np.cos(pi * x), np.sin(2 * pi * y), np.cos(2 * pi * y)
    u = sx * sy * ex
    ux = (pi * cx + sx) * ex * sy
    uxx = ((1 - pi**2) * sx + 2 * pi * cx) * ex * sy
    uy, uyy = 2 * pi * cy * sx * ex, -4 * pi**2 * u
    return a, u, -(ax * ux + ay * uy + a * (uxx + uyy))


def test_second_order_under_refinement():
    errors = []
    for n in (16, 32, 64):
        a, u, f = manufactured(n)
        errors.append(np.abs(darcy.solve(a, f) - u).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 1.85).all(), (errors, orders)


def test_jumping_coefficient_converges_too():
    def layered(n):
        x = (np.arange(n) + 0.5) / n
        return darcy.solve(np.where(x < 0.5, 3.0, 12.0)[:, None] * np.ones((n, n)))

    coarse, fine, finest = (layered(n).mean() for n in (16, 32, 64))
    assert abs(fine - finest) < 0.35 * abs(coarse - finest)


def test_matrix_is_symmetric_positive_definite_and_monotone():
    rng = np.random.default_rng(0)
    a = np.where(darcy.gaussian_field(12, rng, 3.0, 2.0) >= 0, 12.0, 3.0)
    matrix = darcy.assemble(a).toarray()
    assert (matrix == matrix.T).all()
    assert np.linalg.eigvalsh(matrix).min() > 0
    off = matrix - np.diag(np.diag(matrix))
    assert (off <= 0).all()
    assert (matrix.sum(1) > -1e-9 * matrix.max()).all()
    u = darcy.solve(a)
    assert (u > 0).all()
    # Maximum principle: the peak of a problem with a larger coefficient everywhere is lower.
    assert darcy.solve(np.full((12, 12), 12.0)).max() < u.max() < darcy.solve(np.full((12, 12), 3.0)).max()


def test_scaling_the_coefficient_scales_the_solution():
    rng = np.random.default_rng(1)
    a = 1 + rng.random((9, 9))
    np.testing.assert_allclose(darcy.solve(5 * a), darcy.solve(a) / 5, rtol=1e-12)


def test_field_has_the_prior_covariance():
    n, tau, alpha = 8, 3.0, 2.0
    rng = np.random.default_rng(2)
    draws = np.stack([darcy.gaussian_field(n, rng, tau, alpha) for _ in range(4000)])
    # Coefficient on the cosine mode (1, 0), normalized to unit mean square over the square.
    mode = np.sqrt(2) * np.cos(np.pi * (np.arange(n) + 0.5) / n)[:, None] * np.ones((n, n))
    measured = (draws * mode).mean((1, 2)).std()
    assert measured == pytest.approx(1 / (np.pi**2 + tau**2), rel=0.05)
    assert abs(draws.mean()) < 1e-12


def test_longer_set_begins_with_the_shorter():
    short, long = (darcy.generate(darcy.DarcyData(k, 8)) for k in (2, 4))
    for a, b in zip(short, long, strict=True):
        assert (a == b[:2]).all()


def test_cache_is_used_and_keyed_by_every_parameter(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    spec = darcy.DarcyData(3, 8)
    a, u = darcy.load(spec)
    monkeypatch.setattr(darcy, "generate", lambda *_: pytest.fail("made again"))
    again = darcy.load(spec)
    assert (again[0] == a).all() and (again[1] == u).all()
    monkeypatch.setattr(darcy, "generate", lambda spec, progress: (a, u))
    for other in ({"seed": 1}, {"tau": 4.0}, {"alpha": 3.0}, {"low": 1.0}, {"high": 9.0}, {"samples": 4}):
        before = len(list(tmp_path.iterdir()))
        darcy.load(darcy.DarcyData(**{"samples": 3, "resolution": 8, **other}))
        assert len(list(tmp_path.iterdir())) == before + 1
    assert not list(tmp_path.glob("*.tmp"))


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(darcy.np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        darcy.load(darcy.DarcyData(1, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"samples": 0}, {"resolution": 2}, {"tau": 0.0}, {"alpha": -1.0}, {"low": 0.0}])
def test_bad_specification(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        darcy.DarcyData(**{"samples": 1, **bad})


@pytest.mark.parametrize(("a", "word"), [(np.ones((2, 3)), "square"), (-np.ones((4, 4)), "positive")])
def test_bad_coefficient(a, word):
    with pytest.raises(ValueError, match=word):
        darcy.solve(a)
