"""The references of the preconditioned optimizers agree with other people's code, hand-worked cases and identities."""

import math

import pytest
import torch

from references.adafactor import Adafactor
from references.adamw import AdamW
from references.algebra import mode_product, unfold
from references.dion import Dion
from references.lion import Lion
from references.muon import Muon, newton_schulz, polar
from references.shampoo import Shampoo
from references.smmf import SMMF, nnmf, square_shape
from references.soap import SOAP

REAL, COMPLEX = torch.float64, torch.complex128


def series(shape, dtype=REAL, steps=6, seed=0):
    """A start and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(steps + 1)]
    return draws[0], draws[1:]


def draw(*shape, dtype=REAL, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unitary(size, dtype=REAL, seed=0):
    return torch.linalg.qr(draw(size, size, dtype=dtype, seed=seed))[0]


def run(reference, gradients):
    for g in gradients:
        reference.step(g)
    return reference


def run_peer(make, start, gradients):
    """The parameter after every step of a torch optimizer."""
    p = torch.nn.Parameter(start.clone())
    optimizer = make([p])
    path = []
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        path.append(p.detach().clone())
    return path


def agree(reference, path, gradients, tolerance=1e-10):
    for g, expected in zip(gradients, path, strict=True):
        close(reference.step(g), expected, tolerance)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b, at_least=1e-6):
    assert float((a - b).abs().max()) > at_least


def phase(angle):
    return torch.polar(torch.ones((), dtype=REAL), torch.tensor(angle, dtype=REAL))


MAKERS = {
    "lion": lambda p: Lion(p, 0.1, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, 0.1, b1=0.5, weight_decay=0.1),
    "adafactor-eps0": lambda p: Adafactor(p, 0.1, eps1=0.0, b2=0.9, weight_decay=0.1),
    "shampoo": lambda p: Shampoo(p, 0.1, b1=0.5, b2=0.9, graft="adam", weight_decay=0.1),
    "soap": lambda p: SOAP(p, 0.1, frequency=2, skip_first=False, eps=1e-3, weight_decay=0.1),
    "muon-ns": lambda p: Muon(p, 0.1, weight_decay=0.1),
    "muon-polar": lambda p: Muon(p, 0.1, orth="polar", weight_decay=0.1),
    "dion": lambda p: Dion(p, 0.1, draw(p.shape[1], 2, dtype=p.dtype), weight_decay=0.1),
    "smmf": lambda p: SMMF(p, 0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("name", MAKERS)
def test_zero_gradients_only_decay(name, dtype):
    start, gradients = series((4, 3), dtype, steps=3)
    end = run(MAKERS[name](start), [torch.zeros_like(g) for g in gradients]).p
    close(end, start * (1 - 0.1 * 0.1) ** 3, 1e-14)


@pytest.mark.parametrize("name", MAKERS)
def test_weight_decay_shrinks_and_leaves_the_update_alone(name):
    start, gradients = series((4, 3), steps=1)
    decayed, plain = MAKERS[name](start), MAKERS[name](start)
    plain.wd = 0.0
    close(plain.step(gradients[0]) - decayed.step(gradients[0]), 0.1 * 0.1 * start, 1e-14)


@pytest.mark.parametrize("name", MAKERS)
def test_a_complex_run_turns_with_a_global_phase(name):
    """Turn the start and all gradients by e^(i a): the run turns (but for SMMF's sign of a zero)."""
    start, gradients = series((4, 3), COMPLEX)
    turn = phase(0.7)
    a = run(MAKERS[name](start), gradients).p
    b = run(MAKERS[name](turn * start), [turn * g for g in gradients]).p
    close(turn * a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_a_complex_run_on_real_numbers_is_the_real_run(name):
    """Nothing of the complex path shows when no imaginary part is there (Dion's start frame is drawn, so real too)."""
    start, gradients = series((4, 3))
    real, complexed = MAKERS[name](start), MAKERS[name](start.to(COMPLEX))
    if name == "dion":
        complexed.q = real.q.to(COMPLEX)
    close(run(complexed, [g.to(COMPLEX) for g in gradients]).p, run(real, gradients).p.to(COMPLEX), 1e-9)


# ---------------------------------------------------------------- Lion


def test_lion_is_pytorch_optimizers():
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series((4, 3))
    hyper = {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.1}
    agree(Lion(start, **hyper), run_peer(lambda p: peer.Lion(p, **hyper), start, gradients), gradients, 1e-13)


def test_lion_by_hand():
    """m_1 = (1-b2) g_1 and the second sign is that of b1 m_1 + (1-b1) g_2: here 0.9 0.01 100 - 0.1 8 > 0."""
    reference = run(Lion(torch.zeros(1, dtype=REAL), 0.1), [torch.tensor([100.0], dtype=REAL)])
    close(reference.m, torch.tensor([1.0], dtype=REAL))
    reference.step(torch.tensor([-8.0], dtype=REAL))
    close(reference.p, torch.tensor([-0.2], dtype=REAL))
    reference.step(torch.tensor([-1000.0], dtype=REAL))
    close(reference.p, torch.tensor([-0.1], dtype=REAL))
    close(reference.m, torch.tensor([0.99 * (0.99 - 0.08) - 10], dtype=REAL))


def test_a_complex_lion_moves_along_the_phase():
    """pytorch_optimizer instead takes the signs of the two parts apart, which does not turn with a phase."""
    g = 5 * phase(0.3).reshape(1)
    close(Lion(torch.zeros(1, dtype=COMPLEX), 0.1).step(g), -0.1 * phase(0.3).reshape(1))


# ---------------------------------------------------------------- Adafactor

MATRIX_OR_VECTOR = [(5, 3), (3, 5), (7,), (1, 4), (4, 1)]


@pytest.mark.parametrize("shape", MATRIX_OR_VECTOR)
def test_adafactor_is_torchs(shape):
    """torch's step is lr max(eps2, RMS(p)); its eps1 clamps sqrt(V) instead of joining g^2, so both are tiny here.

    Its lr also caps 1/sqrt(t): with lr = 0.01 that is lr for the first 10^4 steps. Both decay by lr, not by the step.
    """
    start, gradients = series(shape)
    path = run_peer(
        lambda p: torch.optim.Adafactor(p, lr=0.01, eps=(1e-15, 1e-3), d=1.0, weight_decay=0.1), start, gradients
    )
    reference = Adafactor(start, 0.01, eps1=1e-30, eps2=1e-3, d=1.0, weight_decay=0.1)
    agree(reference, path, gradients, 1e-12)


@pytest.mark.parametrize("shape", MATRIX_OR_VECTOR)
@pytest.mark.parametrize("b1", [None, 0.7])
def test_adafactor_is_transformers(shape, b1):
    peer = pytest.importorskip("transformers.optimization")
    start, gradients = series(shape)
    hyper = {"lr": 0.03, "eps": (1e-3, 1e-3), "beta1": b1, "weight_decay": 0.1, "clip_threshold": 0.7}
    path = run_peer(lambda p: peer.Adafactor(p, relative_step=False, scale_parameter=False, **hyper), start, gradients)
    agree(Adafactor(start, 0.03, b1=b1 or 0.0, eps1=1e-3, d=0.7, weight_decay=0.1), path, gradients, 1e-12)


def test_adafactor_is_pytorch_optimizers():
    """Its momentum is bfloat16 unless told otherwise; its cap of 0.999 on b2_t is first met at t = 5600."""
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series((5, 3))
    path = run_peer(
        lambda p: peer.AdaFactor(
            p, lr=0.03, betas=(0.7, 0.999), relative_step=False, scale_parameter=False, momentum_dtype=REAL
        ),
        start,
        gradients,
    )
    agree(Adafactor(start, 0.03, b1=0.7), path, gradients, 1e-12)


def test_adafactor_of_a_rank_one_second_moment_loses_nothing():
    """|g|^2 = a (x) b (x) c at every step: V_hat is the whole second moment, whatever the order of the tensor."""
    sizes = (3, 4, 2)
    factors = [draw(size, seed=n).abs() for n, size in enumerate(sizes)]
    g = torch.einsum("i,j,k->ijk", *factors).sqrt()
    signs = [torch.sign(draw(*sizes, seed=n)) for n in range(5)]
    reference = Adafactor(torch.zeros(sizes, dtype=REAL), 0.1, b2=0.9, d=None, eps1=0.0)
    full = AdamW(torch.zeros(sizes, dtype=REAL), 0.1, betas=(0.0, 0.9), eps=0.0)
    for sign in signs:
        close(reference.step(sign * g), full.step(sign * g), 1e-12)
    close(reference.second_moment(), full.v, 1e-12)


def test_adafactor_keeps_the_marginals_of_a_tensor():
    """The mean of V_hat over all modes but one is the averaged marginal of |g|^2; the first step is g/sqrt(V_hat)."""
    start, gradients = series((3, 4, 2), COMPLEX)
    reference = run(Adafactor(start, 0.1), gradients)
    s = torch.zeros(3, 4, 2, dtype=REAL)
    for t, g in enumerate(gradients, 1):
        s = (1 - t**-0.8) * s + t**-0.8 * g.abs() ** 2
    v = reference.second_moment()
    for n in range(3):
        close(unfold(v, n).mean(dim=1), unfold(s, n).mean(dim=1), 1e-12)
    differ(v, s)


def test_a_unit_mode_changes_nothing_for_adafactor():
    start, gradients = series((3, 4))
    matrix = run(Adafactor(start, 0.1), gradients).p
    tensor = run(Adafactor(start.reshape(3, 1, 4), 0.1), [g.reshape(3, 1, 4) for g in gradients]).p
    close(tensor.reshape(3, 4), matrix)


def test_adafactor_clips_the_root_mean_square():
    """The first update is +-1 where |g|^2 is of rank one: RMS 1, so d = 0.25 leaves a quarter."""
    g = torch.outer(draw(3, seed=1), draw(4, seed=2))
    zero = torch.zeros(3, 4, dtype=REAL)
    close(Adafactor(zero, 0.1, d=0.25).step(g), -0.1 * 0.25 * torch.sign(g), 1e-12)
    close(Adafactor(zero, 0.1, d=2.0).step(g), -0.1 * torch.sign(g), 1e-12)


def test_adafactor_with_momentum_on_the_gradient_is_adam_for_a_vector():
    start, gradients = series((6,))
    reference = Adafactor(start, 0.03, b1=0.8, b2=0.95, eps1=0.0, d=None, weight_decay=0.1, momentum_on="gradient")
    adam = AdamW(start, 0.03, betas=(0.8, 0.95), eps=0.0, weight_decay=0.1)
    for g in gradients:
        close(reference.step(g), adam.step(g), 1e-12)


# ---------------------------------------------------------------- Shampoo


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 4), (3, 2, 4), (2, 3, 2, 3)])
def test_shampoo_is_pytorch_optimizers(shape):
    """With roots at every step and no momentum; what else it has is not the paper's.

    Its momentum mixes the previous *preconditioned* update into the raw gradient, and into the statistics; and its
    first k - 1 steps, with roots every k steps, move nothing, as the roots start at 0 and are first taken at step k.
    """
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series(shape)
    hyper = {"weight_decay": 0.1, "weight_decouple": True, "matrix_eps": 1e-2}
    path = run_peer(lambda p: peer.Shampoo(p, lr=0.03, **hyper), start, gradients)
    agree(Shampoo(start, 0.03, eps=1e-2, weight_decay=0.1), path, gradients, 1e-11)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize(("b2", "power"), [(None, None), (0.9, None), (None, 0.5), (0.9, 0.3)])
