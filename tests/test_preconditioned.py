"""Recipes with Kronecker factors follow float64 references written from their papers, no hyper-parameter neutral."""

import pytest
import torch

import comoving
from comoving.codecs import Full
from comoving.precondition import Kronecker
from comoving.residual import Discard, Feedback
from comoving.rules import SOAP, Shampoo
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, Holder, close, frame_of, lone, randn, step
from references.algebra import basis, core_shape, every, mode_product, unfold
from references.shampoo import Shampoo as ReferenceShampoo
from references.shampoo import inverse_power
from references.soap import SOAP as ReferenceSOAP
from references.soap import adams_bound, cut
from references.tucker_adam import TuckerAdam

STEPS = 50
HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])
# Early covariances without full rank leave QR to invent directions: no mode is much longer than the others together.
WHOLE = pytest.mark.parametrize("shape", [(5, 4), (4, 4), (3, 4, 5), (3, 2, 2, 3), (1, 1)], ids=str)
PARTLY = pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 4), (4, None)), ((7, 6), (3, 3)), ((6, 4, 5), (3, None, 3))], ids=str
)


def follow(optimizer, p, reference, tolerance=1e-9):
    for t in range(STEPS):
        g = randn(tuple(p.shape), p.dtype, 100 + t) * (1 + t / 10)
        step(optimizer, p, g)
        close(p.detach(), reference.step(g), tolerance)


def whole(recipe, shape, dtype, **options):
    model = Holder(randn(shape, dtype, 1))
    optimizer = comoving.build(recipe, model, **(HYPER | options))
    if max(shape) == 1:  # fewer than two modes that are longer than 1: dense
        pytest.skip("dense")
    assert optimizer.sites[model.w0].whole
    return model.w0, optimizer


@FIELDS
@WHOLE
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [0.7, None])
def test_soap(shape, every, decay, dtype):
    p, optimizer = whole("soap", shape, dtype, rule=SOAP(decay=decay, every=every))
    reference = ReferenceSOAP(
        p.detach(), 0.03, betas=(0.8, 0.95), shampoo_beta=decay, eps=1e-3, weight_decay=0.1, frequency=every,
        skip_first=False, bounded=True,
    )  # fmt: skip
    follow(optimizer, p, reference)


@FIELDS
def test_soap_leaves_long_modes(dtype):
    p, optimizer = whole("soap", (4, 3, 5), dtype, rule=SOAP(every=2, max_size=4))
    reference = ReferenceSOAP(
        p.detach(),
        0.03,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
        frequency=2,
        max_size=4,
        skip_first=False,
        bounded=True,
    )
    follow(optimizer, p, reference)
    assert "soap.2" not in optimizer.state[p]


@FIELDS
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_one_sided_soap_turns_the_shorter_side(shape, dtype):
    """As the reference does where the longer side is above max_size."""
    p, optimizer = whole("soap", shape, dtype, rule=SOAP(every=2, one_sided=True))
    reference = ReferenceSOAP(
        p.detach(),
        0.03,
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
        frequency=2,
        max_size=4,
        skip_first=False,
        bounded=True,
    )
    follow(optimizer, p, reference)
    square, tensor = SOAP(one_sided=True).slots((5, 5)), SOAP(one_sided=True).slots((3, 4, 5))
    assert [slot.name for slot in square if slot.mode >= 0] == ["soap.0", "soap.0.basis"]
    assert tensor == SOAP().slots((3, 4, 5))


SHAMPOOS = {
    "recipe": (
        Shampoo(decay=0.9, eps=1e-3, every=3),
        {"b2": 0.9, "eps": 1e-3, "period": 3, "graft": "adam", "graft_b2": 0.95, "graft_eps": 1e-3},
    ),
    "newton": (
        Shampoo(decay=0.9, eps=1e-3, every=3, root="newton"),
        {"b2": 0.9, "eps": 1e-3, "period": 3, "graft": "adam", "graft_b2": 0.95, "graft_eps": 1e-3},
    ),
    "sums": (Shampoo(average=False, eps=1e-2, graft=False), {"eps": 1e-2}),
    "exponent": (Shampoo(decay=0.9, exponent=0.4, eps=1e-2, graft=False), {"b2": 0.9, "power": 0.4, "eps": 1e-2}),
    "diagonals": (
        Shampoo(decay=0.9, eps=1e-3, max_size=4),
        {"b2": 0.9, "eps": 1e-3, "max_size": 4, "graft": "adam", "graft_b2": 0.95, "graft_eps": 1e-3},
    ),
}


