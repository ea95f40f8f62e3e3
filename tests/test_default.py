"""The default optimizer: what it chooses within how many bytes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import comoving
from comoving import Optimizer, explain, state_bytes
from comoving.composition import Choice, Table, measured
from comoving.composition.compose import counted_bytes, members_of
from comoving.roles import ROLES
from comoving.rules import Adam, Lion, Muon
from contract.support import randn

BUDGETS = [None, 1.0, "1/2", "1/4", "12.5%", "1/16", "1/32", 0]


class Model(nn.Module):
    """A table, two layers, a norm, a convolution, experts and a head."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(100, 32)
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)
        self.norm = nn.LayerNorm(32)
        self.conv = nn.Conv1d(32, 32, 3)
        self.experts = nn.Parameter(randn((3, 32, 24), torch.float32, 5))
        self.lm_head = nn.Linear(32, 100, bias=False)


def feed(model, t=0):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(tuple(p.shape), p.dtype, 100 * t + i)


def chosen(optimizer):
    return {row.parameter: row.why for row in explain(optimizer).rows}


def counted(optimizer):
    return sum(counted_bytes(site, optimizer.roster.group_of(p)) for p, site in optimizer.sites.items())


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_state_never_exceeds_the_budget(budget):
    model = Model()
    optimizer = Optimizer(model, lr=1e-3, budget=budget)
    for t in range(3):
        feed(model, t)
        optimizer.step()
    sizes = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]
    held = sum(x.numel() * x.element_size() for x in sizes)
    assert held == counted(optimizer)
    assert optimizer.state_limit is None or held <= optimizer.state_limit
    assert held == 0 or budget != 0
    entries = sum(p.numel() for p in model.parameters())
    if isinstance(budget, float | str):
        share = {"1/2": 1 / 2, "1/4": 1 / 4, "12.5%": 1 / 8, "1/16": 1 / 16, "1/32": 1 / 32}.get(budget, budget)
        assert optimizer.state_limit == int(share * 8 * entries)


def test_without_state_only_counts_are_kept():
    model = Model()
    optimizer = Optimizer(model, budget=0)
    feed(model)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * len(list(model.parameters())) + 4 * 2  # the experts count one by one


def test_the_loss_is_a_continuous_function_of_the_budget():
    """Between two budgets it is no more than one parameter's share above the line between them."""
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12)))
    members = members_of(model)
    losses = {row.role: {c.name: c.loss for c in measured().row(row.role).choices} for row in members}
    total = {role: sum(m.p.numel() for m in members if m.role == role) for role in losses}
    best = 4 * 8 * sum(m.p.numel() for m in members)

    def loss(limit):
        why = chosen(Optimizer(model, budget=limit))
        return sum(
            losses[m.role][why[m.name].partition(" (")[0]] * m.p.numel() / total[m.role] for m in members
        )  # fmt: skip

    limits = range(0, 16_000, 1_000)
    found = [loss(limit) for limit in limits]
    step = max(losses["hidden"].values()) / 12
    for low, middle, high in zip(found, found[1:], found[2:], strict=False):
        assert middle <= (low + high) / 2 + step
    assert found[0] > found[5] > found[-1] and loss(best) == 0


def test_bytes_go_where_they_save_most():
    table = Table(
        {
            "hidden": (Choice("none", {"rule": Muon(decay=0.0)}, loss=0.1), Choice("m", {"rule": Muon()}, loss=0.0)),
            "table": (Choice("none", {"rule": Lion()}, loss=0.2), Choice("adam", {"rule": Adam()}, loss=0.0)),
        }
    )
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    limits = {"all": 8 * 512 + 4 * 512, "hidden": 4 * 512 + 4 * 512}
    assert chosen(Optimizer(model, budget=limits["all"], table=table)) == {"0.weight": "adam", "1.weight": "m"}
    # A momentum costs 4 bytes an entry for .1, Adam beside signs 4 for .2: the table comes first.
    assert chosen(Optimizer(model, budget=limits["all"] - 1, table=table)) == {"0.weight": "adam", "1.weight": "none"}
    assert chosen(Optimizer(model, budget=limits["hidden"], table=table)) in (
        {"0.weight": "none", "1.weight": "m"},
        {"0.weight": "adam", "1.weight": "none"},
    )


def test_a_budget_below_the_least_state_names_the_parameter_that_binds():
    table = Table({"hidden": (Choice("m", {"rule": Muon()}),), "table": (Choice("signs", {"rule": Lion()}),)})
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 32, bias=False))
    with pytest.raises(
        ValueError, match=r"at least 4608 bytes.*608 more.*got 4000: 0.weight alone needs 2560 as signs"
    ):
        Optimizer(model, budget=4000, table=table)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"budget": -1}, ValueError, "budget must be >= 0 bytes"),
        ({"budget": 1.5}, ValueError, r"share of AdamW's state in \(0, 1\]"),
        ({"budget": "3/2"}, ValueError, "share of AdamW's state"),
        ({"budget": "1/0"}, ValueError, "share of AdamW's state"),
        ({"budget": True}, TypeError, "budget must be bytes"),
        ({"budget": "much"}, ValueError, "budget must be a size"),
        ({"rates": {"tabel": 2.0}}, ValueError, "did you mean 'table'"),
        ({"rates": {"spectral": 2.0}}, ValueError, "which no parameter has"),
        ({"rank": 4}, TypeError, "rank"),
        ({"lr": -1.0}, ValueError, "lr must"),
    ],
)
def test_bad_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        Optimizer(Model(), **options)


