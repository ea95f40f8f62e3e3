"""The figures of error control against formulas written out, and the bound against the error, at every step."""

import json
from math import inf, isfinite, isnan

import pytest
import torch

from comoving.codecs import Full
from comoving.finders import Exact, Power
from comoving.linalg import norm
from comoving.residual import Discard, Feedback, MomentumBuffer, Sparse
from comoving.transport import Reset
from contract.support import (
    CODECS,
    COMPLEX,
    MOVING,
    REAL,
    RESIDUALS,
    TRANSPORTS,
    close,
    explicit,
    feedback_error,
    feedback_of,
    frame_of,
    lone,
    randn,
    step,
)

NORM = torch.linalg.vector_norm
BETAS = (0.8, 0.95)
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
SHAPES = pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 9), (2, None)), ((9, 6), (None, 2)), ((8, 7), (3, 2)), ((5, 4, 6), (2, None, 3))], ids=str
)


class Watched:
    """A run whose every figure is formed a second time, from explicit bases and decoded buffers."""

    def __init__(self, shape, ranks, dtype, residual, codec, **options):
        self.p, self.optimizer = lone(
            randn(shape, dtype), rank=ranks, betas=BETAS, eps=1e-3, residual=residual, codec=codec, **options
        )
        self.keeps = residual != Discard()
        self.error_before, self.frame, self.m, self.bound = torch.zeros(shape, dtype=dtype), None, None, 0.0

    def step(self, g):
        """The optimizer's figures and ours, as two dicts of floats."""
        step(self.optimizer, self.p, g)
        found = self.optimizer.diagnostics()[self.optimizer.sites[self.p].name]
        shape, dtype, state = g.shape, g.dtype, self.optimizer.state[self.p]
        frame = frame_of(self.optimizer, self.p)
        basis, seen = explicit(frame, shape, dtype), (g + self.error_before).flatten()
        z = basis.mH @ seen
        kept, lost = seen - basis @ z, torch.zeros_like(seen)
        q = NORM(kept) / NORM(seen)
        own = {"captured": float(NORM(z) ** 2 / NORM(seen) ** 2)}
        turned = self.frame is not None and any(
            u is not None and not torch.equal(u, v) for u, v in zip(frame.factors, self.frame.factors, strict=True)
        )
        if turned:
            # m' is what became of m before this step's gradient: m = b1 m' + (1 - b1) z
            moved = (state["moment.first"].flatten() - (1 - BETAS[0]) * z) / BETAS[0]
            lost = explicit(self.frame, shape, dtype) @ self.m - basis @ moved
            pairs = [(u, v) for u, v in zip(frame.factors, self.frame.factors, strict=True) if u is not None]
            gaps = [torch.eye(v.shape[1], dtype=dtype) - (u.mH @ v).mH @ (u.mH @ v) for u, v in pairs]
            own["overlap"] = float(max(NORM(gap) for gap in gaps))
            self.turned = True
        if self.keeps:
            kept = kept + BETAS[0] / (1 - BETAS[0]) * lost
            codec_error = feedback_error(self.optimizer, self.p)
            self.error_before = feedback_of(self.optimizer, self.p)
            own["bound"] = float(q * (NORM(g) + self.bound) + BETAS[0] / (1 - BETAS[0]) * NORM(lost) + codec_error)
            assert NORM(self.error_before) <= found["bound"] * (1 + 1e-5)  # also what the codec made of it
        else:
            own["bound"] = float(NORM(kept))
        own["error"] = float(NORM(kept))
        self.frame, self.m, self.bound = frame, state["moment.first"].flatten().clone(), found["bound"]
        return found, own