@FIELDS
@WHOLE
@pytest.mark.parametrize("name", SHAMPOOS)
def test_shampoo(name, shape, dtype):
    rule, options = SHAMPOOS[name]
    p, optimizer = whole("shampoo", shape, dtype, rule=rule)
    follow(optimizer, p, ReferenceShampoo(p.detach(), 0.03, b1=0.8, weight_decay=0.1, **options))


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 2, 4), (2, 3, 2, 3)], ids=str)
def test_shampoo_is_pytorch_optimizers(shape):
    """With sums, roots at every step and no momentum: the rest of it is not the paper's (see the reference's tests)."""
    peer = pytest.importorskip("pytorch_optimizer")
    rule = Shampoo(average=False, eps=1e-2, graft=False)
    p, optimizer = whole("shampoo", shape, REAL, rule=rule, betas=(0.0, 0.95))
    q = torch.nn.Parameter(p.detach().clone())
    other = peer.Shampoo([q], lr=0.03, weight_decay=0.1, weight_decouple=True, matrix_eps=1e-2)
    for t in range(10):
        step(optimizer, p, randn(shape, seed=t))
        step(other, q, randn(shape, seed=t))
        close(p.detach(), q.detach(), 1e-11)


class InTheCore:
    """SOAP or Shampoo in given frames, moments and statistics carried by R_n = U'_n^H U_n, error feedback, explicitly.

    z = F^H (g + e);  e = g + e - F F^H (g + e) + b1/(1-b1) (F_old m_old - F m);  p = p (1 - lr wd) - lr scale F d.
    """

    def __init__(self, p, frame, soap, feedback, scale, decay=0.9, frequency=3, power=None, l_eps=1e-3):
        self.p, self.frame, self.soap, self.feedback, self.scale = p.clone(), frame, soap, feedback, scale
        self.decay, self.frequency, self.power, self.l_eps = decay, frequency, power, l_eps
        self.e, self.t, self.u, self.b = torch.zeros_like(p), 0, None, None

    def carry(self, u):
        shape, dtype = self.p.shape, self.p.dtype
        old, new = (
            [torch.eye(d, dtype=dtype) if x is None else x for x, d in zip(y, shape, strict=True)] for y in (self.u, u)
        )
        r = [a.mH @ b for a, b in zip(new, old, strict=True)]
        m = self.m
        for n, matrix in enumerate(r):
            m = mode_product(m, matrix, n)
        self.stats = [matrix @ stat @ matrix.mH for matrix, stat in zip(r, self.stats, strict=True)]
        q = [gram_schmidt(matrix @ x) for matrix, x in zip(r, self.q, strict=True)] if self.soap else self.q
        turn = basis([a.mH @ b @ c for a, b, c in zip(q, r, self.q, strict=True)], m.shape, dtype)
        c1, c2 = 1 - 0.8**self.t, 1 - 0.95**self.t
        before, after = (self.inward(x, y).abs().flatten() ** 2 / c1**2 for x, y in ((self.m, self.q), (m, q)))
        spread = (turn.abs() ** 2) @ (self.v.flatten() / c2 - before)
        self.v = c2 * (spread + after).abs().reshape(m.shape)
        self.q, self.m = q, m

    @staticmethod
    def inward(x, q):
        for n, matrix in enumerate(q):
            x = mode_product(x, matrix.mH, n)
        return x

    def step(self, g):
        u, g = list(self.frame()), g + self.e
        shape, first = core_shape(u, self.p.shape), self.u is None
        b = basis(u, self.p.shape, g.dtype)
        if first:
            self.m, self.v = torch.zeros(shape, dtype=g.dtype), torch.zeros(shape, dtype=REAL)
            self.stats = [torch.zeros(d, d, dtype=g.dtype) for d in shape]
            self.q = [torch.eye(d, dtype=g.dtype) for d in shape]
        lifted = torch.zeros_like(self.e) if first else (self.b @ self.m.flatten()).reshape(g.shape)
        if not first and any(x is not None and not torch.equal(x, y) for x, y in zip(u, self.u, strict=True)):
            self.carry(u)
        z = (b.mH @ g.flatten()).reshape(shape)
        lost = lifted - (b @ self.m.flatten()).reshape(g.shape)
        if self.feedback:
            self.e = g - (b @ z.flatten()).reshape(g.shape) + 4 * lost
        self.u, self.b = u, b
        d = self.direction(z, first)
        self.p = self.p * (1 - 0.03 * 0.1) - 0.03 * self.scale * (b @ d.flatten()).reshape(g.shape)
        return self.p

    def direction(self, z, first):
        if self.soap and self.t >= 2 and self.t % self.frequency == 0:
            for n, (stat, q) in enumerate(zip(self.stats, self.q, strict=True)):
                order = (q.conj() * (stat @ q)).sum(0).real.argsort(descending=True)
                self.v, self.q[n] = self.v.index_select(n, order), torch.linalg.qr(stat @ q[:, order])[0]
        self.t += 1
        for n, stat in enumerate(self.stats):
            self.stats[n] = self.decay * stat + (1 - self.decay) * unfold(z, n) @ unfold(z, n).mH
            if self.soap and first:
                self.q[n] = torch.linalg.eigh(self.stats[n])[1].flip(1)
        self.m = 0.8 * self.m + 0.2 * z
        self.v = 0.95 * self.v + 0.05 * self.inward(z, self.q).abs() ** 2
        root = (self.v / (1 - 0.95**self.t)).sqrt() + 1e-3
        m = self.m / (1 - 0.8**self.t)
        if self.soap:
            d = cut(self.inward(m, self.q) / root, adams_bound(self.t, 0.8, 0.95))  # ours, as in the reference
            for n, q in enumerate(self.q):
                d = mode_product(d, q, n)
            return d
        a, d = m / root, m
        for n, stat in enumerate(self.stats):
            d = mode_product(d, inverse_power(stat / (1 - self.decay**self.t), self.l_eps, 1 / (2 * z.ndim)), n)
        return d * (torch.linalg.norm(a) / torch.linalg.norm(d))


