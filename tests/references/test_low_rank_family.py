"""The references of Fira, APOLLO and their kin: peers that follow the papers, cases by hand, identities.

Peers at fault, and what is taken from them: see the comments of each test. Weight decay is 0 against the peers, which
decay after the update rather than before.
"""

import itertools
import math

import pytest
import scipy.fft
import torch

from references.adamw import AdamW
from references.algebra import every
from references.apollo import Apollo, apollo_mini
from references.coap import Coap, calibrated
from references.dct_adamw import DctAdamW, dct3
from references.fira import Fira
from references.flora import Flora
from references.frugal import Frugal
from references.galore import GaLore
from references.online_subspace_descent import OnlineSubspaceDescent, oja, pca_gradient
from references.side import limited
from references.tensor_galore import TensorGaLore
from references.tensorgrad import TensorGRaD

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


# FRUGAL


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_frugal_is_adamw_with_the_identity_and_galore_without_the_rest(shape, dtype):
    start, gradients = series(shape, dtype)
    full = Frugal(start, rank=9, find=identity, reset=False, refresh_at=every(2), **HYPER)
    close(run(full, gradients).p, run(AdamW(start, **HYPER), gradients).p)
    one = Frugal(start, rank=2, find=frames(min(shape), 2, dtype), refresh_at=every(2), free=None, reset=False, **HYPER)
    find = frames(min(shape), 2, dtype)
    galore = GaLore(start, rank=2, find=lambda g: find(g, None), refresh_at=every(2), scale=1.0, **HYPER)
    close(run(one, gradients).p, run(galore, gradients).p)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("reset", [True, False])
def test_frugal_by_rows(reset, dtype):
    """U = rows {0, 1}, then rows {2, 3} of the identity: Adam on these, g / |g| on the others."""
    start, gradients = series((4, 6), dtype, steps=4)
    eye = torch.eye(4, dtype=dtype)
    find = iter([eye[:, :2], eye[:, 2:]])
    options = {"scale": 0.7, "free_scale": 0.5, "lr": 0.1}
    reference = Frugal(start, rank=2, find=lambda g, old: next(find), refresh_at=every(2), reset=reset, **options)
    adam, p = AdamW(torch.zeros(2, 6, dtype=dtype), lr=0.07), start
    for k, g in enumerate(gradients):
        if k == 2 and reset:
            adam = AdamW(torch.zeros(2, 6, dtype=dtype), lr=0.07)
        chosen, others = (slice(0, 2), slice(2, 4)) if k < 2 else (slice(2, 4), slice(0, 2))
        before = adam.p
        p = p.clone()
        p[chosen] += adam.step(g[chosen]) - before
        p[others] -= 0.035 * g[others] / g[others].abs()
        close(reference.step(g), p)


def test_frugal_leaves_alone_what_is_rounding():
    start, gradients = series((4, 6))
    u = frames(4, 4)(None, None)
    signs = Frugal(start, rank=4, find=lambda g, old: u, lr=0.03)
    quiet = Frugal(start, rank=4, find=lambda g, old: u, lr=0.03, free_at=1e-12)
    none = Frugal(start, rank=4, find=lambda g, old: u, lr=0.03, free=None)
    close(run(quiet, gradients).p, run(none, gradients).p)
    assert (run(signs, gradients).p - none.p).abs().max() > 0.02


