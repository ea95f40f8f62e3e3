"""The Allen-Cahn solver against exact solutions, the laws of the equation, and its cache."""

import numpy as np
import pytest

from comoving.race import allen_cahn
from comoving.race.allen_cahn import AllenCahnData, energy, gaussian_field, generate, load, refine, solve

SMALL = {"samples": 3, "resolution": 6, "frames": 2, "final": 1.0, "eps": 0.1, "refinement": 2, "steps": 2}


def logistic(u, t):
    """The solution without diffusion: u e^t / sqrt(1 + u^2 (e^2t - 1))."""
    return u * np.exp(t) / np.sqrt(1 + u**2 * np.expm1(2 * t))


def fronts(x, t, eps):
    """Phase 1 between two fronts that eat into 0 at the speed 3 eps / sqrt 2; exact but for their tails' overlap."""
    reach = 0.25 + 3 * eps / np.sqrt(2) * t
    width = 2 * np.sqrt(2) * eps
    return (np.tanh((x - 0.5 + reach) / width) - np.tanh((x - 0.5 - reach) / width)) / 2


def line(values, axis):
    """Values along one axis of a thin box, constant along the others."""
    shape = [1, 4, 4, 4]
    shape[axis + 1] = len(values)
    return np.broadcast_to(np.expand_dims(values, [i for i in range(4) if i != axis + 1]), shape)


def errors_in_time(u, exact, steps):
    return np.array([np.abs(solve(u, 0.1, 1.0, 1, k)[..., 0] - exact).max() for k in steps])


def test_fourth_order_in_time_against_the_constant_solution():
    u = np.full((1, 4, 4, 4), 0.3)
    errors = errors_in_time(u, logistic(0.3, 1.0), (4, 8, 16, 32))
    orders = np.log2(errors[:-1] / errors[1:])
    assert errors[-1] < 1e-7 and (orders > 3.7).all(), (errors, orders)


def test_fourth_order_in_time_with_diffusion():
    u = refine(gaussian_field(6, np.random.default_rng(0), 0.5, 5.0, 3.0)[None], 16)
    errors = errors_in_time(u, solve(u, 0.1, 1.0, 1, 256)[..., 0], (4, 8, 16, 32))
    orders = np.log2(errors[:-1] / errors[1:])
    assert (orders > 3.6).all() and (orders < 4.6).all(), (errors, orders)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_traveling_fronts_converge_faster_than_any_power(axis):
    eps, final = 0.01, 1.0
    errors = []
    for m in (64, 128, 256):
        x = np.arange(m) / m
        found = solve(line(fronts(x, 0.0, eps), axis), eps, final, 1, 20)
        errors.append(np.abs(found[..., 0] - line(fronts(x, final, eps), axis)).max())
    assert errors[0] / errors[1] > 50 and errors[1] / errors[2] > 500 and errors[2] < 1e-6, errors


def test_linear_part_is_exact():
    # Too small for the cube to matter: one mode grows by exp((1 - 4 pi^2 eps^2 |k|^2) t), in steps of any length.
    x, y, z = np.meshgrid(*[np.arange(16) / 16] * 3, indexing="ij")
    u = 1e-8 * np.cos(2 * np.pi * (x - 2 * y + 3 * z))[None]
    found = solve(u, 0.05, 2.0, 2, 1)
    for frame, t in enumerate((1.0, 2.0)):
        expected = u * np.exp((1 - 4 * np.pi**2 * 0.05**2 * 14) * t)
        np.testing.assert_allclose(found[..., frame], expected, atol=1e-20)


def test_product_of_kept_modes_does_not_alias():
    # cos(2 pi k x)^3 = (3 cos(2 pi k x) + cos(2 pi 3k x)) / 4: with k = 3 of 16 points the second would land on mode 7.
    # For the first steps the rest is an ordinary equation of one amplitude, a' = (1 - 4 pi^2 eps^2 k^2) a - 3 a^3 / 4.
    m, k, eps = 16, 3, 0.02
    wave = np.cos(2 * np.pi * k * np.arange(m) / m)
    found = solve(line(0.5 * wave, 0), eps, 3.0, 1, 60)[..., 0]
    r = 1 - 4 * np.pi**2 * eps**2 * k**2
    amplitude = np.sqrt(r / (0.75 + (r / 0.25 - 0.75) * np.exp(-2 * r * 3.0)))
    np.testing.assert_allclose(found, line(amplitude * wave, 0), atol=1e-7)


def test_energy_falls_and_no_value_leaves_the_phases():
    spec = AllenCahnData(2, 8, frames=10, final=5.0, eps=0.08, amplitude=0.3, refinement=4, steps=4)
    fields = [gaussian_field(8, np.random.default_rng(i), spec.amplitude, spec.tau, spec.alpha) for i in range(2)]
    u = refine(np.stack(fields), 32)
    found = np.concatenate([u[..., None], solve(u, spec.eps, spec.final, spec.frames, spec.steps)], axis=-1)
    energies = np.stack([energy(found[..., i], spec.eps) for i in range(spec.frames + 1)])
    assert (np.diff(energies, axis=0) < 0).all(), energies
    bound = max(1.0, np.abs(u).max())
    assert np.abs(found).max() < bound + 1e-3
    assert np.abs(found[..., -1]).max() > 0.9  # and something has happened


