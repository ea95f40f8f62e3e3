"""The table of what is projected, and why."""

import copy

import pytest
import torch
from torch import nn

from comoving import AdamW, LowRankOptimizer, build, explain, param_groups, recipes, state_bytes
from comoving.codecs import Int8
from comoving.composition import measured


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 40)
        self.spectral = nn.Parameter(torch.randn(12, 12, 9, dtype=torch.complex64))
        self.pairs = nn.Parameter(torch.randn(16, 24, 2))
        self.conv = nn.Conv2d(16, 24, 3)
        self.norm = nn.LayerNorm(16)
        self.temperature = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(16, 24).requires_grad_(False)


def test_each_parameter_has_a_line_with_shape_rank_bytes_and_reason():
    model = Net()
    table = explain(model, rank=4)
    text = str(table)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip() and not line.startswith("-")}
    assert lines.keys() - {"parameter", "total"} == dict(model.named_parameters()).keys()
    assert "16" in lines["body.weight"] and "40x16" in lines["body.weight"] and "- x 4" in lines["body.weight"]
    assert lines["tokens.weight"].endswith("embedding") and "dense" in lines["tokens.weight"]
    assert lines["norm.weight"].endswith("norm") and lines["body.bias"].endswith("bias")
    assert lines["frozen.weight"].endswith("frozen")
    assert "scalar" in lines["temperature"] and lines["temperature"].endswith("fewer than two modes")
    assert "4 x 4 x 4" in lines["spectral"] and lines["spectral"].endswith("projected")
    for row in table.rows:
        assert f"{row.bytes:,}" in lines[row.parameter] and lines[row.parameter].endswith(row.why)
    assert f"{table.state_bytes:,}" in lines["total"] and "4 projected" in lines["total"]
    assert sum(row.projected for row in table.rows) == 4


def test_the_columns_line_up():
    rows = str(explain(Net(), rank=4)).splitlines()
    column = rows[0].index("why")
    for row in explain(Net(), rank=4).rows:
        line = next(r for r in rows if r.split()[0] == row.parameter)
        assert line[column:] == row.why and line[column - 2 : column] == "  "


def test_a_model_is_explained_as_the_default_optimizer_would_treat_it():
    model = Net()
    table = explain(model, rank=0.25)
    optimizer = build("comoving-adamw", model, rank=0.25)
    explained = {row.parameter: row for row in table.rows if row.why != "frozen"}
    assert explained == {row.parameter: row for row in explain(optimizer).rows}
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    assert table.state_bytes == state_bytes(optimizer)
    assert explain(model, rank=2).state_bytes < table.state_bytes


def test_a_model_is_not_touched():
    model = Net()
    model.body.weight.grad = torch.randn(40, 16)
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    attributes = [set(vars(m)) for m in model.modules()]
    identity = [id(p) for p in model.parameters()]
    rng = torch.get_rng_state()
    grads = [p.requires_grad for p in model.parameters()]
    explain(model)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions and [id(p) for p in model.parameters()] == identity
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.body.weight.grad is not None and model.conv.weight.grad is None
    assert not any(h for m in model.modules() for h in (m._forward_hooks, m._backward_hooks, m._forward_pre_hooks))
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_optimizer_is_not_touched():
    model = Net()
    optimizer = build("comoving-adamw", model)
    explain(optimizer)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("recipe", recipes())
def test_views_and_reasons_of_each_recipe(recipe):
    rows = {row.parameter: row for row in explain(build(recipe, Net(), rank=4)).rows}
    assert rows["tokens.weight"].view == ("tensor" if recipe in {"comoving", "scale"} else "torch")
    assert rows["body.weight"].projected is not recipes()[recipe].full_rank
    why = "rank 1.0" if recipes()[recipe].full_rank else "projected"
    assert rows["body.weight"].why == (measured().row("hidden").choices[-1].name if recipe == "comoving" else why)
    assert rows["spectral"].view == recipes()[recipe].options.get("view", "tensor")


def test_views_change_what_a_tensor_is_seen_as():
    model = Net()

    def row(view):
        (only,) = explain(AdamW([("p", model.pairs if view == "pairs" else model.conv.weight)], rank=4, view=view)).rows
        return only

    assert row("tensor").ranks == (4, 4, None, None) and row("tensor").view == "tensor"
    assert row("matrix").ranks == (4, None) and row("matrix").view == "matrix"
    assert row("pairs").ranks == (4, None) and row("pairs").view == "pairs"


def test_parameters_without_names_are_numbered():
    rows = explain(LowRankOptimizer([nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.zeros(7))], rank=4)).rows
    assert [row.parameter for row in rows] == ["parameter 0", "parameter 1"]
    assert [row.projected for row in rows] == [True, False]


def test_whole_frames_are_told_from_dense_parameters():
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    optimizer = LowRankOptimizer(param_groups(model, rank=1.0), moments=Int8())
    rows = {row.parameter: row for row in explain(optimizer).rows}
    assert rows["0.weight"].whole
    assert not rows["0.weight"].projected
    assert not rows["0.bias"].whole
    lines = {line.split()[0]: line for line in str(explain(optimizer)).splitlines()[2:-2]}
    assert " whole " in lines["0.weight"]
    assert " dense " in lines["0.bias"]