def test_what_the_default_chooses_itself_is_refused_by_name():
    with pytest.raises(TypeError, match="'comoving' chooses moments, rule itself.*comoving-adamw"):
        comoving.build("comoving", Model(), moments="int8", rule="lion")
    with pytest.raises(ValueError, match="chooses what it is made of"):
        comoving.build("comoving+ef", Model())


def test_a_role_without_a_row_gets_the_nearest_one_and_says_so():
    why = chosen(Optimizer(Model()))
    assert why["first.weight"] in {c.name for c in measured().row("hidden").choices}
    assert why["experts"].endswith("(measured on role hidden)")
    with pytest.raises(ValueError, match="no row for role 'table', nor for one that is like it; it has hidden"):
        Optimizer(nn.Embedding(8, 8), table=Table({"hidden": (Choice("m", {"rule": Muon()}),)}))


def test_experts_are_matrices_of_their_own():
    model = Model()
    optimizer = Optimizer(model, lr=1e-2)
    site = optimizer.sites[model.experts]
    assert site.role == "experts" and site.blocks == 3 and site.whole
    before = model.experts.detach().clone()
    model.experts.grad = torch.zeros_like(before)
    model.experts.grad[1] = randn((32, 24), torch.float32, 9)
    optimizer.step()
    moved = [bool((now != then).any()) for now, then in zip(model.experts, before, strict=True)]
    assert moved[1]


@pytest.mark.parametrize(
    "bad", [{"rate": 0.0}, {"width": 2.0}, {"loss": -0.1}, {"options": {"rule": "muno"}}, {"x": 1}]
)
def test_a_table_that_cannot_be_read_says_where(bad):
    with pytest.raises(ValueError, match=r"choice 'm' of role hidden in the table"):
        Table.read({"roles": {"hidden": [{"name": "m", "options": {"rule": "muon"}, **bad}]}})
    with pytest.raises(ValueError, match="role hidden has no choices"):
        Table.read({"roles": {"hidden": []}})
    with pytest.raises(ValueError, match="the table has no role 'hiden'"):
        Table.read({"roles": {"hiden": []}})


def test_the_measured_table_is_whole():
    table = measured()
    assert table.source
    for role in ROLES:
        choices = table.row(role).choices
        assert min(c.loss for c in choices) == 0
        assert len({c.name for c in choices}) == len(choices)
    stateless = Optimizer(Model(), budget=0)
    assert counted(stateless) == 0


def test_rates_multiply_those_of_the_table():
    model = Model()
    plain = {row.parameter: row.rate for row in explain(Optimizer(model)).rows}
    rated = {row.parameter: row.rate for row in explain(Optimizer(model, rates={"table": 3.0})).rows}
    assert {name: rated[name] / plain[name] for name in plain} == {
        name: pytest.approx(3.0 if name == "tokens.weight" else 1.0) for name in plain
    }


def test_weight_decay_is_of_matrices_alone():
    decays = {
        optimizer.sites[p].role: group["weight_decay"]
        for optimizer in [Optimizer(Model(), weight_decay=0.3)]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert {role for role, decay in decays.items() if decay == 0.3} == {"hidden", "convolution", "experts", "head"}
    assert {role for role, decay in decays.items() if decay == 0.0} == {"table", "norm", "bias"}


def test_groups_of_the_user_keep_their_options():
    model = Model()
    few = list(model.named_parameters())
    groups = [{"params": few[:2], "lr": 0.5, "weight_decay": 0.25}, {"params": few[2:]}]
    optimizer = Optimizer(groups, lr=1e-3)
    kept = {name for group in optimizer.param_groups if group["lr"] == 0.5 for name in group["param_names"]}
    assert kept == {name for name, _ in few[:2]}
    assert all(group["weight_decay"] == 0.25 for group in optimizer.param_groups if group["lr"] == 0.5)


def test_parameters_that_join_get_what_is_left():
    model, new = Model(), nn.Parameter(randn((40, 40), torch.float32, 3))
    optimizer = Optimizer(model, budget=counted(Optimizer(model)) + 100)
    for own in (copy.deepcopy(optimizer), optimizer):
        own.add_param_group({"params": [("new", new)]})
        assert chosen(own)["new"].endswith("in the weights")
        with pytest.raises(ValueError, match="duplicate"):
            own.add_param_group({"params": [("new", new)]})
    share = Optimizer(model, budget=0.5)
    share.add_param_group({"params": [("new", new)]})
    assert chosen(share)["new"] == "orthogonalized momentum, 8 bits"


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)], ids=str)
@pytest.mark.parametrize("budget", [None, 0])
def test_parameters_without_entries_are_stepped(shape, budget):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Optimizer([("a.weight", p)], budget=budget)
    p.grad = torch.zeros(shape)
    optimizer.step()


@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.named_parameters()], ids=["model", "named"])
def test_alike_parameters_share_a_group(given):
    """So that they are stepped together: a group each would take several times as long."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(5)))
    optimizer = Optimizer(given(model))
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 5]