def gram_schmidt(a):
    q, r = torch.linalg.qr(a)
    return q * r.diagonal().sgn()


@FIELDS
@PARTLY
@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "discard"])
@pytest.mark.parametrize("rule", [SOAP(decay=0.9, every=3), Shampoo(decay=0.9, eps=1e-3)], ids=["soap", "shampoo"])
def test_low_rank_soap(rule, feedback, shape, ranks, dtype):
    """Twelve refreshes; Shampoo in the core too, which no recipe has."""
    model = Holder(randn(shape, dtype, 1))
    residual = Feedback() if feedback else Discard()
    options = HYPER | {"rule": rule, "residual": residual, "codec": Full(), "scale": 0.7}
    optimizer = comoving.build("low-rank-soap", model, rank=ranks, **options)
    p = model.w0
    assert optimizer.param_groups[0]["refresh_every"] == 4
    follow(
        optimizer,
        p,
        InTheCore(p.detach(), lambda: frame_of(optimizer, p).factors, isinstance(rule, SOAP), feedback, 0.7),
        1e-8,
    )


class Preconditioned:
    """Another reference on gradients that Kronecker factors have preconditioned, explicitly."""

    def __init__(self, inner, shape, dtype, decay, eps, power=None, period=1, matched=True, max_size=99, above=True):
        self.inner, self.decay, self.eps, self.period, self.matched = inner, decay, eps, period, matched
        self.power = power or 1 / (2 * len(shape))
        self.stats = [torch.zeros(d, d, dtype=dtype) for d in shape]
        self.kept = [d <= max_size for d in shape]
        self.used = [d <= max_size or above for d in shape]
        self.roots, self.t = [None] * len(shape), 0

    def step(self, g):
        turned = g
        for n, stat in enumerate(self.stats):
            self.stats[n] = self.decay * stat + (1 - self.decay) * unfold(g, n) @ unfold(g, n).mH
            mean = self.stats[n] / (1 - self.decay ** (self.t + 1))
            if self.kept[n]:
                if self.t % self.period == 0:
                    self.roots[n] = inverse_power(mean, self.eps, self.power)
            elif self.used[n]:
                self.roots[n] = inverse_power(mean.diagonal().real, self.eps, self.power).to(g.dtype)
            if self.used[n]:
                turned = mode_product(turned, self.roots[n], n)
        self.t += 1
        return self.inner.step(turned * (torch.linalg.norm(g) / torch.linalg.norm(turned)) if self.matched else turned)


