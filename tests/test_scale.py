"""The update scale: how a lifted direction is stretched, and that it carries a rate over from rank to rank."""

import math

import pytest
import torch
from torch import nn

import comoving


def first_update(shape, dtype=torch.float64, **options):
    """The first step on a gradient of unit-size entries inside the frame: RMS of the update in units of the rate."""
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = comoving.LowRankOptimizer([p], 1e-2, weight_decay=0.0, **options)
    p.grad = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return (p.detach().abs().square().mean().sqrt() / 1e-2).item()


@pytest.mark.parametrize("rank", [2, 8, 20])
@pytest.mark.parametrize(("scale", "rms"), [("match", 1.0), ("0.2-match", 0.2), ("auto", 0.3), ("2.5-match", 2.5)])
def test_matrices_move_by_the_same_rms_at_any_rank(rank, scale, rms):
    assert first_update((32, 48), rank=rank, scale=scale) == pytest.approx(rms, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("scale", "rms"), [("match", 1.0), ("auto", 1.0), ("0.2-match", 0.2)])
def test_tensors_move_by_the_same_rms(dtype, scale, rms):
    assert first_update((16, 12, 10), dtype, rank=0.1, scale=scale) == pytest.approx(rms, rel=1e-6)


def test_a_number_is_taken_as_it_is():
    assert first_update((32, 48), rank=8, scale=0.25) == pytest.approx(0.25 * math.sqrt(8 / 32), rel=1e-6)


@pytest.mark.parametrize("scale", ["mach", "0-match", "-1-match", "x-match", "0.2", 0.0, -1.0, float("nan"), True])
def test_other_scales_are_refused(scale):
    with pytest.raises((TypeError, ValueError), match="scale"):
        comoving.AdamW([nn.Parameter(torch.zeros(8, 8))], scale=scale)
