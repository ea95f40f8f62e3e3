"""Gradients of every size and structure: finite weights, no NaN in the state, steps bounded by the learning rate."""

import math

import pytest
import torch

from comoving.linalg import sgn_
from comoving.precondition import Factored
from comoving.residual import Raw, Sign
from comoving.rules import Adafactor, Lion
from comoving.transport import Keep
from contract.support import COMPLEX, MOVING, PRECONDITIONERS, REAL, RESIDUALS, close, lone, randn, step

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)


def rank_one(shape, dtype, seed):
    x = randn(shape[:1], dtype, seed)
    for n, d in enumerate(shape[1:], 1):
        x = x.unsqueeze(-1) * randn((d,), dtype, seed + n)
    return x


def slices(x, mode, *live):
    """x in these slices of a mode, zero elsewhere."""
    out = torch.zeros_like(x)
    index = torch.tensor(live) % x.shape[mode]
    return out.index_copy_(mode, index, x.index_select(mode, index))


def entry(x, t):
    out = torch.zeros_like(x)
    out.view(-1)[7 * t % x.numel()] = 1
    return out


STREAMS = {
    "zero rows": lambda x, t: slices(x, 0, 0),
    "zero columns": lambda x, t: slices(x, x.ndim - 1, 0),
    "a new row each": lambda x, t: slices(x, 0, t),
    "rank one": lambda x, t: rank_one(x.shape, x.dtype, 10 * t),
    "one entry": entry,
    "constants": lambda x, t: torch.full_like(x, 1e-3 * (1 + t)),
    "zero, then alive, then zero": lambda x, t: x if t in (1, 2) else 0 * x,
    "denormal": lambda x, t: x * 1e-40,
    "hardly a number": lambda x, t: x * 1.5e-45,
    "squares underflow": lambda x, t: x * 1e-25,
    "squares overflow": lambda x, t: x * 1e20,
    "1e37 once": lambda x, t: x * 1e37 if t == 1 else x,
    "1e37": lambda x, t: x * 1e37,
}
"""A gradient from Gaussian numbers and the step, from 0."""


def check(shape, dtype, most, **options):
    """Every stream: finite weights, no NaN in the state; steps no larger than ``most`` learning rates."""
    for name, stream in STREAMS.items():
        p, optimizer = lone(torch.zeros(shape, dtype=dtype), lr=1e-3, weight_decay=0.0, **options)
        for t in range(4):
            before = p.detach().clone()
            step(optimizer, p, stream(randn(shape, dtype, t), t))
            assert p.isfinite().all(), (name, t)
            assert (p.detach() - before).abs().max() <= most * 1e-3, (name, t)
            for slot, x in optimizer.state[p].items():
                if torch.is_tensor(x) and slot != "diagnostics":
                    assert not x.isnan().any(), (name, t, slot)
        if "squares" not in name and "number" not in name and name not in ("denormal", "1e37"):
            assert p.abs().max() > 1e-6, name


@FLOATS
@pytest.mark.parametrize("shape", [(8, 12), (1, 10, 2), (6, 5, 4)], ids=str)
@pytest.mark.parametrize("part", PRECONDITIONERS, ids=str)
def test_preconditioners(part, shape, dtype):
    check(shape, dtype, 30, rank=1.0, precondition=part)


@FLOATS
@pytest.mark.parametrize("shape", [(8, 12), (1, 10, 2), (6, 5, 4)], ids=str)
@pytest.mark.parametrize(
    "rule", [Adafactor(), Adafactor(decay=None, clip=None), Adafactor(average="update"), Lion()], ids=str
)
def test_rules_of_their_own_second_moment_or_none(rule, shape, dtype):
    check(shape, dtype, 30, rank=1.0, rule=rule)


@FLOATS
@pytest.mark.parametrize("residual", [*RESIDUALS, *MOVING], ids=str)
def test_residuals(residual, dtype):
    most = math.inf if isinstance(residual, Raw) else 100  # it has the size of the gradients
    check((8, 12), dtype, most, rank=3, residual=residual, refresh_every=2, scale=1.0, transport=Keep())


@pytest.mark.parametrize("dtype", [torch.float32, REAL, torch.complex64, COMPLEX], ids=str)
def test_signs_of_numbers_of_every_size(dtype):
    """Unit length, or 0 where torch finds no phase, and never NaN."""
    info = torch.finfo(dtype)
    sizes = torch.tensor([0.0, info.smallest_normal / 2**9, info.smallest_normal * 4, 1.0, info.max / 4], dtype=REAL)
    phases = torch.tensor([1 + 0j, -1, 1j, 0.6 - 0.8j], dtype=COMPLEX)
    x = (sizes[:, None] * (phases if dtype.is_complex else phases.real.sign())).to(dtype)
    if not dtype.is_complex:
        x = x[:, :2]
    found = sgn_(x.clone())
    assert found.isfinite().all()
    assert not found[0].any()
    for row in found[2:]:
        close(row.to(COMPLEX), (phases if dtype.is_complex else phases[:2]), 1e-6)
    assert (found[1].abs() < 1.01).all()


@FLOATS
@pytest.mark.parametrize("part", [Factored(), Factored(clip=None)], ids=str)
def test_one_huge_gradient_does_not_stop_adafactors_later_ones(part, dtype):
    """A mean of squares that has become infinite would divide all that follows."""
    options = {"precondition": part} if dtype == torch.float32 else {"rule": Adafactor(clip=part.clip)}
    p, optimizer = lone(torch.zeros((1, 10, 2), dtype=dtype), rank=1.0, lr=1.0, weight_decay=0.0, **options)
    for t in range(300):
        before = p.detach().clone()
        step(optimizer, p, randn((1, 10, 2), dtype, t) * (1e20 if t == 0 else 1e18))
    assert (p.detach() - before).abs().max() > 1e-2


def test_the_sign_of_what_is_no_normal_number_moves_nothing():
    for dtype in (torch.float32, torch.complex64):
        p, optimizer = lone(torch.zeros((8, 12), dtype=dtype), rank=3, residual=Sign(floor=0.0), weight_decay=0.0)
        step(optimizer, p, randn((8, 12), dtype) * 1e-40)
        assert p.abs().max() < 1e-6
        step(optimizer, p, randn((8, 12), dtype) * 1e-30)
        assert p.abs().max() > 1e-4