def test_shampoo_of_a_constant_rank_one_gradient(dtype, b2, power):
    """g = s x (x) y (x) z with unit vectors: every L_n is l x x^H, and u = g (l + eps)^(-3 power), l = t s^2 or s^2."""
    x, y, z = (torch.nn.functional.normalize(draw(k, dtype=dtype, seed=k), dim=0) for k in (3, 4, 2))
    g = 1.7 * torch.einsum("i,j,k->ijk", x, y, z)
    reference = Shampoo(torch.zeros_like(g), 1.0, b2=b2, power=power, eps=0.1)
    before = reference.p
    for t in range(1, 5):
        level = 1.7**2 * (t if b2 is None else 1)
        after = reference.step(g)
        close(after - before, -g * (level + 0.1) ** (-3 * (power or 1 / 6)), 1e-12)
        before = after


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_shampoo_of_one_matrix_is_its_polar_factor(dtype):
    """(G G^H)^(-1/4) G (G^H G)^(-1/4) = U V^H, at the first step, and with averages at every one."""
    g = draw(4, 4, dtype=dtype)
    reference = Shampoo(torch.zeros_like(g), 1.0, b2=0.9, eps=1e-15)
    close(reference.step(g), -polar(g), 1e-6)
    close(reference.step(g), -2 * polar(g), 1e-6)