# DCT-AdamW


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_dct3_is_that_of_scipy(size):
    x = torch.randn(3, size, dtype=REAL, generator=torch.Generator().manual_seed(0))
    q = dct3(size)
    close(q.mT @ q, torch.eye(size, dtype=REAL))
    close(x @ q, torch.from_numpy(scipy.fft.dct(x.numpy(), type=3, norm="ortho")))
    close(x @ q.mT, torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho")))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_dct_of_full_rank_is_adamw_in_those_coordinates(shape, basis, dtype):
    """Whatever the order of the selection, for the moments follow their columns."""
    start, gradients = series(shape, dtype)
    q = dct3(min(shape)).to(dtype)
    q = q.mT if basis == "dct2" else q
    left = shape[0] <= shape[1]
    reference = DctAdamW(start, rank=9, basis=basis, error_feedback=True, **HYPER)
    adam = AdamW(q.mT @ start if left else start @ q, **HYPER)
    for g in gradients:
        p = adam.step(q.mT @ g if left else g @ q)
        close(reference.step(g), q @ p if left else p @ q.mT)
    close(reference.e, torch.zeros_like(start))


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (7, 5)])
def test_dct_moments_follow_their_columns(shape, rotate):
    start, gradients = series(shape, steps=8)
    left = shape[0] <= shape[1]
    reference = DctAdamW(start, rank=2, rotate=rotate, **HYPER)
    length, b1, b2, seen = max(shape), 0.8, 0.95, 0
    q, kept, slots = dct3(5), {}, [(torch.zeros(length, dtype=REAL),) * 2] * 2
    for g in gradients:
        reference.step(g)
        s = (q.mT @ g).T if left else g @ q
        best = sorted(range(5), key=lambda j: -float(s[:, j].abs().sum()))[:2]  # noqa: B023
        assert reference.indices.tolist() == best
        zero = (torch.zeros(length, dtype=REAL),) * 2
        old = [kept.get(j, zero) for j in best] if rotate else slots
        seen += rotate and any(j in kept for j in best) and not all(j in kept for j in best)
        slots = [
            (b1 * m + (1 - b1) * s[:, j], b2 * v + (1 - b2) * s[:, j] ** 2) for (m, v), j in zip(old, best, strict=True)
        ]
        kept = dict(zip(best, slots, strict=True))
        for k, (m, v) in enumerate(slots):
            close(reference.m[k] if left else reference.m[:, k], m)
            close(reference.v[k] if left else reference.v[:, k], v)
    assert seen or not rotate


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(5, 6), (7, 5)])
def test_dct_selection_in_l2_is_the_best_and_feedback_telescopes(shape, dtype):
    start, gradients = series(shape, dtype)
    left = shape[0] <= shape[1]
    q = dct3(5).to(dtype)
    reference = DctAdamW(start, rank=2, norm=2, error_feedback=True, **HYPER)
    sent = torch.zeros_like(start)
    for k, g in enumerate(gradients):
        a = g + reference.e
        reference.step(g)
        errors = []
        for pair in itertools.combinations(range(5), 2):
            u = q[:, list(pair)]
            errors.append(float(torch.linalg.norm(a - (u @ u.mH @ a if left else a @ u @ u.mH))))
        assert float(torch.linalg.norm(reference.e)) == pytest.approx(min(errors))
        sent = sent + a - reference.e
        close(sent + reference.e, sum(gradients[: k + 1]))


# Flora


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("current", ["compressed", "exact"])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_flora_with_square_unitary_frames_is_momentum(shape, current, dtype):
    start, gradients = series(shape, dtype, steps=7)
    size = min(shape)
    options = {"find": frames(size, size, dtype), "refresh_at": every(2), "current": current}
    reference = Flora(start, 0.1, size, beta=0.8, weight_decay=0.1, **options)
    p, m = start, torch.zeros_like(start)
    for g in gradients:
        m = 0.8 * m + 0.2 * g
        p = p * 0.99 - 0.1 * m
        close(reference.step(g), p)


@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_flora_accumulates_the_mean(shape):
    start, gradients = series(shape, steps=6)
    size, drawn = min(shape), []
    draw = frames(size, size)

    def find(g, old):
        drawn.append(old)
        return draw(g, old)

    reference = Flora(start, 0.1, size, beta=None, window=3, find_accumulator=find)
    total = Flora(start, 0.1, size, beta=None, window=3, mean=False, find_accumulator=frames(size, size))
    for k, g in enumerate(gradients[:3]):
        p = reference.step(g)
        assert torch.equal(p, start) == (k < 2)
    close(p, start - 0.1 * sum(gradients[:3]) / 3)
    close(run(total, gradients[:3]).p, start - 0.1 * sum(gradients[:3]))
    close(run(reference, gradients[3:]).p, start - 0.1 * sum(gradients) / 3)
    assert len(drawn) == 2  # one matrix for each window