KRONECKERS = {
    "recipe": (Kronecker(decay=0.9, eps=1e-3, every=4), {"period": 4}),
    "plain": (Kronecker(decay=0.9, eps=1e-3, exponent=0.2, norm_matched=False), {"power": 0.2, "matched": False}),
    "diagonal": (Kronecker(decay=0.9, eps=1e-3, max_size=5, every=2), {"max_size": 5, "period": 2}),
    "none above": (Kronecker(decay=0.9, eps=1e-3, max_size=5, above="none"), {"max_size": 5, "above": False}),
    "newton": (Kronecker(decay=0.9, eps=1e-3, root="newton"), {}),
}


@FIELDS
@PARTLY
@pytest.mark.parametrize("name", KRONECKERS)
def test_shampoo_tucker(name, shape, ranks, dtype):
    part, options = KRONECKERS[name]
    model = Holder(randn(shape, dtype, 1))
    optimizer = comoving.build("shampoo-tucker", model, rank=ranks, precondition=part, scale=0.7, **HYPER)
    p = model.w0
    inner = TuckerAdam(
        p.detach(), find=lambda operand, old: list(frame_of(optimizer, p).factors), refresh_at=every(4), rho=0.9,
        transport="rotate", scale=0.7, **HYPER,
    )  # fmt: skip
    follow(optimizer, p, Preconditioned(inner, shape, dtype, 0.9, 1e-3, **options), 1e-8)


@FIELDS
def test_preconditioned_adam_in_the_whole_frame(dtype):
    """Rank 1.0 with a preconditioner is no longer torch's AdamW."""
    start = randn((5, 4), dtype, 1)
    p, optimizer = lone(start, rank=1.0, precondition=Kronecker(decay=0.9, eps=1e-3), **HYPER)
    inner = TuckerAdam(start, find=lambda operand, old: [None, None], refresh_at=lambda t: False, scale=1.0, **HYPER)
    follow(optimizer, p, Preconditioned(inner, (5, 4), dtype, 0.9, 1e-3))


def test_recipes_are_what_they_say():
    recipes = comoving.recipes()
    assert [recipes[name].full_rank for name in ("shampoo", "soap", "low-rank-soap", "shampoo-tucker")] == [
        True, True, False, False,
    ]  # fmt: skip
    group = {name: comoving.build(name, Holder(randn((16, 24))), rank=2).param_groups[0] for name in recipes}
    assert group["soap"]["betas"] == (0.95, 0.95)
    assert group["soap"]["rule"] == SOAP(every=10)
    assert group["shampoo"]["rule"].graft
    assert isinstance(group["low-rank-soap"]["transport"], Rotate)
    assert group["low-rank-soap"]["refresh_every"] == group["shampoo-tucker"]["refresh_every"] == 4
    assert group["shampoo-tucker"]["precondition"].norm_matched


@pytest.mark.parametrize("transport", [Keep(), Reset(), Rotate(), Rotate("keep"), Carry(), Carry("keep")], ids=str)
@pytest.mark.parametrize("rule", [SOAP(every=3), Shampoo(every=3)], ids=["soap", "shampoo"])
def test_every_transport_trains(rule, transport):
    """The distance to a target of a quadratic falls, with frames that drift.

    In its eigenbases SOAP's direction for a gradient of rank 3 has few entries: it is slower here than the others.
    """
    target = randn((12, 3)) @ randn((3, 16), seed=1)
    p, optimizer = lone(
        torch.zeros(12, 16, dtype=REAL), rule=rule, transport=transport, rank=4, refresh_every=4, lr=0.05, scale=1.0
    )
    for t in range(300):
        step(optimizer, p, p.detach() - target + 0.1 * randn((12, 16), seed=t))
    assert (p - target).norm() < (0.5 if isinstance(rule, SOAP) else 0.2) * target.norm()