def test_shampoo_averages_forget():
    """L_n/(1-b2^t) = the weighted mean of the G_(n) G_(n)^H with weights b2^(t-k), by an explicit sum."""
    start, gradients = series((3, 4, 2), COMPLEX, steps=4)
    reference = run(Shampoo(start, 0.1, b2=0.6, eps=0.1), gradients)
    weights = [0.6 ** (3 - k) for k in range(4)]
    for n in range(3):
        mean = sum(w * unfold(g, n) @ unfold(g, n).mH for w, g in zip(weights, gradients, strict=True)) / sum(weights)
        close(reference.stats[n] / (1 - 0.6**4), mean, 1e-12)
        eye = torch.eye(mean.shape[0], dtype=COMPLEX)
        close(torch.linalg.matrix_power(reference.roots[n], 6) @ (mean + 0.1 * eye), eye, 1e-9)


def test_a_long_mode_of_shampoo_is_diagonal():
    """All modes too long: A_n is the diagonal of L_n to the -1/(2N). One too long: only that one is."""
    start, gradients = series((3, 5), COMPLEX, steps=1)
    g = gradients[0]
    rows, columns = (g.abs() ** 2).sum(1) + 0.1, (g.abs() ** 2).sum(0) + 0.1
    zero = torch.zeros_like(g)
    close(Shampoo(zero, 1.0, eps=0.1, max_size=2).step(g), -g * (rows[:, None] * columns[None]) ** -0.25, 1e-12)
    values, vectors = torch.linalg.eigh(g @ g.mH + 0.1 * torch.eye(3, dtype=COMPLEX))
    left = vectors @ torch.diag(values.to(COMPLEX) ** -0.25) @ vectors.mH
    close(Shampoo(zero, 1.0, eps=0.1, max_size=3).step(g), -left @ g * columns**-0.25, 1e-12)


