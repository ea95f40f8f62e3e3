"""Parameters on meshes of one and two dimensions, cut evenly or not: stepped as by one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import comoving
from distributed.placed import STEADY, assert_same, built, give, here, made, mesh_of, stepped, weights_of, where, whole
from distributed.processes import run

SHAPES = {
    "tall": (24, 10),
    "twin": (24, 10),
    "wide": (10, 24),
    "odd": (13, 11),
    "few": (5, 16),  # in four parts: 2, 2, 1 and none
    "kernel": (10, 9, 8),
    "bias": (24,),
    "short": (1,),
}
LONG = {name: shape for name, shape in SHAPES.items() if len(shape) > 1}
ALL = Replicate()
CASES = {
    "rows": ([4], None, {"*": [Shard(0)]}),
    "HSDP": ([2, 2], ("replicas", "shards"), {"*": [ALL, Shard(0)]}),
    "HSDP without names": ([2, 2], None, {"*": [ALL, Shard(0)]}),
    "columns": ([2], None, dict.fromkeys(LONG, [Shard(1)])),
    "both": ([2, 2], ("dp", "tp"), dict.fromkeys(LONG, [Shard(0), Shard(1)])),
    "both without names": ([2, 2], None, dict.fromkeys(LONG, [Shard(0), Shard(1)])),
    "rows twice": ([2, 2], ("dp", "tp"), {"*": [Shard(0), Shard(0)]}),
    "some of each": (
        [2, 2],
        ("dp", "tp"),
        {"tall": [Shard(0), ALL], "twin": [ALL, Shard(0)], "wide": [ALL, Shard(1)], "bias": [ALL, Shard(0)]},
    ),
    "last mode": ([2], None, {"kernel": [Shard(2)]}),
    "replicated": ([2], None, {"*": [ALL]}),
}
RECIPES = {"comoving-adamw": STEADY, "muon": {}, "adamw": {}}
# What is dealt out rather than stepped by each process for itself, of comoving's, muon's and adamw's.
DEALT = {
    "rows": (set(), {*LONG}, set()),
    "columns": ({*LONG}, {*LONG}, set()),  # whose blocks of codes cross the cut
    "both": ({*LONG}, {*LONG}, {*LONG}),
    "rows twice": (set(), {*LONG}, set()),
}


def _placed(rank, dims, names, places):
    found = {}
    for recipe, options in RECIPES.items():
        params = made(SHAPES, places, mesh_of(dims, names))
        weights, optimizer = stepped(params, recipe, options, 5)
        state = optimizer.state_dict()
        again = built(params, recipe, options)
        again.load_state_dict(state)
        give(params, 5)
        again.step()
        found[recipe] = weights_of(params), where(optimizer)
    return found


@pytest.mark.parametrize("case", CASES)
def test_placements(case):
    """The sixth step is made by an optimizer that has loaded the state of the first."""
    dims, names, places = CASES[case]
    results = run(torch.tensor(dims).prod().item(), _placed, dims, names, places)
    for i, (recipe, options) in enumerate(RECIPES.items()):
        weights, _ = stepped(made(SHAPES), recipe, options, 6)
        for result in results:
            own, places = result[recipe]
            assert_same(own, weights)
            if case in DEALT:
                assert {name for name, how in places.items() if how == "dealt"} == DEALT[case][i]


# ------------------------------------------------------------------------------------------------------- whole models


class Block(nn.Module):
    """Two layers and a norm."""

    def __init__(self, d, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d, dtype=dtype), nn.Linear(2 * d, d, dtype=dtype)
        self.norm = nn.LayerNorm(d, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """A language model of which head and embedding are one."""

    def __init__(self, dtype, d=16, words=30):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(words, d, dtype=dtype)
        self.blocks = nn.ModuleList(Block(d, dtype) for _ in range(2))
        self.head = nn.Linear(d, words, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _sharded(model, how):
    mesh, policy = None, {}
    if how == "HSDP":
        mesh = mesh_of([2, 2], ("replicas", "shards"))
    if how == "bf16":
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how in {"TP", "FSDP+TP"}:
        both = mesh_of([1, 2] if how == "TP" else [2, 2], ("dp", "tp"))
        mesh = both["dp"]
        for block in model.blocks:
            parallelize_module(block, both["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if how != "TP":
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh, **policy)
    return model


def _trained(recipe, options, how=None, dtype=torch.float64, steps=8):
    model = Model(dtype)
    model = model if how is None else _sharded(model, how)
    optimizer = comoving.build(recipe, model, 1e-2, rank=0.25, **options)
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 30, (8, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scores = whole(model(tokens[:, :-1])).to(torch.promote_types(dtype, torch.float32))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return losses, weights, where(optimizer)


def _model(rank, *args):
    return _trained(*args)


@pytest.mark.parametrize(("how", "count"), [("FSDP", 2), ("HSDP", 4), ("TP", 2), ("FSDP+TP", 4)])
@pytest.mark.parametrize("recipe", ["comoving-adamw", "muon"])
def test_models(recipe, how, count):
    losses, weights, _ = _trained(recipe, RECIPES[recipe])
    for found, own, places in run(count, _model, recipe, RECIPES[recipe], how):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-9, atol=1e-9)
        assert_same(own, weights)
        assert places["embedding.weight"] == ("whole" if how == "TP" else "shared") and "head.weight" not in places
        if recipe == "comoving-adamw":
            assert places["blocks.0.up.weight"] == "shared"
            assert places["blocks.0.down.weight"] == ("dealt" if "TP" in how else "shared")


@pytest.mark.parametrize("recipe", ["comoving-adamw", "muon"])
def test_mixed_precision(recipe):
    for losses, weights, _ in run(2, _model, recipe, RECIPES[recipe], "bf16", torch.float32, 16):
        assert all(x.dtype == torch.float32 for x in weights.values())
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("recipe", ["comoving-adamw", "muon"])
def test_stochastic_rounding(recipe):
    options = RECIPES[recipe] | {"rounding": "stochastic"}
    alone, _, _ = _trained(recipe, options, None, torch.bfloat16, 16)
    for losses, _, _ in run(2, _model, recipe, options, "FSDP", torch.bfloat16, 16):
        assert losses[-1] < 0.8 * losses[0] and abs(losses[-1] - alone[-1]) < 0.2 * (alone[0] - alone[-1])


def _rounded(rank):
    params = made({"a": (16, 8)}, {"*": [Shard(0)]}, mesh_of([2]), torch.bfloat16)
    return stepped(params, "muon", {"rounding": "stochastic"})[0]


def test_the_owner_of_a_parameter_rounds_as_one_process_does():
    weights, _ = stepped(made({"a": (16, 8)}, dtype=torch.bfloat16), "muon", {"rounding": "stochastic"})
    for own in run(2, _rounded):
        assert torch.equal(own["a"], weights["a"])


# ------------------------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """Weights of six experts in one tensor each."""

    def __init__(self, dim=None):
        super().__init__()
        params = made({"up": (6, 12, 8), "down": (6, 8, 12)}, dim and {"*": [dim]}, dim and mesh_of([2]))
        self.up, self.down = params["up"], params["down"]


def _stepped_experts(dim):
    model, busy = Experts(dim), [{0, 1, 2}, {3}, {2, 4, 5}, {0}, {1, 5}, {3, 4}]
    options = STEADY | {"side": "auto", "lr": 1e-2, "moments": comoving.codecs.Full()}
    options.pop("refresh_every")
    optimizer = comoving.LowRankOptimizer(
        comoving.param_groups(model, rank=0.25, experts=["*"]), refresh_every=3, **options
    )
    params = dict(model.named_parameters())
    for step, own in enumerate(busy):
        give(params, step)
        for p in params.values():
            idle = torch.tensor([e not in own for e in range(6)])
            g = here(p.grad)
            rank = 0 if dim is None else torch.distributed.get_rank()
            if dim == Shard(0):
                idle = idle[3 * rank : 3 * rank + 3]
            g[idle] = 0
        optimizer.step()
    keys = {name.split(".")[0] for p in params.values() for name in optimizer.state[p]}
    return weights_of(params), where(optimizer), keys, sorted(optimizer.state_dict()["state"][0])


def _experts(rank, dim):
    return _stepped_experts(dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts(dim):
    """Cut along their own mode each process steps its own, which may all be idle; else they are dealt out."""
    weights, _, keys, saved = _stepped_experts(None)
    found = run(2, _experts, Shard(dim))
    for own, places, *_ in found:
        assert_same(own, weights)
        assert {*places.values()} == {"shared" if dim == 0 else "dealt"}
    if dim == 0:
        assert [own for _, _, own, _ in found] == [{"0", "1", "2"}, {"3", "4", "5"}]
        assert set.union(*(own for _, _, own, _ in found)) == keys
