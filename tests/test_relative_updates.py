"""Update over weight, by role."""

from math import inf, sqrt

import pytest
import torch
from torch import nn

import comoving
from comoving.relative_updates import Movement, relative_updates
from comoving.roles import roles_of


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4)
        self.body, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.spectral = nn.Parameter(torch.full((4, 4, 3), 3 + 4j, dtype=torch.complex64))
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_roles_are_measured_over_all_their_entries():
    model = Model()
    with torch.no_grad():
        model.body.weight.fill_(2.0)
        model.other.weight.fill_(1.0)
        model.norm.bias.zero_()
    with relative_updates(model) as moved, torch.no_grad():
        assert moved == {}
        model.body.weight.add_(0.5)  # 16 entries, and 8 that stay
        model.spectral.mul_(1.1)
        model.norm.bias.add_(1.0)  # weights of 1 and 0, of which the zeros move
    assert moved["hidden"].update == pytest.approx(sqrt(16 * 0.25 / 24))
    assert moved["hidden"].weight == pytest.approx(sqrt((16 * 4 + 8) / 24))
    assert moved["spectral"].ratio == pytest.approx(0.1, rel=1e-5) and moved["spectral"].weight == pytest.approx(5.0)
    assert moved["norm"].ratio == pytest.approx(1.0)
    assert moved["table"].ratio == 0 and moved["table"].weight > 0
    assert moved.keys() == {found.role for found in roles_of(model).values()}
    assert Movement(1.0, 0.0).ratio == inf and Movement(0.0, 0.0).ratio == 0


def test_a_matrix_of_the_default_moves_as_one_of_adamw():
    """An orthogonalized update of RMS 0.2 is as long as AdamW's on noise, sqrt((1 - b1) / (1 + b1)) = 0.23."""
    updates = {}
    for name, rates in (("adamw", {}), ("comoving", {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96, bias=False))
        optimizer = comoving.build(name, model, lr=1e-3, weight_decay=0.0, **rates)
        for _ in range(60):
            model[0].weight.grad = torch.randn(96, 64)
            with relative_updates(model) as moved:
                optimizer.step()
        rate = optimizer.param_groups[0]["rate"]
        updates[name] = moved["hidden"].update / rate
    assert updates["adamw"] == pytest.approx(0.23e-3, rel=0.1)
    assert updates["comoving"] == pytest.approx(0.2e-3, rel=0.15)