def test_flora_by_hand():
    """Rank 1, b = 1/2, U = e1, then U = (3, 4)/5 which is not e1: m = 5/25 ... in the new frame, as m A_old A_new^T."""
    find = iter([tensor([[1.0], [0.0]]), tensor([[3.0], [4.0]])])
    zero, g = torch.zeros(2, 2, dtype=REAL), tensor([[2.0, 4.0], [1.0, -1.0]])
    reference = Flora(zero, 1.0, 1, beta=0.5, find=lambda w, old: next(find), refresh_at=every(1))
    close(reference.step(g), -tensor([[1.0, 2.0], [0.0, 0.0]]))
    # m' = (3, 4) . (lifted m = [[1, 2], [0, 0]]) = (3, 6);  U'^T g = (10, 8);  m = (6.5, 7)
    close(reference.step(g), -tensor([[1.0, 2.0], [0.0, 0.0]]) - tensor([[19.5, 21.0], [26.0, 28.0]]))
    find = iter([tensor([[1.0], [0.0]]), tensor([[3.0], [4.0]])])
    exact = Flora(zero, 1.0, 1, beta=0.5, find=lambda w, old: next(find), refresh_at=every(1), current="exact")
    close(exact.step(g), -g / 2)
    close(exact.step(g), -g - tensor([[0.5, 1.0], [0.0, 0.0]]))
    close(exact.m, tensor([[6.5, 7.0]]))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_flora_base_is_the_adafactor_of_transformers(shape, relative):
    """The copy in apollo_torch, without a rank; Flora's authors start from the same one."""
    peer = pytest.importorskip("apollo_torch")
    start, gradients = series(shape, steps=6)
    gradients = [g * 2.0**k for k, g in enumerate(gradients)]  # so that the clip acts
    p = torch.nn.Parameter(start.clone())
    options = {"lr": 0.05, "weight_decay": 0.1}
    optimizer = peer.GaLoreAdafactor([p], relative_step=False, scale_parameter=relative, **options)
    reference = Flora(start, rank=1, beta=None, base="adafactor", relative=relative, **options)
    for g, expected in zip(gradients, peer_steps(optimizer, p, gradients), strict=True):
        close(reference.step(g), expected)


# Online Subspace Descent


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_pca_gradient_is_that_of_autograd(dtype):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(5, 2, dtype=dtype, generator=generator, requires_grad=True)
    x = torch.randn(5, 4, dtype=dtype, generator=generator)
    loss = (u @ u.mH @ x - x).abs().square().sum() + 0.3 * (u.mH @ u - torch.eye(2)).abs().square().sum()
    loss.backward()
    close(pca_gradient(u.detach(), x, 0.3), u.grad)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_online_subspace_descent_is_two_optimizers_of_torch(shape, first):
    """Adam in the subspace and AdamW on U, on the loss as the authors write it, without the penalty.

    At step 0 the singular vectors are a critical point: what moves U there is rounding, over Adam's 1e-8.
    """
    start, gradients = series(shape, steps=6)
    left = shape[0] <= shape[1]
    options = {"lr": 0.03, "betas": (0.8, 0.95)}
    reference = OnlineSubspaceDescent(start, rank=2, u_lr=0.02, u_weight_decay=0.01, from_start=first, **options)
    u = torch.nn.Parameter(reference.side.leading(gradients[0], 2).clone())
    mover = torch.optim.AdamW([u], lr=0.02, weight_decay=0.01)
    inner = AdamW(torch.zeros(reference.m.shape, dtype=REAL), **options)
    p = start
    for k, g in enumerate(gradients):
        fixed, before = u.detach().clone(), inner.p
        change = inner.step(fixed.T @ g if left else g @ fixed) - before
        p = p + (fixed @ change if left else change @ fixed.T)
        close(reference.step(g), p, 1e-7 if first else 1e-10)
        if k or first:
            mover.zero_grad()
            x = (g if left else g.T) / torch.linalg.norm(g)
            (torch.linalg.norm(u @ u.T @ x - x) ** 2).backward()
            mover.step()
        close(reference.u, u.detach(), 1e-7 if first else 1e-10)
    assert (reference.u.T @ reference.u - torch.eye(2)).abs().max() > 1e-3  # not orthonormal


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_subspace_descent_of_full_rank_stays(shape, dtype):
    """U = I reconstructs every x: its gradient is 0."""
    start, gradients = series(shape, dtype)
    options = {"find": identity, "u_optimizer": "sgd", "penalty": 0.2, "u_lr": 0.1}
    reference = run(OnlineSubspaceDescent(start, rank=9, **options, **HYPER), gradients)
    close(reference.p, run(AdamW(start, **HYPER), gradients).p)
    close(reference.u, torch.eye(min(shape), dtype=dtype))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
