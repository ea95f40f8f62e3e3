"""The references of Fira, APOLLO and their kin: peers that follow the papers, cases by hand, identities.

Peers at fault, and what is taken from them: see the comments of each test. Weight decay is 0 against the peers, which
decay after the update rather than before.
"""

import math

import pytest
import torch

from references.adamw import AdamW
from references.algebra import every
from references.apollo import Apollo, apollo_mini
from references.fira import Fira
from references.galore import GaLore
from references.side import limited

REAL, COMPLEX = torch.float64, torch.complex128
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
PEER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}


def series(shape, dtype=REAL, steps=6, seed=0):
    """A start and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(steps + 1)]
    return draws[0], draws[1:]


def run(reference, gradients):
    for g in gradients:
        reference.step(g)
    return reference


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def identity(operand, old):
    return torch.eye(min(operand.shape), dtype=operand.dtype)


def frames(size, rank, dtype=REAL, seed=5):
    """Finder: a new random orthonormal frame at each call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda operand, old: torch.linalg.qr(torch.randn(size, rank, dtype=dtype, generator=generator))[0]


def tensor(rows, dtype=REAL):
    return torch.tensor(rows, dtype=dtype)


# Fira


def peer_steps(optimizer, p, gradients):
    """Yield p after each step of a peer."""
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        yield p.detach().clone()


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_fira_is_the_port_in_pytorch_optimizer(shape):
    """Its frames come of a float32 SVD, so they are handed in; it counts steps from 1 and so refreshes a step early."""
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series(shape, steps=9)
    gradients = [g * 3.0**k for k, g in enumerate(gradients)]  # so that the limiter acts
    p = torch.nn.Parameter(start.clone())
    group = {"params": [p], "rank": 2, "update_proj_gap": 4, "scale": 0.25, "projection_type": "std"}
    optimizer = peer.Fira([group], **PEER)
    limiting = []

    def theirs(operand, old):
        projector = optimizer.state[p]["projector"]
        u = projector.ortho_matrix
        return u if shape[0] < shape[1] else u.mT

    reference = Fira(
        start,
        rank=2,
        alpha=0.25,
        alpha_in_residual=True,
        corrected=False,
        refresh_at=lambda t: t == 0 or (t + 1) % 4 == 0,
        find=theirs,
        **PEER,
    )
    for g, expected in zip(gradients, peer_steps(optimizer, p, gradients), strict=True):
        before = reference.last
        close(reference.step(g), expected, 1e-11)
        limiting.append(before is not None and reference.last > 1.00999 * before)
    assert any(limiting)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_fira_without_residual_is_galore(shape, dtype):
    """Full rank has no residual, and a gradient within the frame neither."""
    start, gradients = series(shape, dtype)
    dense = run(AdamW(start, **HYPER), gradients).p
    close(run(Fira(start, rank=9, alpha=1.0, find=identity, **HYPER), gradients).p, dense)
    u = frames(min(shape), 2, dtype)(None, None)
    inside = [u @ u.mH @ g if shape[0] <= shape[1] else g @ u @ u.mH for g in gradients]
    fira = run(Fira(start, rank=2, alpha=0.5, find=lambda g, old: u, **HYPER), inside)
    galore = run(GaLore(start, rank=2, scale=0.5, find=lambda g: u, **HYPER), inside)
    close(fira.p, galore.p)
    assert fira.last < 1e-12


@pytest.mark.parametrize("flip", [False, True])
def test_fira_by_hand(flip):
    """U = e1, b1 = b2 = 1/2. Step 0: d = sign(z), phi = 1/|z|. Step 1 with g twice as large, phi = |d|/|z|."""

    def view(x):
        return x.T.contiguous() if flip else x

    u = tensor([[1.0], [0.0]])
    fira = Fira(
        torch.zeros(3, 2, dtype=REAL) if flip else torch.zeros(2, 3, dtype=REAL),
        lr=1.0,
        rank=1,
        alpha=0.5,
        betas=(0.5, 0.5),
        eps=1e-15,
        gamma=None,
        phi_eps=0.0,
        find=lambda g, old: u,
    )
    g = tensor([[2.0, -4.0, 1.0], [3.0, 4.0, -5.0]])
    first = -tensor([[0.5, -0.5, 0.5], [1.5, 1.0, -5.0]])
    close(view(fira.step(view(g))), first)
    # z = 2 z_0: m = (z_0/2 + 2 z_0)/2 / (3/4) = 5/3 z_0, v = (z_0^2/2 + 4 z_0^2)/2 / (3/4) = 3 z_0^2
    d = 5 / 3 / math.sqrt(3)
    close(view(fira.step(view(2 * g))), first * (1 + d))