def test_energy_of_a_wave():
    x = np.arange(16) / 16
    u = line(0.5 * np.cos(2 * np.pi * x), 1)
    well = (1 - 2 * 0.125 + 3 / 8 * 0.0625) / 4
    assert energy(u, 0.3)[0] == pytest.approx(0.5 * 0.09 * 4 * np.pi**2 * 0.125 + well, rel=1e-12)


def test_symmetries_of_the_equation():
    u = refine(gaussian_field(6, np.random.default_rng(3), 0.4, 5.0, 3.0)[None], 12)
    found = solve(u, 0.1, 2.0, 2, 4)
    np.testing.assert_allclose(solve(-u, 0.1, 2.0, 2, 4), -found, atol=1e-12)
    moved = solve(np.roll(u, (1, 4, -3), (1, 2, 3)), 0.1, 2.0, 2, 4)
    np.testing.assert_allclose(moved, np.roll(found, (1, 4, -3), (1, 2, 3)), atol=1e-12)
    turned = solve(u.transpose(0, 3, 1, 2), 0.1, 2.0, 2, 4)
    np.testing.assert_allclose(turned, found.transpose(0, 3, 1, 2, 4), atol=1e-12)


def test_refining_interpolates():
    u = gaussian_field(6, np.random.default_rng(4), 1.0, 5.0, 3.0)[None]
    np.testing.assert_allclose(refine(u, 18)[:, ::3, ::3, ::3], u, atol=1e-13)
    x, y, z = np.meshgrid(*[np.arange(18) / 18] * 3, indexing="ij")
    fine = np.sin(2 * np.pi * (2 * x - y + 2 * z)) + np.cos(2 * np.pi * y)
    np.testing.assert_allclose(refine(fine[None, ::3, ::3, ::3], 18), fine[None], atol=1e-13)


def test_field_has_its_spectrum():
    rng = np.random.default_rng(2)
    draws = np.stack([gaussian_field(6, rng, 0.7, 3.0, 2.0) for _ in range(3000)])
    assert draws.std() == pytest.approx(0.7, rel=0.03)
    v = np.fft.rfftn(draws, axes=(1, 2, 3))
    power = (np.abs(v) ** 2).mean(0)
    for k in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 1)):
        expected = ((4 * np.pi**2 * sum(i * i for i in k) + 9) / 9) ** -2.0
        assert power[k] / power[0, 0, 0] == pytest.approx(expected, rel=0.15)
    assert power[3].max() < 1e-20 and power[:, 3].max() < 1e-20 and power[:, :, 3].max() < 1e-20


def test_sets_are_repeatable_and_longer_ones_begin_with_shorter(monkeypatch):
    monkeypatch.setattr(allen_cahn, "TOGETHER", 2)
    short, again, long = (generate(AllenCahnData(**{**SMALL, "samples": k})) for k in (3, 3, 5))
    for a, b, c in zip(short, again, long, strict=True):
        assert a.dtype == np.float32 and (a == b).all() and (a == c[:3]).all()
        assert not np.array_equal(a[0], a[1])
    other = generate(AllenCahnData(**{**SMALL, "seed": 1}))
    assert not np.array_equal(other[0], short[0])
    start, future = short
    assert start.shape == (3, 6, 6, 6) and future.shape == (3, 6, 6, 6, 2)


def test_progress_counts_samples(monkeypatch):
    monkeypatch.setattr(allen_cahn, "TOGETHER", 2)
    seen = []
    generate(AllenCahnData(**SMALL), seen.append)
    assert seen == [2, 3]


def test_cache_is_used_and_keyed_by_every_parameter(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    spec = AllenCahnData(**SMALL)
    made = load(spec)
    monkeypatch.setattr(allen_cahn, "generate", lambda *_: pytest.fail("made again"))
    assert all((a == b).all() for a, b in zip(made, load(spec), strict=True))
    monkeypatch.setattr(allen_cahn, "generate", lambda spec, progress: made)
    changes = {"samples": 4, "resolution": 8, "frames": 3, "seed": 1, "final": 2.0, "eps": 0.2, "amplitude": 0.5}
    for name, value in {**changes, "tau": 4.0, "alpha": 2.0, "refinement": 3, "steps": 3}.items():
        before = len(list(tmp_path.iterdir()))
        load(AllenCahnData(**{**SMALL, name: value}))
        assert len(list(tmp_path.iterdir())) == before + 1, name
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("bad", "interval"),
    [
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"resolution": 2}, "resolution is 2; it must be at least 4"),
        ({"resolution": 7}, "resolution is 7; it must be even"),
        ({"frames": 0}, "frames is 0; it must be at least 1"),
        ({"refinement": 1}, "refinement is 1; it must be at least 2"),
        ({"steps": -1}, "steps is -1; it must be at least 1"),
        ({"final": 0.0}, "final is 0.0; it must be positive and finite"),
        ({"eps": -0.1}, "eps is -0.1; it must be positive"),
        ({"amplitude": float("nan")}, "amplitude is nan; it must be positive"),
        ({"tau": float("inf")}, "tau is inf; it must be positive and finite"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive"),
    ],
)
def test_bad_specification(bad, interval):
    with pytest.raises(ValueError, match=interval):
        AllenCahnData(**{**SMALL, **bad})


def test_bad_initial_values():
    with pytest.raises(ValueError, match=r"\(4, 4, 4\)"):
        solve(np.zeros((4, 4, 4)), 0.1, 1.0, 1, 1)