@pytest.mark.parametrize("kind", ["sgd", "oja"])
def test_subspace_descent_finds_the_leading_subspace(kind, shape, dtype):
    start, gradients = series(shape, dtype, steps=1)
    u, _, vh = torch.linalg.svd(gradients[0], full_matrices=False)
    s = torch.tensor([3.0, 2.0] + [0.2] * (min(shape) - 2), dtype=REAL).to(dtype)
    g = u @ torch.diag(s) @ vh
    options = {"find": frames(min(shape), 2, dtype), "u_optimizer": "sgd", "u_lr": 0.1, "penalty": 0.1}
    if kind == "oja":
        options["advance"] = oja(shape, 1.0)
    reference = run(OnlineSubspaceDescent(start, 1e-3, 2, **options), [g] * 400)
    best = u[:, :2] if shape[0] <= shape[1] else vh.mH[:, :2]
    projector = reference.u @ reference.u.mH
    close(projector, best @ best.mH, 1e-5)
    if kind == "oja":
        close(reference.u.mH @ reference.u, torch.eye(2, dtype=dtype))


def test_subspace_descent_before_or_after():
    start, gradients = series((4, 6), steps=3)
    options = {"find": frames(4, 2), "advance": lambda g, u: u + 1.0}
    for before, ahead in ((True, 1.0), (False, 0.0)):
        options["find"] = frames(4, 2)
        reference = OnlineSubspaceDescent(start, 0.1, 2, before=before, **options)
        u = frames(4, 2)(None, None) + ahead
        p = reference.step(gradients[0])
        close(p, start - 0.1 * u @ torch.sign(u.T @ gradients[0]), 1e-6)


# COAP


@pytest.mark.parametrize("rows", [None, True])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_coap_descends_as_the_functions_of_torch(shape, rows):
    """The step on U out of torch's mse_loss, cosine_similarity and clip_grad_norm_; the clip acts on the large one."""
    start, gradients = series(shape, steps=4)
    left = shape[0] <= shape[1]
    gradients[3] = 30 * gradients[3]
    clipped = []
    reference = Coap(start, rank=2, period=1, factor=100, rows=rows, **HYPER)
    for k, g in enumerate(gradients):
        old, m = reference.u, reference.m
        reference.step(g)
        if k == 0:
            close(reference.u, reference.side.leading(g, 2))
            continue
        u = torch.nn.Parameter(old.clone())
        again, momentum = (u @ u.T @ g, u @ m) if left else (g @ u @ u.T, m @ u.T)
        cosine = torch.nn.functional.cosine_similarity(momentum, g, dim=1 if rows or not left else 0)
        (torch.nn.functional.mse_loss(again, g) * (1 - cosine.mean())).backward()
        clipped.append(float(torch.nn.utils.clip_grad_norm_([u], 1.0)) > 1)
        close(reference.u, old - 0.1 * u.grad)
    assert clipped[-1]
    assert not all(clipped)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_coap_gradient_is_the_slope_of_the_loss(shape, dtype):
    start, gradients = series(shape, dtype, steps=3)
    reference = run(Coap(start, rank=2, **HYPER), gradients)
    way = torch.randn(reference.u.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    h, g = 1e-5, gradients[1] * 1e-2
    slope = (reference.loss(reference.u + h * way, g) - reference.loss(reference.u - h * way, g)) / (2 * h)
    grad = (reference.u - reference.descended(g)) / reference.u_lr
    assert torch.linalg.norm(grad) < 0.9  # not clipped
    close((grad.conj() * way).real.sum(), slope, 1e-9)
    assert reference.loss(reference.descended(g), g) < reference.loss(reference.u, g)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_coap_recalibration(shape, dtype):
    """Of a gradient of rank r the sketch finds the singular vectors, from any U; it is orthonormal for all others."""
    g = series(shape, dtype, steps=1)[1][0]
    left = shape[0] <= shape[1]
    old = torch.randn(min(shape), 2, dtype=dtype, generator=torch.Generator().manual_seed(1))
    u = calibrated(g, old, left)
    close(u.mH @ u, torch.eye(2, dtype=dtype))
    a, s, bh = torch.linalg.svd(g, full_matrices=False)
    g = a[:, :2] @ torch.diag(s[:2]).to(dtype) @ bh[:2]
    u, best = calibrated(g, old, left), a[:, :2] if left else bh.mH[:, :2]
    close((u.mH @ best).abs(), torch.eye(2, dtype=REAL))


def test_coap_schedule():
    start, gradients = series((4, 6), steps=13)
    calls, found = [], frames(4, 2)
    reference = Coap(start, rank=2, period=2, factor=3, **HYPER)
    reference.find = lambda g, old: calls.append(reference.t) or found(g, old)
    changes = []
    for k, g in enumerate(gradients):
        old = reference.u
        reference.step(g)
        if reference.u is not old:
            changes.append(k)
    assert calls == [0, 6, 12]
    assert changes == [0, 2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(4, 6), (7, 3)])