def test_a_one_by_one_shampoo_is_adam():
    """Two modes of size 1 with power 1/4 make (|g|^2 mean)^(-1/2): Adam, eps being under its root."""
    gradients = [draw(1, 1, seed=k) for k in range(6)]
    zero = torch.zeros(1, 1, dtype=REAL)
    reference, adam = Shampoo(zero, 0.1, b1=0.8, b2=0.95, eps=0.0), AdamW(zero, 0.1, betas=(0.8, 0.95), eps=0.0)
    for g in gradients:
        close(reference.step(g), adam.step(g), 1e-12)


def test_shampoo_keeps_its_roots_for_a_period():
    start, gradients = series((3, 4), steps=5)
    reference = Shampoo(start, 0.1, b2=0.9, eps=0.1, period=3)
    seen = []
    for g in gradients:
        reference.step(g)
        seen.append(reference.roots[0])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and torch.equal(seen[3], seen[4])
    differ(seen[2], seen[3])


def test_grafting_gives_shampoo_the_length_of_adam():
    start, gradients = series((3, 4), COMPLEX)
    adam = AdamW(torch.zeros_like(start), 1.0, betas=(0.8, 0.95), eps=1e-3)
    hyper = {"b1": 0.8, "b2": 0.9, "eps": 0.1}
    plain = Shampoo(torch.zeros_like(start), 1.0, **hyper)
    grafted = Shampoo(torch.zeros_like(start), 1.0, graft="adam", graft_b2=0.95, graft_eps=1e-3, **hyper)
    for g in gradients:
        before = [x.p for x in (adam, plain, grafted)]
        a, u, w = (x.step(g) - b for x, b in zip((adam, plain, grafted), before, strict=True))
        close(torch.linalg.norm(w), torch.linalg.norm(a), 1e-11)
        close(w / torch.linalg.norm(w), u / torch.linalg.norm(u), 1e-11)


# ---------------------------------------------------------------- SOAP


def peer_soap(peer, start, gradients, **hyper):
    return run_peer(lambda p: peer.SOAP(p, lr=0.03, betas=(0.8, 0.95), weight_decay=0.0, **hyper), start, gradients)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 2, 4), (6,), (2, 3, 2, 3)])
def test_soap_is_pytorch_optimizers_between_refreshes(shape):
    """In the frames of the first gradient, which leaves at most one null vector to eigh.

    Its decay comes after the update, so none here: p = (p - lr u) (1 - lr wd), as in the authors' code.
    """
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series(shape)
    path = peer_soap(peer, start, gradients, precondition_frequency=100, shampoo_beta=0.7)
    reference = SOAP(start, 0.03, betas=(0.8, 0.95), shampoo_beta=0.7, frequency=100, eps_on="raw")
    agree(reference, path, gradients, 1e-8)
    assert torch.equal(path[0], start)
    differ(path[1], start)


