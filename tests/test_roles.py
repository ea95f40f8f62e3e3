"""Roles, by what gives them away, and rates by role."""

import pytest
import torch
from torch import nn

from comoving import LowRankOptimizer, build, explain, param_groups
from comoving.roles import Found, role_of, roles_of
from comoving.rules import Lion, Muon

M = torch.zeros


class Model(nn.Module):
    """Something of every role that a module or a name gives away."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.pos_embedding = nn.Embedding(6, 8)
        self.cls_token = nn.Parameter(M(1, 1, 8))
        self.patch_embed = nn.Conv2d(3, 8, 2)
        self.body = nn.Linear(8, 12)
        self.conv = nn.Conv1d(8, 8, 3)
        self.experts = nn.Parameter(M(4, 8, 8))
        self.spectral = nn.Parameter(M(8, 8, 3, dtype=torch.complex64))
        self.scale_norm = nn.Parameter(M(8))
        self.ln = nn.LayerNorm(8)
        self.gate = nn.Parameter(M(()))
        self.lm_head = nn.Linear(8, 20)


ROLES = {
    "tokens.weight": "table",
    "pos_embedding.weight": "position",
    "cls_token": "position",
    "patch_embed.weight": "convolution",
    "patch_embed.bias": "bias",
    "body.weight": "hidden",
    "body.bias": "bias",
    "conv.weight": "convolution",
    "conv.bias": "bias",
    "experts": "experts",
    "spectral": "spectral",
    "scale_norm": "norm",
    "ln.weight": "norm",
    "ln.bias": "norm",
    "gate": "scalar",
    "lm_head.weight": "head",
    "lm_head.bias": "bias",
}


def test_every_parameter_has_a_role():
    assert {name: found.role for name, found in roles_of(Model()).items()} == ROLES


def test_explain_shows_it():
    assert {row.parameter: row.role for row in explain(Model(), rank=2).rows} == ROLES


def test_a_tied_head_is_a_table():
    model = Model()
    model.lm_head.weight = model.tokens.weight
    assert roles_of(model)["tokens.weight"].role == "table"


@pytest.mark.parametrize(("shape", "role"), [((40, 8), "table"), ((8, 40), "hidden"), ((31, 8), "hidden")])
def test_a_gradient_of_rare_rows_gives_a_tall_nameless_matrix_away(shape, role):
    p = nn.Parameter(M(*shape))
    p.grad = M(*shape)
    assert role_of(None, p).role == "hidden"  # all rows are zero: nothing is known of them
    p.grad[::5] = 1
    assert role_of(None, p) == Found(role, "gradient" if role == "table" else "shape")
    assert role_of(None, p, [("w", nn.Linear(8, 40))]).role == "hidden"  # the module has spoken


def steps(optimizer, params, count=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


RATES = {"table": 4.0, "hidden": 0.5, "norm": 3.0}


@pytest.mark.parametrize("recipe", ["adamw", "galore", "muon"])
def test_a_rate_is_a_factor_of_the_learning_rate_but_not_of_the_decay(recipe):
    """A role at rate f moves as everything would at f lr with a decay of d / f."""

    def trained(lr, decay, rates):
        torch.manual_seed(0)
        model = Model().double()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        steps(build(recipe, model, lr=lr, rank=2, rates=rates, weight_decay=decay), list(model.parameters()))
        return dict(model.named_parameters())

    rated = trained(1e-2, 0.1, RATES)
    for factor in {1.0, *RATES.values()}:
        alone = trained(1e-2 * factor, 0.1 / factor, None)
        names = [name for name, role in ROLES.items() if RATES.get(role, 1.0) == factor]
        assert names
        for name in names:
            torch.testing.assert_close(rated[name], alone[name], rtol=1e-10, atol=1e-12)


def test_rates_are_in_explain_and_can_be_edited():
    model = Model()
    optimizer = build("galore", model, rank=2, rates=RATES)
    assert {row.role: row.rate for row in explain(optimizer).rows} == {r: RATES.get(r, 1.0) for r in ROLES.values()}
    assert "rate" in str(explain(optimizer)).splitlines()[0].split()
    for group in optimizer.param_groups:
        group["rate"] = 0.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="rate must lie in"):
        optimizer.step()


@pytest.mark.parametrize(
    ("rates", "match"),
    [
        ({"tabel": 2.0}, "no role 'tabel'.*did you mean 'table'"),
        ({"table": 0.0}, r"rates\['table'\] must lie in"),
        ({"head": 2.0}, "role 'head', which no parameter has"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates, match):
    with pytest.raises(ValueError, match=match):
        param_groups(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), rates=rates)


def test_with_select_all_nothing_stays_dense():
    model = Model()
    group = {"params": list(model.named_parameters()), "rank": 1.0, "rule": Lion(), "select": "all"}
    optimizer = LowRankOptimizer([group], lr=1e-2)
    assert all(site.whole for site in optimizer.sites.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(optimizer, list(model.parameters()), 1)
    for name, p in model.named_parameters():
        moved = (p - before[name] * (1 - 1e-2 * 0.01)).abs()
        assert torch.allclose(moved, torch.full_like(moved, 1e-2), atol=1e-6), name  # Lion's steps are of one size


def test_select_all_still_projects_what_a_frame_compresses():
    model = Model()
    group = {"params": list(model.named_parameters()), "rank": 2, "rule": Muon(), "select": "all"}
    sites = {site.name: site for site in LowRankOptimizer([group]).sites.values()}
    assert sites["tokens.weight"].projected and sites["body.bias"].whole and sites["gate"].whole