def test_fira_phi_of_the_whole_matrix():
    fira = Fira(torch.zeros(2, 3, dtype=REAL), 1.0, 1, alpha=0.0, phi_eps=0.0, eps=1e-15, columnwise=False)
    fira.find = lambda g, old: tensor([[1.0], [0.0]])
    g = tensor([[2.0, -4.0, 4.0], [3.0, 4.0, -5.0]])
    close(fira.step(g), -tensor([[0.0, 0.0, 0.0], [3.0, 4.0, -5.0]]) * math.sqrt(3) / 6)


@pytest.mark.parametrize("make", [Fira, Apollo])
def test_the_limiter_lets_the_norm_grow_by_a_percent(make):
    start, gradients = series((4, 6), steps=5)
    gradients = [g * 10.0**k for k, g in enumerate(gradients)]
    growth = {}
    for gamma in (1.01, None):
        reference = make(start, lr=0.1, rank=2, find=frames(4, 2), refresh_at=every(1), gamma=gamma, limiter_eps=0.0)
        norms = []
        for g in gradients:
            reference.step(g)
            norms.append(reference.last)
        growth[gamma] = [after / before for before, after in zip(norms[:-1], norms[1:], strict=True)]
    assert max(growth[1.01]) == pytest.approx(1.01, rel=1e-12)
    assert max(growth[None]) > 1.1


def test_the_limiter_by_hand():
    s = tensor([[3.0, 4.0]])
    close(limited(s, None, 1.01, 1e-8), s)
    close(limited(s, 5.0, 1.01, 0.0), s)
    close(limited(s, 50.0, 1.01, 0.0), s)  # a decrease passes
    close(limited(s, 2.0, 1.01, 0.0), s * 2.02 / 5)
    close(limited(s, 0.0, 1.01, 1e-8), s * 1.01e-8 / 5)  # after a vanishing s the next one all but vanishes


@pytest.mark.parametrize("make", [Fira, Apollo])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_bias_correction_matters_to_the_limiter_alone(make, corrected):
    start, gradients = series((4, 6), steps=5)
    gradients = [g * 10.0**k for k, g in enumerate(gradients)]
    options = {"lr": 0.1, "rank": 2, "eps": 1e-30, "phi_eps": 0.0, "weight_decay": 0.1}
    one = make(start, find=frames(4, 2), corrected=corrected, gamma=None, **options)
    other = make(start, find=frames(4, 2), corrected=not corrected, gamma=None, **options)
    close(run(one, gradients).p, run(other, gradients).p)
    one = make(start, find=frames(4, 2), corrected=corrected, **options)
    other = make(start, find=frames(4, 2), corrected=not corrected, **options)
    assert (run(one, gradients).p - run(other, gradients).p).abs().max() > 1e-3


# APOLLO


@pytest.mark.parametrize(
    ("kind", "rank", "squared", "front"),
    [("channel", 2, 1.0, False), ("tensor", 1, 128.0, False), ("channel", 2, 3.0, True)],
)
@pytest.mark.parametrize("shape", [(4, 6), (7, 3), (5, 5)])
def test_apollo_is_apollo_torch(shape, kind, rank, squared, front):
    """The authors' package agrees, with the conventions named in the reference; it draws U in float32."""
    peer = pytest.importorskip("apollo_torch")
    start, gradients = series(shape, steps=9)
    gradients = [g * 3.0**k for k, g in enumerate(gradients)]
    p = torch.nn.Parameter(start.clone())
    group = {"params": [p], "rank": rank, "proj": "random", "scale_type": kind, "scale": squared}
    group |= {"update_proj_gap": 4, "proj_type": "std"}
    optimizer = peer.APOLLOAdamW([group], scale_front=front, **PEER)
    right = shape[0] >= shape[1]

    def theirs(operand, old):
        u = optimizer.state[p]["projector"].ortho_matrix
        return u.mT if right else u

    reference = Apollo(
        start,
        rank=rank,
        scale=math.sqrt(squared),
        scale_first=front,
        channelwise=kind == "channel",
        refresh_at=every(4),
        side="right" if right else "left",
        corrected=False,
        find=theirs,
        **PEER,
    )
    for g, expected in zip(gradients, peer_steps(optimizer, p, gradients), strict=True):
        close(reference.step(g), expected, 1e-10)