@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 2)])
@pytest.mark.parametrize("frequency", [1, 2])
def test_soap_is_pytorch_optimizers(shape, frequency, monkeypatch):
    """Its QR is in float32 for any parameter; here in float64, as the authors' is for float64 parameters."""
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series(shape, steps=9)
    double = SOAP(start, 0.03, betas=(0.8, 0.95), frequency=frequency, eps_on="raw")
    rough = peer_soap(peer, start, gradients, precondition_frequency=frequency)
    with monkeypatch.context() as patch:
        to = torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda x, *a, **k: x if a == (torch.float32,) else to(x, *a, **k))
        sharp = peer_soap(peer, start, gradients, precondition_frequency=frequency)
    agree(double, sharp, gradients, 1e-9)
    close(double.p, rough[-1], 1e-4)
    differ(sharp[-1], rough[-1], 1e-12)


def test_soap_without_long_modes_is_pytorch_optimizers():
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series((3, 5))
    path = peer_soap(peer, start, gradients, precondition_frequency=100, max_precondition_dim=3)
    reference = SOAP(start, 0.03, betas=(0.8, 0.95), frequency=100, max_size=3, eps_on="raw")
    agree(reference, path, gradients, 1e-10)
    assert reference.stats[1] is None and reference.q[1] is None


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 2)])
def test_soap_without_frames_is_adamw(dtype, shape):
    start, gradients = series(shape, dtype)
    hyper = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    reference, adam = SOAP(start, 0.03, max_size=1, skip_first=False, **hyper), AdamW(start, 0.03, **hyper)
    for g in gradients:
        close(reference.step(g), adam.step(g), 1e-13)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_soap_of_diagonal_gradients_is_adam_in_the_rotated_space(dtype):
    """g_t = U D_t V^H: every L_n is diagonal in U or conj(V) for ever, so SOAP runs Adam on D_t and turns it back.

    The entries keep their descending order, so no refresh permutes them; phases of the eigenvectors cancel.
    A large eps keeps the rounding of the zero entries from being normalized.
    """
    u, v = unitary(4, dtype, 1), unitary(4, dtype, 2)
    sizes = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=REAL)
    diagonals = [torch.diag(sizes + 0.2 * draw(4, seed=k)).to(dtype) for k in range(8)]
    zero = torch.zeros(4, 4, dtype=dtype)
    reference = SOAP(zero, 0.1, betas=(0.8, 0.95), eps=1e-3, frequency=2, skip_first=False)
    adam = AdamW(zero, 0.1, betas=(0.8, 0.95), eps=1e-3)
    for d in diagonals:
        close(u.mH @ reference.step(u @ d @ v.mH) @ v, adam.step(d), 1e-11)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_soap_turns_with_the_space(dtype):
    """Multiply every mode by a unitary: the run is multiplied (Adam's is not)."""
    start, gradients = series((3, 4, 2), dtype, steps=7)
    turns = [unitary(size, dtype, seed=size) for size in (3, 4, 2)]

    def turned(x):
        for n, matrix in enumerate(turns):
            x = mode_product(x, matrix, n)
        return x

    hyper = {"frequency": 2, "skip_first": False}
    a = run(SOAP(start, 0.1, **hyper), gradients).p
    b = run(SOAP(turned(start), 0.1, **hyper), [turned(g) for g in gradients]).p
    close(turned(a), b, 1e-7)


def test_soap_sorts_and_permutes():
    """Two diagonal gradients of which the second reverses the order: one refresh swaps the columns and v with them."""
    first, second = torch.diag(torch.tensor([2.0, 1.0], dtype=REAL)), torch.diag(torch.tensor([1.0, 9.0], dtype=REAL))
    reference = SOAP(torch.zeros(2, 2, dtype=REAL), 0.1, betas=(0.5, 0.5), frequency=1)
    reference.step(first)
    close(reference.stats[0], 0.5 * first**2)
    assert reference.t == 0 and not reference.v.any()
    close(reference.q[0].abs(), torch.eye(2, dtype=REAL))
    reference.step(second)
    close(reference.q[0].abs(), torch.eye(2, dtype=REAL).flip(1))
    close(reference.stats[1], 0.25 * first**2 + 0.5 * second**2)
    close(reference.v, 0.5 * torch.diag(torch.tensor([81.0, 1.0], dtype=REAL)))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_the_first_gradient_of_soap_counts_once(dtype):
    """Skipped or not, it makes the same L_n and Q_n, not refreshed even with frequency 1; not skipped, it moves p."""
    start, gradients = series((3, 3), dtype, steps=1)
    g = gradients[0]
    hyper = {"betas": (0.8, 0.9), "shampoo_beta": 0.7, "frequency": 1}
    skipped, moved = run(SOAP(start, 0.1, **hyper), [g]), run(SOAP(start, 0.1, skip_first=False, **hyper), [g])
    for n in range(2):
        close(moved.stats[n], 0.3 * unfold(g, n) @ unfold(g, n).mH, 1e-13)
        assert torch.equal(moved.stats[n], skipped.stats[n]) and torch.equal(moved.q[n], skipped.q[n])
    assert torch.equal(skipped.p, start) and (skipped.t, moved.t) == (0, 1)
    # |u'| is 1 on the diagonal of the singular basis, where all of g is; eps shrinks the zeros around it
    moved = run(SOAP(start, 0.1, skip_first=False, eps=1e-7, **hyper), [g])
    close(start - moved.p, 0.1 * polar(g), 1e-6)