@FIELDS
@SHAPES
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("codec", [*CODECS, None], ids=str)
@pytest.mark.parametrize("period", [1, 3])
def test_figures_are_the_explicit_ones_and_the_bound_holds(shape, ranks, transport, codec, period, dtype):
    residual = Discard() if codec is None else Feedback()
    run = Watched(
        shape,
        ranks,
        dtype,
        residual,
        codec or Full(),
        transport=transport,
        finder=Power(inertia=0.5),
        refresh_every=period,
    )
    for t in range(8):
        found, own = run.step(randn(shape, dtype, 30 + t))
        assert found["error"] <= found["bound"] * (1 + 1e-5)
        for name, value in own.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
        assert 0 <= found["captured"] <= 1
        assert found["bound"] < 1e3
    assert run.turned
    if codec is not None:
        assert found["bound"] > found["error"] > 0.1


@FIELDS
def test_orthogonality_defect_is_that_of_the_frame_in_use(dtype):
    shape, ranks = (8, 7), (3, 2)
    p, optimizer = lone(randn(shape, dtype).to(torch.promote_types(dtype, torch.float32)), rank=ranks, finder=Exact())
    for t in range(4):
        step(optimizer, p, randn(shape, dtype, t))
        frame = frame_of(optimizer, p)
        gaps = [(u.mH @ u - torch.eye(u.shape[1], dtype=dtype)).abs().max() for u in frame.factors]
        if t:
            assert optimizer.diagnostics()["parameter 0"]["defect"] == pytest.approx(float(max(gaps)), rel=1e-5)
    assert max(gaps) < 1e-12


def test_a_signal_inside_the_frame_is_captured_whole():
    """A gradient of the frame's own rank: nothing is lost, and feedback has nothing to bound."""
    p, optimizer = lone(torch.zeros(8, 12, dtype=REAL), rank=2, finder=Exact(), residual=Feedback(), refresh_every=2)
    signal = randn((8, 2)) @ randn((2, 12), seed=1)
    for _ in range(5):
        step(optimizer, p, signal)
        figures = optimizer.diagnostics()["parameter 0"]
        assert figures["captured"] == pytest.approx(1, abs=1e-6)
        assert figures["error"] < 1e-5 * signal.norm()
        assert figures["overlap"] < 1e-5


def test_overlap_of_frames_that_share_nothing_is_the_root_of_the_rank():
    p, optimizer = lone(torch.zeros(9, 12, dtype=REAL), rank=(3, None), finder=Exact())
    first, second = torch.zeros(2, 9, 12, dtype=REAL)
    first[:3], second[3:6] = randn((3, 12)), randn((3, 12), seed=1)
    step(optimizer, p, first)
    step(optimizer, p, second)
    assert optimizer.diagnostics()["parameter 0"]["overlap"] == pytest.approx(3**0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("view", ["tensor", "matrix", "pairs"])
@pytest.mark.parametrize("shape", [(12, 10, 2), (12, 2), (3,)])
def test_gradients_are_never_changed(shape, view, maximize, dtype):
    if view == "pairs" and dtype.is_complex:
        pytest.skip("pairs are of reals")
    options = {"residual": Feedback(), "maximize": maximize, "refresh_every": 2, "weight_decay": 0.1}
    p, optimizer = lone(torch.zeros(shape, dtype=dtype), rank=0.3, view=view, **options)
    for t in range(4):
        g = randn(shape, torch.complex64 if dtype.is_complex else torch.float32, t).to(dtype)
        p.grad = g.clone()
        address = p.grad.data_ptr()
        optimizer.step()
        assert torch.equal(p.grad, g)
        assert p.grad.data_ptr() == address
    assert p.abs().max() > 0


def test_diagnostics_can_be_left_out():
    p, optimizer = lone(randn((8, 12)), rank=2, diagnostics=False, residual=Feedback())
    twin, measured = lone(randn((8, 12)), rank=2, diagnostics=True, residual=Feedback())
    for t in range(5):
        step(optimizer, p, randn((8, 12), seed=t))
        step(measured, twin, randn((8, 12), seed=t))
    close(p.detach(), twin.detach(), 0)
    assert optimizer.diagnostics() == {}
    assert "diagnostics" not in optimizer.state[p]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_figures_of_half_precision_are_formed_in_single(residual, dtype, seed):
    """A norm rounded to bfloat16 is off by 0.4%, which puts the bound below the error."""
    p, optimizer = lone(torch.zeros(24, 40, dtype=dtype), rank=2, residual=residual, refresh_every=2)
    before = torch.zeros(24, 40)
    for t in range(4):
        g = randn((24, 40), torch.float32, 10 * seed + t).to(dtype)
        step(optimizer, p, g)
        figures, frame = optimizer.diagnostics()["parameter 0"], frame_of(optimizer, p)
        seen = g.float() + before
        assert figures["captured"] == pytest.approx(float((NORM(frame.project(seen)) / NORM(seen)) ** 2), rel=1e-4)
        assert figures["error"] <= figures["bound"] * (1 + 1e-5)
        if residual == Feedback():
            before = feedback_of(optimizer, p)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    ("shape", "dtype", "value"),
    [((24,), torch.float16, 100.0), ((8, 24), torch.float16, 3e4), ((24,), torch.float32, 1e25)],
    ids=str,
)
def test_a_norm_that_overflows_is_no_bad_gradient(policy, shape, dtype, value):
    """Every entry is finite: the step is taken, and nothing becomes NaN."""
    if value == 100.0:
        shape = (2**20,)  # the norm is 102400, above float16's 65504
    p, optimizer = lone(torch.zeros(shape, dtype=dtype), rank=1, on_nonfinite=policy)
    step(optimizer, p, torch.full(shape, value, dtype=dtype))
    assert optimizer.skipped_steps == 0
    assert optimizer.state[p]["step"] == 1
    assert p.isfinite().all()
    if value < 1e5:
        assert (p < 0).all()