def test_apollo_of_pytorch_optimizer_is_another_algorithm():
    """It scales the projected gradient and lifts it: its update has rank r, where APOLLO's is of the whole gradient."""
    peer = pytest.importorskip("pytorch_optimizer")
    start, gradients = series((4, 6), steps=1)
    p = torch.nn.Parameter(start.clone())
    group = {"params": [p], "rank": 1, "update_proj_gap": 4, "scale": 1.0, "projection_type": "std"}
    optimizer = peer.APOLLO([group], scale_type="tensor", **PEER)
    theirs = next(peer_steps(optimizer, p, gradients))
    assert torch.linalg.matrix_rank(theirs - start, rtol=1e-9) == 1
    ours = Apollo(start, lr=0.03, rank=1, channelwise=False, find=frames(4, 1))
    assert torch.linalg.matrix_rank(ours.step(gradients[0]) - start, rtol=1e-9) == 4


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_apollo_with_the_identity_scales_the_channels_of_adam(shape, dtype):
    """U = I: the update of a channel has the norm of Adam's and the direction of the gradient."""
    start, gradients = series(shape, dtype, steps=4)
    adam = AdamW(torch.zeros_like(start), lr=1.0)
    apollo = Apollo(torch.zeros_like(start), 1.0, min(shape), find=identity, gamma=None, phi_eps=0.0)
    across = 0 if shape[0] <= shape[1] else 1
    for g in gradients:
        before, ours = adam.p, apollo.p
        d, s = before - adam.step(g), ours - apollo.step(g)
        close(torch.linalg.norm(s, dim=across), torch.linalg.norm(d, dim=across))
        norms = torch.linalg.norm(s, dim=across, keepdim=True), torch.linalg.norm(g, dim=across, keepdim=True)
        close(s / norms[0], g / norms[1])


def test_apollo_at_its_first_step():
    """|d_ij| = 1 at step 0: phi_j = sqrt(r) / |z_j|, and sqrt(r n) / |z| for the whole matrix; |s| is then known."""
    start, gradients = series((4, 6), steps=1)
    g, u = gradients[0], torch.randn(4, 2, dtype=REAL, generator=torch.Generator().manual_seed(3))
    z = u.T @ g
    options = {"find": lambda operand, old: u, "phi_eps": 0.0, "eps": 0.0}
    expected = start - 0.1 * g * math.sqrt(2) / torch.linalg.norm(z, dim=0)
    close(Apollo(start, 0.1, 2, **options).step(g), expected)
    mini = apollo_mini(start, 0.1, **{**options, "find": lambda operand, old: u[:, :1]})
    z = u[:, :1].T @ g
    close(mini.step(g), start - 0.1 * math.sqrt(128) * g * math.sqrt(6) / torch.linalg.norm(z))


# all of them


SIMPLE = {
    "fira": lambda p, find: Fira(p, rank=2, find=find, refresh_at=every(3), **HYPER),
    "apollo": lambda p, find: Apollo(p, rank=2, find=find, refresh_at=every(3), **HYPER),
    "mini": lambda p, find: Apollo(p, rank=2, channelwise=False, find=find, refresh_at=every(3), **HYPER),
}


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
@pytest.mark.parametrize("name", SIMPLE)
def test_complex_with_real_entries_is_real(name, shape):
    start, gradients = series(shape, steps=7)
    real, cast = frames(min(shape), 2), frames(min(shape), 2)
    one = run(SIMPLE[name](start, real), gradients)
    other = SIMPLE[name](start.to(COMPLEX), lambda g, old: cast(g, old).to(COMPLEX))
    run(other, [g.to(COMPLEX) for g in gradients])
    close(other.p, one.p.to(COMPLEX))
    assert not other.v.is_complex()


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
@pytest.mark.parametrize("name", SIMPLE)
def test_transposed_on_the_other_side_is_transposed(name, shape):
    """Left of g is right of g^H, with the same frames."""
    start, gradients = series(shape, COMPLEX, steps=7)
    one = run(SIMPLE[name](start, frames(min(shape), 2, COMPLEX)), gradients)
    other = run(SIMPLE[name](start.mH, frames(min(shape), 2, COMPLEX)), [g.mH for g in gradients])
    close(other.p, one.p.mH)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("name", SIMPLE)
def test_zero_gradients_are_harmless(name, dtype):
    start, gradients = series((4, 6), dtype, steps=3)
    zero = torch.zeros_like(start)
    reference = SIMPLE[name](start, frames(4, 2, dtype))
    close(run(reference, [zero, zero]).p, start * (1 - 0.003) ** 2)
    for g in [*gradients, zero, zero, *gradients]:
        assert torch.isfinite(reference.step(g)).all()