def test_the_eps_of_soap():
    """At the first Adam step sqrt(v_hat) = |g|, under eps as given (corrected) or 1/sqrt(1-b2) larger (raw)."""
    g = torch.full((1, 1), 2.0, dtype=REAL)
    zero = torch.zeros_like(g)
    for eps_on, eps in (("corrected", 0.5), ("raw", 0.5 / math.sqrt(0.1))):
        reference = SOAP(zero, 1.0, betas=(0.8, 0.9), eps=0.5, skip_first=False, eps_on=eps_on)
        close(reference.step(g), -g / (2 + eps))
    uncorrected = SOAP(zero, 1.0, betas=(0.8, 0.9), eps=0.5, skip_first=False, bias_correction=False)
    close(uncorrected.step(g), -0.2 * g / (2 * math.sqrt(0.1) + 0.5))


# ---------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize(("name", "scale"), [("original", "spectral"), ("match_rms_adamw", "match")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("ema", [True, False])
def test_muon_is_torchs(shape, name, scale, nesterov, ema, monkeypatch):
    """torch iterates in bfloat16: in float64 here. Its buffer is an average; the norm of x takes the (1-b) away."""
    start, gradients = series(shape)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    hyper = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    path = run_peer(lambda p: torch.optim.Muon(p, adjust_lr_fn=name, **hyper), start, gradients)
    agree(Muon(start, ema=ema, scale=scale, **hyper), path, gradients, 1e-12)


def test_muon_is_torchs_bfloat16_roughly():
    start, gradients = series((4, 3))
    path = run_peer(lambda p: torch.optim.Muon(p, lr=0.03, momentum=0.8, weight_decay=0.1), start, gradients)
    agree(Muon(start, 0.03, momentum=0.8, scale="spectral", weight_decay=0.1), path, gradients, 5e-3)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize(("scale", "size"), [("match", 0.4), ("spectral", None), (3.0, 3.0)])