def test_coap_with_the_identity_is_adamw(shape, dtype):
    """U = I reconstructs every g: the loss is 0 and flat, and restored moments are the same."""
    start, gradients = series(shape, dtype)
    options = {"find": identity, "period": 1, "factor": 3, "restore": True}
    close(run(Coap(start, rank=9, **options, **HYPER), gradients).p, run(AdamW(start, **HYPER), gradients).p)


# TensorGRaD


def whole(operand, old):
    return [None] * operand.dim()


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("order", ["sparse_first", "low_rank_first", "sum"])
def test_tensorgrad_of_whole_modes_is_adam_entry_by_entry(order, dtype, corrected):
    """Nothing left for the second part; on Omega the sparse part alone, or both in the sum."""
    start, gradients = series((3, 4, 2), dtype)
    chosen = torch.tensor([1, 5, 17])
    options = {"scale": 0.5, "sparse_scale": 2.0, "order": order, "find": whole, "select": lambda x, k: chosen}
    options |= {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-8 if corrected else 1e-30, "corrected": corrected}
    reference = TensorGRaD(start, ranks=(None,) * 3, k=3, refresh_at=every(2), **options)
    adam = AdamW(torch.zeros_like(start), lr=0.1, betas=(0.8, 0.95), eps=options["eps"])
    factor = torch.full((24,), 0.5, dtype=REAL)
    factor[chosen] = {"sparse_first": 2.0, "low_rank_first": 0.5, "sum": 2.5}[order]
    if order == "low_rank_first" and not corrected:
        pytest.skip("0 / (0 + 1e-30) is fine, but what is left is rounding")
    close(run(reference, gradients).p, start + factor.reshape(3, 4, 2) * run(adam, gradients).p)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_tensorgrad_without_its_sparse_part_is_tensor_galore(dtype):
    start, gradients = series((4, 3, 3), dtype)
    ranks, options = (2, None, 2), {"refresh_at": every(2), "n_iter": 2, "scale": 0.7}
    low = TensorGRaD(start, ranks=ranks, k=3, order="low_rank_first", sparse_scale=0.0, **options, **HYPER)
    close(run(low, gradients).p, run(TensorGaLore(start, ranks=ranks, **options, **HYPER), gradients).p)


@pytest.mark.parametrize("order", ["sparse_first", "low_rank_first"])
def test_tensorgrad_takes_each_part_from_what_the_other_left(order):
    """Factors and indices come from the operand of their part, at the refresh, and what is sent is what they keep."""
    start, gradients = series((4, 3, 3), steps=1)
    g, seen = gradients[0], {}

    def find(operand, old):
        seen["low"] = operand
        return [torch.linalg.qr(torch.arange(8.0, dtype=REAL).reshape(4, 2).cos())[0], None, None]

    def select(operand, k):
        seen["sparse"] = operand
        return torch.topk(operand.flatten().abs(), k).indices.sort().values

    reference = TensorGRaD(start, 0.1, (2, None, None), k=4, order=order, find=find, select=select)
    y, x = reference.split(g, True)
    assert len(x) == 4
    if order == "sparse_first":
        close(seen["sparse"], g)
        close(seen["low"], torch.where(g.abs() >= x.abs().min(), torch.zeros_like(g), g))
    else:
        close(seen["low"], g)
        close(seen["sparse"], g - reference.lift(y))
        assert x.abs().min() >= seen["sparse"].abs().flatten().sort(descending=True).values[3]
    close(y, reference.project(seen["low"]))


