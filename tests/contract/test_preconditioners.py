"""What every preconditioner promises, by itself and in the engine."""

import pytest
import torch

from comoving.precondition import Plain
from comoving.residual import Feedback
from contract.support import COMPLEX, PRECONDITIONERS, REAL, close, lone, randn, step

EVERY = pytest.mark.parametrize("part", PRECONDITIONERS, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, REAL, COMPLEX], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(6, 8), (8, 3), (3, 4, 5), (1, 6), (6, 1, 2), (7,)], ids=str)


def initial(part, shape, dtype):
    return {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in part.schema(shape, dtype).items()}


@pytest.fixture(autouse=True)
def no_global_randomness():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(torch.random.get_rng_state(), before)


@EVERY
@DTYPES
@SHAPES
@pytest.mark.parametrize("size", [0.0, 1e-15, 1.0, 1e15])
def test_shape_dtype_slots_and_the_given_gradient(part, shape, dtype, size):
    state, twin = initial(part, shape, dtype), initial(part, shape, dtype)
    assert all(name.startswith("precondition.") for name in state)
    declared = {name: (x.shape, x.dtype) for name, x in state.items()}
    for t in range(1, 6):
        g = randn(shape, dtype, t) * size
        before = g.clone()
        turned = part.apply(g, state, t)
        assert turned.shape == g.shape
        assert turned.dtype is dtype
        assert turned.isfinite().all()
        assert torch.equal(g, before)
        assert turned.any() or not size
        assert torch.equal(turned, part.apply(g, twin, t))
        if getattr(part, "norm_matched", False) and size:
            close((turned.norm() / g.norm()).double(), torch.ones((), dtype=REAL), 1e-5)
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == declared
    assert all(x.any() for x in state.values()) or not size


@EVERY
@DTYPES
def test_gradients_of_rank_one(part, dtype):
    state = initial(part, (6, 8), dtype)
    for t in range(1, 6):
        assert part.apply(randn((6, 1), dtype, 1) * randn((1, 8), dtype, 2), state, t).isfinite().all()


WAYS = {"whole": {"rank": 1.0}, "one side": {"rank": (3, None)}, "both sides": {"rank": (3, 4)}}


@EVERY
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [REAL, COMPLEX, torch.bfloat16], ids=str)
def test_in_the_engine(part, way, dtype):
    """State as declared, in working precision; resumes bitwise, also within a window; zero gradients are harmless."""
    if isinstance(part, Plain) and way == "whole":
        pytest.skip("torch's AdamW")
    options = dict(precondition=part, residual=Feedback(), refresh_every=2, scale="match", lr=0.01, **WAYS[way])
    p, optimizer = lone(randn((6, 8), REAL).to(dtype), **options)
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    for t in range(5):
        step(optimizer, p, (randn((6, 8), wide, t) * (t not in (0, 3))).to(dtype))
    state = optimizer.state[p]
    for name, declared in part.schema((6, 8), wide).items():
        assert (state[name].shape, state[name].dtype) == (torch.Size(declared.shape), declared.dtype)
    optimizer.absorb(p, randn((6, 8), wide, 7).to(dtype))
    q, other = lone(p.detach(), **options)
    other.load_state_dict({**optimizer.state_dict(), "state": clones(optimizer.state_dict()["state"])})
    for o, x in ((optimizer, p), (other, q)):
        o.absorb(x, randn((6, 8), wide, 8).to(dtype))
        o.apply(x)
        step(o, x, randn((6, 8), wide, 9).to(dtype))
    assert torch.equal(p, q)
    assert p.isfinite().all()


def clones(state):
    return {k: {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in own.items()} for k, own in state.items()}