@pytest.mark.parametrize("residual", [Discard(), Feedback()], ids=str)
def test_figures_can_be_read_where_a_norm_overflowed_or_nothing_came(residual):
    p, optimizer = lone(torch.zeros(8, 24), rank=2, residual=residual)
    for value in (0.0, 1e25):
        step(optimizer, p, torch.full((8, 24), value))
        figures = optimizer.diagnostics()["parameter 0"]
        assert list(figures) == ["captured", "overlap", "defect", "error", "bound"]
        if value:
            assert not figures["bound"] < value  # infinite, or no number: nothing is promised
        else:
            assert figures["captured"] == figures["error"] == figures["bound"] == 0


@pytest.mark.parametrize("small", [1e-3, 1e-6])
def test_what_is_lost_of_a_double_precision_gradient_is_seen_where_almost_all_is_captured(small):
    p, optimizer = lone(torch.zeros(8, 12, dtype=REAL), rank=2, finder=Exact())
    u, v = (torch.linalg.qr(randn((d, 3), seed=d)).Q for d in (8, 12))
    step(optimizer, p, u @ torch.diag(torch.tensor([2.0, 1.0, small], dtype=REAL)) @ v.mT)
    figures = optimizer.diagnostics()["parameter 0"]
    assert figures["error"] == pytest.approx(small, rel=1e-3)
    assert figures["error"] <= figures["bound"] == pytest.approx(small, rel=2e-2)  # 32 machine epsilons of |g|^2


def rows(x, *live):
    """x in these rows, zero elsewhere."""
    out = torch.zeros_like(x)
    out[list(live)] = x[list(live)]
    return out


def entry(shape, dtype, t):
    x = torch.zeros(shape, dtype=dtype)
    x[t % shape[0], 3 * t % shape[1]] = 1
    return x


