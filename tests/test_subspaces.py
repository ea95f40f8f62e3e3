"""Methods that walk, sample or orthogonalize in their subspace: each recipe against its paper's reference."""

import math

import pytest
import torch

import comoving
from comoving.residual import Raw
from comoving.rules import Muon
from contract.support import COMPLEX, REAL, Holder, close, frame_of, randn
from references.algebra import every
from references.side import Side
from references.sumo import Sumo

STEPS = 24
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MATRICES = pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=["wide", "tall", "square"])


def gradients(shape, dtype, seed):
    """A drifting signal in noise, whose size goes up and down: a limiter acts in some steps and not in others."""
    low, high = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    drifting = [
        low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, dtype, 70 * seed + t) for t in range(STEPS)
    ]
    return [g * (1 + 0.5 * math.sin(t)) for t, g in enumerate(drifting)]


def built(recipe, shape, dtype, rank=None, **options):
    """Two parameters of one shape, which are stepped together, and the optimizer of both."""
    model = Holder(randn(shape, dtype, 1), randn(shape, dtype, 2))
    optimizer = comoving.build(recipe, model, 0.03, rank=rank, weight_decay=0.1, **options)
    return list(model.parameters()), optimizer


def follow(params, optimizer, references, check=lambda p, reference, g, t: None, tolerance=1e-8):
    """Step both sides side by side; the optimizer first, so that references can be told its frames."""
    series = [gradients(tuple(p.shape), p.dtype, 10 + i) for i, p in enumerate(params)]
    for t in range(STEPS):
        for p, own in zip(params, series, strict=True):
            p.grad = own[t].clone()
        optimizer.step()
        for p, reference, own in zip(params, references, series, strict=True):
            close(p.detach(), reference.step(own[t]), tolerance)
            check(p, reference, own[t], t)


def basis_of(optimizer, p):
    """The only factor of p's frame; G Q = G x_2 U^H needs Q = conj(U)."""
    left, right = frame_of(optimizer, p).factors
    return left if right is None else right.conj()


# ------------------------------------------------------------------------------------------------------------- SUMO


@FIELDS
@MATRICES
def test_sumo(shape, dtype):
    """Block 3 has nothing to limit: moments of full rank have |O| = sqrt(r). Frames are the optimizer's own."""
    rule = Muon(decay=0.8, nesterov=False, method="polar", scale=0.7)
    params, optimizer = built("sumo", shape, dtype, 3, rule=rule, refresh_every=5, residual=Raw(rate=0.4))
    references = [
        Sumo(
            p.detach(), 0.03, 3, mu=0.8, weight_decay=0.1, scale=0.7, rest=0.4,
            find=lambda g, p=p: basis_of(optimizer, p), refresh_at=every(5, optimizer.sites[p].phase),
        )
        for p in params
    ]  # fmt: skip
    captured = []

    def check(p, reference, g, t):
        if reference.refresh_at(t):
            best = Side(shape).project(Side(shape).leading(g, 3), g).norm()
            captured.append(float(reference.side.project(reference.q, g).norm() / best))
        assert torch.equal(reference.q, basis_of(optimizer, p))

    follow(params, optimizer, references, check)
    assert len(captured) == 10
    assert min(captured) > 0.995  # a sketch that is read four times
    assert not any(reference.limited for reference in references)


def test_sumo_by_itself():
    """As it is built: an update of c Q O, c = 0.2 sqrt(max(m, n)), and the rest of the gradient as it is."""
    params, optimizer = built("sumo", (6, 10), REAL, 2)
    references = [
        Sumo(p.detach(), 0.03, 2, weight_decay=0.1, find=lambda g, p=p: basis_of(optimizer, p)) for p in params
    ]
    follow(params, optimizer, references)
    group = optimizer.param_groups[0]
    assert (group["refresh_every"], group["finder"].inertia, group["rule"].decay) == (200, 0.0, 0.95)