def test_an_exact_muon_update_has_equal_singular_values(dtype, shape, scale, size):
    start, gradients = series(shape, dtype)
    size = size or math.sqrt(max(1, shape[0] / shape[1]))
    reference = Muon(start, 1.0, orth="polar", scale=scale)
    before = start
    for g in gradients:
        after = reference.step(g)
        close(torch.linalg.svdvals(before - after), torch.full((min(shape),), size, dtype=REAL), 1e-12)
        before = after


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_the_polar_factor(dtype):
    """x = o h with h = (x^H x)^(1/2) positive; a rank-one x has the rank-one o; 0 has 0."""
    x = draw(5, 3, dtype=dtype)
    o = polar(x)
    h = o.mH @ x
    close(h, h.mH, 1e-12)
    assert torch.linalg.eigvalsh(h).min() > 0
    close(o.mH @ o, torch.eye(3, dtype=dtype), 1e-12)
    a, b = (torch.nn.functional.normalize(draw(k, dtype=dtype), dim=0) for k in (5, 3))
    close(polar(7 * torch.outer(a, b.conj())), torch.outer(a, b.conj()), 1e-12)
    assert not polar(torch.zeros(5, 3, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_newton_schulz_acts_on_the_singular_values(dtype):
    """Each is sent through a s + b s^3 + c s^5 five times; (15, -10, 3)/8 converge to the polar factor."""
    x = draw(3, 5, dtype=dtype)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / torch.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    close(newton_schulz(x), u @ torch.diag(s).to(dtype) @ vh, 1e-12)
    close(newton_schulz(x, 60, (15 / 8, -10 / 8, 3 / 8)), polar(x), 1e-10)


def test_the_momenta_of_muon():
    start, gradients = series((3, 3), steps=2)
    first, second = gradients
    for ema, nesterov, x in (
        (False, False, 0.8 * first + second),
        (False, True, second + 0.8 * (0.8 * first + second)),
        (True, False, 0.2 * (0.8 * first + second)),
        (True, True, 0.2 * second + 0.8 * 0.2 * (0.8 * first + second)),
    ):
        reference = Muon(start, 1.0, momentum=0.8, ema=ema, nesterov=nesterov, eps=100.0, scale=1.0)
        before = reference.step(first)
        # far under eps the iteration is nearly linear, so that the size of x shows
        close(before - reference.step(second), newton_schulz(x, eps=100.0), 1e-12)


def test_a_tensor_is_flattened_for_muon():
    start, gradients = series((4, 3, 2))
    flat = run(Muon(start.reshape(4, 6), 0.1), [g.reshape(4, 6) for g in gradients]).p
    close(run(Muon(start, 0.1, flatten=True), gradients).p, flat.reshape(4, 3, 2), 1e-14)
    with pytest.raises(ValueError, match="flatten"):
        Muon(start, 0.1)
    with pytest.raises(ValueError, match="matrices"):
        Muon(start.flatten(), 0.1, flatten=True)


# ---------------------------------------------------------------- Dion


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_dion_by_hand(dtype, shape):
    """Without QR: P R^H = Pi B with Pi the projector on the span of B Q, and only the update sees the basis."""
    start, gradients = series(shape, dtype)
    reference = Dion(start, 0.1, draw(shape[1], 2, dtype=dtype, seed=9), mu=0.8)
    for g in gradients:
        b, q = reference.m + g, reference.q
        span = b @ q
        projector = span @ torch.linalg.inv(span.mH @ span) @ span.mH
        before = reference.p
        reference.step(g)
        close(reference.m, b - 0.2 * projector @ b, 1e-12)
        close(torch.linalg.norm(reference.q, dim=0), torch.ones(2, dtype=REAL), 1e-7)
        update = (before - reference.p) / (0.1 * math.sqrt(shape[0] / shape[1]))
        close(projector @ update, update, 1e-12)
        # u = P Q^H gives P back, and R = B^H P has Q's columns
        left = update @ reference.q @ torch.linalg.inv(reference.q.mH @ reference.q)
        close(left.mH @ left, torch.eye(2, dtype=dtype), 1e-6)
        right = b.mH @ left
        close(right / torch.linalg.norm(right, dim=0), reference.q, 1e-6)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (4, 6)])
@pytest.mark.parametrize("iterations", ["exact", "many"])
def test_dion_at_full_rank_is_the_polar_factor(dtype, shape, iterations):
    """From the right singular vectors at once, and from anywhere after many power iterations."""
    rank = min(shape)
    u, v = unitary(shape[0], dtype, 1)[:, :rank], unitary(shape[1], dtype, 2)[:, :rank]
    s = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=REAL)[:rank]
    g = u @ torch.diag(s).to(dtype) @ v.mH
    q = v if iterations == "exact" else draw(shape[1], rank, dtype=dtype)
    reference = Dion(torch.zeros_like(g), 1.0, q, mu=0.5, eps=0.0, power_iters=1 if iterations == "exact" else 60)
    end = reference.step(g)
    close(end, -math.sqrt(shape[0] / shape[1]) * polar(g), 1e-9)
    close(reference.m, 0.5 * g, 1e-12)


def test_the_error_feedback_of_dion():
    """mu = 1 drops nothing; mu = 0 drops what was applied; a component outside the span stays whole meanwhile."""
    start, gradients = series((5, 4))
    keep = run(Dion(start, 0.1, draw(4, 2), mu=1.0), gradients)
    close(keep.m, sum(gradients), 1e-12)
    g = torch.diag(torch.tensor([3.0, 1.0], dtype=REAL))
    drop = run(Dion(torch.zeros_like(g), 0.1, torch.tensor([[1.0], [0.0]], dtype=REAL), mu=0.0), [g, g])
    close(drop.m, torch.diag(torch.tensor([0.0, 2.0], dtype=REAL)))
    close(drop.p, torch.diag(torch.tensor([-0.2, 0.0], dtype=REAL)), 1e-8)