@pytest.mark.parametrize("kind", ["keep", "reset", "match"])
def test_tensorgrad_moments_at_new_indices(kind):
    """Omega = {0, 2}, then {2, 3}: slot 0 goes from entry 0 to 2 ("keep"), or entry 2 from slot 1 to 0 ("match")."""
    omegas = iter([torch.tensor([0, 2]), torch.tensor([2, 3])])
    reference = TensorGRaD(
        torch.zeros(4, dtype=REAL), 1.0, (None,), k=2, scale=0.0, betas=(0.5, 0.5), find=whole,
        select=lambda x, k: next(omegas), sparse_moments=kind, refresh_at=every(1),
    )  # fmt: skip
    run(reference, [tensor([2.0, 4.0, 6.0, 8.0]), tensor([1.0, 1.0, 1.0, 1.0])])
    m, v = {"keep": ([1.0, 2.0], [1.5, 9.5]), "reset": ([0.5, 0.5], [0.5, 0.5]), "match": ([2.0, 0.5], [9.5, 0.5])}[
        kind
    ]
    close(reference.sparse[0], tensor(m))
    close(reference.sparse[1], tensor(v))
    second = [-(m[i] / 0.75) / math.sqrt(v[i] / 0.75) for i in range(2)]
    close(reference.p, tensor([-1.0, 0.0, -1.0 + second[0], second[1]]), 1e-6)


def test_tensorgrad_sizes():
    reference = TensorGRaD(torch.zeros(5, 5, dtype=REAL), 0.1, (2, None), density=0.1, sparse_scale=None)
    assert reference.k == 3
    assert reference.sparse_scale == 0.3


@pytest.mark.parametrize("order", ["sparse_first", "low_rank_first", "sum"])
def test_tensorgrad_of_real_entries_and_of_zeros(order):
    start, gradients = series((4, 3, 3))
    factors = [frames(4, 2)(None, None), None, None]
    options = {"ranks": (2, None, None), "k": 4, "order": order, "refresh_at": every(2), **HYPER}
    real = TensorGRaD(start, find=lambda x, old: factors, **options)
    cast = [factors[0].to(COMPLEX), None, None]
    other = TensorGRaD(start.to(COMPLEX), find=lambda x, old: cast, **options)
    for g in [torch.zeros_like(start), *gradients, torch.zeros_like(start), *gradients]:
        close(other.step(g.to(COMPLEX)), real.step(g).to(COMPLEX))
        assert torch.isfinite(real.p).all()
    assert not other.low[1].is_complex()


# all of them


SIMPLE = {
    "fira": lambda p, find: Fira(p, rank=2, find=find, refresh_at=every(3), **HYPER),
    "apollo": lambda p, find: Apollo(p, rank=2, find=find, refresh_at=every(3), **HYPER),
    "mini": lambda p, find: Apollo(p, rank=2, channelwise=False, find=find, refresh_at=every(3), **HYPER),
    "frugal": lambda p, find: Frugal(p, rank=2, find=find, refresh_at=every(3), **HYPER),
    "frugal-sgd": lambda p, find: Frugal(p, rank=2, find=find, refresh_at=every(3), free="sgd", **HYPER),
    "dct": lambda p, find: DctAdamW(p, rank=2, error_feedback=True, **HYPER),
    "osd": lambda p, find: OnlineSubspaceDescent(p, rank=2, find=find, penalty=0.1, **HYPER),
    "coap": lambda p, find: Coap(p, rank=2, find=find, period=1, factor=3, restore=True, **HYPER),
    "flora": lambda p, find: Flora(p, rank=2, find=find, refresh_at=every(3), lr=0.03, weight_decay=0.1),
    "flora-adafactor": lambda p, find: Flora(
        p, rank=2, find=find, base="adafactor", refresh_at=every(3), lr=0.03, weight_decay=0.1
    ),
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
    assert name.startswith("flora") or not other.v.is_complex()


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