STREAMS = {
    "zero rows": lambda t, x: rows(x, 0, 3),
    "a new row each": lambda t, x: rows(x, t % len(x)),
    "rank one": lambda t, x: x[:, :1] @ x[:1],
    "the same of rank one": lambda t, x: torch.ones_like(x[:, :1]) @ torch.linspace(-1, 2, x.shape[1]).to(x)[None],
    "one entry": lambda t, x: entry(x.shape, x.dtype, t),
    "constants": lambda t, x: torch.full_like(x, 0.3 + t),
    "dead, then alive, then dead": lambda t, x: x if 2 <= t < 5 else 0 * x,
    "large and small in turn": lambda t, x: x * (1e3 if t % 2 else 1e-3),
    "denormal": lambda t, x: x * 1e-40,
    "1e15": lambda t, x: x * 1e15,
}


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("residual", [*RESIDUALS, *MOVING], ids=str)
def test_where_there_is_a_bound_it_holds(residual, transport):
    """Of what is really lost or kept, in double precision, from gradients as they are; where there is none, no key."""
    if isinstance(residual, Sparse) and transport == Reset() and residual.statistics != "reset":
        pytest.skip("refused")
    shape = (8, 12)
    for number, (name, stream) in enumerate(STREAMS.items()):
        options = {"transport": transport, "residual": residual, "refresh_every": 1 + number % 3}
        dtype = torch.complex64 if number % 2 else torch.float32
        p, optimizer = lone(torch.zeros(shape, dtype=dtype), rank=2, finder=Exact(), **options)
        largest = 0.0
        for t in range(7):
            g = stream(t, randn(shape, dtype, 10 * number + t))
            step(optimizer, p, g)
            largest = max(largest, float(NORM(g.to(COMPLEX))))
            figures = optimizer.diagnostics()["parameter 0"]
            assert all(isfinite(x) and x >= 0 for x in figures.values()), (name, t, figures)
            if residual in MOVING:
                assert list(figures) == ["captured", "overlap", "defect", "error"]
                continue
            assert figures["error"] <= figures["bound"], (name, t)
            if isinstance(residual, Sparse):
                continue  # which stands beside the frame
            frame = frame_of(optimizer, p)
            lost = feedback_of(optimizer, p) if residual.feeds else g - frame.lift(frame.project(g))
            rounding = 1e-18 + 8 * torch.finfo(dtype).eps * largest
            assert NORM(lost.to(COMPLEX)) <= figures["bound"] + rounding, (name, t)


def test_momentum_in_the_buffer_leaves_the_frame_with_it_so_that_there_is_no_bound():
    """Small gradients that follow a large one: M loses what the frame held of it, which no gradient accounts for."""
    p, optimizer = lone(torch.zeros(8, 12), rank=2, residual=MomentumBuffer(), finder=Exact())
    q, other = lone(torch.zeros(8, 12), rank=2, residual=Feedback(), finder=Exact())
    for t, size in enumerate((1e3, 1e-3, 1e-3)):
        for w, o in ((p, optimizer), (q, other)):
            step(o, w, randn((8, 12), torch.float32, t) * size)
    assert "bound" not in optimizer.diagnostics()["parameter 0"]
    assert list(other.diagnostics()["parameter 0"])[-1] == "bound"
    assert isinstance(json.dumps([optimizer.diagnostics(), other.diagnostics()], allow_nan=False), str)


@pytest.mark.parametrize(
    "residual", [Discard(), Feedback(), Feedback(lazy=False, decay=0.7), Sparse(), MomentumBuffer()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_norms_that_overflow_give_infinite_figures_and_no_nan(residual, dtype):
    """And afterwards what is measured bounds what follows."""
    p, optimizer = lone(torch.zeros(8, 12, dtype=dtype), rank=2, residual=residual, refresh_every=2)
    for t, size in enumerate((1e19, 1e30, 1e19, 1.0, 1.0)):
        step(optimizer, p, randn((8, 12), dtype, t) * size)
        figures = optimizer.diagnostics()["parameter 0"]
        assert not any(isnan(x) for x in figures.values()), (t, figures)
        assert figures["error"] <= figures.get("bound", inf)
        if t < 3:
            assert figures["error"] == figures["captured"] == inf
    assert p.isfinite().all()
    if residual == Discard():
        assert 0 < figures["error"] <= figures["bound"] < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_norms_of_many_equal_entries(dtype):
    """Added in a row, as torch adds on the CPU, their squares lose more than a bound may."""
    x = torch.full((2**20 + 3,), 0.3, dtype=dtype)
    exact = float(NORM(x.to(COMPLEX)))
    assert float(norm(x)) == pytest.approx(exact, rel=1e-5)
    assert float(norm(x.view(1, -1)[:, ::2])) == pytest.approx(exact / 2**0.5, rel=1e-2)