def test_signs_of_dions_frame_do_not_matter():
    start, gradients = series((5, 4), COMPLEX)
    q = draw(4, 2, dtype=COMPLEX, seed=3)
    turns = torch.stack([phase(0.4), phase(2.0)])
    close(run(Dion(start, 0.1, q), gradients).p, run(Dion(start, 0.1, q * turns), gradients).p, 1e-9)


def test_dion_waits_for_its_first_gradient():
    start, gradients = series((5, 4))
    q = draw(4, 2, seed=3)
    waited = run(Dion(start, 0.1, q), [torch.zeros_like(start), *gradients]).p
    close(waited, run(Dion(start, 0.1, q), gradients).p, 1e-14)


# ---------------------------------------------------------------- SMMF


def test_the_nearest_square():
    known = {1: (1, 1), 7: (7, 1), 12: (4, 3), 36: (6, 6), 24: (6, 4), 2 * 3 * 5 * 7: (15, 14)}
    assert {size: square_shape(size) for size in known} == known


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_nnmf(shape):
    """It keeps both marginals, loses nothing of a rank-one matrix, and is exact in one step."""
    x = draw(*shape).abs()
    r, c = nnmf(x)
    y = torch.outer(r, c)
    close(y.sum(0), x.sum(0), 1e-13)
    close(y.sum(1), x.sum(1), 1e-13)
    close(torch.outer(*nnmf(y)), y, 1e-13)
    differ(x, y)
    close((r if shape[0] < shape[1] else c).sum(), torch.ones((), dtype=REAL))
    assert not any(factor.any() for factor in nnmf(torch.zeros(shape, dtype=REAL)))


def scheduled_adam(start, gradients, *, beta, growth, decay, eps):
    """The uncompressed SMMF."""
    p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, 1):
        b1, b2 = beta * growth ** (t - 1), 1 - t**decay
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.abs() ** 2
        p = p - 0.1 * m / (v.sqrt() + eps)
    return p


SCHEDULE = {"beta": 0.9, "growth": 0.7, "decay": -0.8, "eps": 1e-3}


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_smmf_is_exact_on_rank_one_magnitudes(dtype):
    """g_t = c_t S x y^T, with c_t of both signs: |m| and v stay multiples of x y^T and x^2 y^2^T."""
    x, y = draw(4, seed=1).abs(), draw(3, seed=2).abs()
    signs = draw(4, 3, dtype=dtype, seed=3)
    g = torch.outer(x, y) * signs / signs.abs()
    gradients = [float(c) * g.reshape(2, 6) for c in draw(6, seed=4)]
    start = draw(2, 6, dtype=dtype, seed=5)
    reference = run(SMMF(start, 0.1, **SCHEDULE), gradients)
    close(reference.p, scheduled_adam(start, gradients, **SCHEDULE), 1e-11)
    assert reference.shape == (4, 3)


def test_smmf_compresses_otherwise():
    """One step is uncompressed, the second starts from the factors of the first."""
    start, gradients = series((4, 3), steps=2)
    first, second = gradients
    reference = SMMF(start, 0.1, **SCHEDULE)
    m, v = 0.1 * first, first**2
    close(reference.step(first), start - 0.1 * m / (v.sqrt() + 1e-3), 1e-13)
    before = reference.p
    m = torch.sign(m) * torch.outer(m.abs().sum(1), m.abs().sum(0)) / m.abs().sum()
    v = torch.outer(v.sum(1), v.sum(0)) / v.sum()
    b1, b2 = 0.9 * 0.7, 1 - 2**-0.8
    m, v = b1 * m + (1 - b1) * second, b2 * v + (1 - b2) * second**2
    close(reference.step(second), before - 0.1 * m / (v.sqrt() + 1e-3), 1e-12)


def test_zeros_of_the_momentum_count_as_negative_for_smmf():
    """The stored bit is "M > 0": a zero entry comes back as minus its rank-one estimate, here -0.1 (3 1)/4."""
    g = torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=REAL)
    reference = run(SMMF(torch.zeros(2, 2, dtype=REAL), 0.1, growth=1.0), [g])
    m = reference.s * torch.outer(reference.r_m, reference.c_m)
    close(m, 0.1 * torch.tensor([[9.0, 3.0], [3.0, -1.0]], dtype=REAL) / 4)


def test_smmf_without_a_first_moment():
    start, gradients = series((12,), steps=1)
    g = gradients[0]
    reference = SMMF(start, 0.1, beta=None, eps=0.0, weight_decay=0.5)
    close(reference.step(g), 0.95 * start - 0.1 * torch.sign(g), 1e-13)
    assert reference.shape == (4, 3)
