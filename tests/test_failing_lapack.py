"""Every recipe trains on where LAPACK fails now and then, or always."""

import pytest
import torch

import comoving
from contract.support import Holder, randn
from fake_lapack import FakeLapack, always, thirds

SHAPES = [((12, 20), torch.float32), ((9, 6, 4), torch.complex64)]


@pytest.mark.parametrize("recipe", comoving.recipes())
@pytest.mark.parametrize("wrong", [thirds, always], ids=["every third call fails", "every call fails"])
def test_steps_are_finite_whatever_lapack_does(recipe, wrong, monkeypatch):
    FakeLapack(monkeypatch, wrong)
    model = Holder(*(randn(shape, dtype) for shape, dtype in SHAPES))
    optimizer = comoving.build(recipe, model, 1e-2, **({} if recipe == "comoving" else {"refresh_every": 2}))
    for t in range(6):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(p.shape, p.dtype, 7 * t + i)
            p.grad[t % 3 :: 3] = 0
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.isfinite().all()
            assert not torch.equal(p, old)
