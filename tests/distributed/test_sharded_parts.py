"""Every codec and every recipe: on sharded parameters they do what one process does."""

import pytest
import torch
from torch.distributed.tensor import Shard

import comoving
from comoving.codecs import BFloat16, Full, Int4, Int8, InWeights, RankOne
from distributed.placed import STEADY, assert_same, made, mesh_of, stepped, where
from distributed.processes import run

SHAPES = {"tall": (24, 10), "twin": (24, 10), "wide": (10, 24), "odd": (13, 11), "kernel": (10, 9, 8), "bias": (24,)}
CODECS = [
    Full(),
    BFloat16(),
    Int8(),
    Int8(table="dynamic"),
    Int8(rounding="stochastic"),
    Int4(),
    Int4(table="linear"),
    Int4(rounding="stochastic"),
    RankOne(),
]
ROLES = [
    ("comoving-adamw", "moments"),
    ("comoving-adamw", "codec"),
    ("comoving-adamw", "bases"),
    ("ldadam", "moments"),
    ("ldadam", "codec"),
    ("muon", "moments"),
]
FIRST = [("comoving-adamw", "moments"), ("comoving-adamw", "codec"), ("muon", "moments")]
MATRICES = {"tall", "twin", "wide", "odd"}


def _cases(recipe, role):
    options = {} if recipe == "muon" else STEADY
    codecs = [codec for codec in CODECS if role != "bases" or type(codec) is not RankOne]
    return [options | {role: codec} for codec in codecs]


def _codecs(rank, recipe, role):
    found = []
    for options in _cases(recipe, role):
        weights, optimizer = stepped(made(SHAPES, {"*": [Shard(0)]}, mesh_of([2])), recipe, options, 7)
        found.append((weights, where(optimizer), comoving.state_bytes(optimizer)))
    return found


@pytest.mark.parametrize(
    ("recipe", "role"),
    [pytest.param(*own, marks=[] if own in FIRST else pytest.mark.full, id="-".join(own)) for own in ROLES],
)
def test_codecs(recipe, role):
    found = run(2, _codecs, recipe, role)
    for i, options in enumerate(_cases(recipe, role)):
        weights, optimizer = stepped(made(SHAPES), recipe, options, 7)
        for own, places, _ in (process[i] for process in found):
            assert_same(own, weights)
            # Random bits are drawn, and means are taken, over all entries: those have to be in one process.
            crossing = isinstance(options[role], RankOne) or getattr(options[role], "rounding", "") == "stochastic"
            dealt = recipe == "muon" or (crossing and role != "bases")
            assert {places[name] for name in MATRICES} == {"dealt" if dealt else "shared"}, options[role]
        bytes_here, all_bytes = [process[i][2] for process in found], comoving.state_bytes(optimizer)
        assert max(bytes_here) < all_bytes <= sum(bytes_here)


def _embedded(rank):
    params = made(SHAPES, {"*": [Shard(0)]}, mesh_of([2]), torch.float32)
    weights, optimizer = stepped(params, "muon", {"moments": InWeights()}, 7)
    return weights, where(optimizer)


def test_moments_in_the_weights_go_with_them():
    """Whoever steps a matrix gathers its weights, with what is in them, and hands both back."""
    weights, _ = stepped(made(SHAPES, dtype=torch.float32), "muon", {"moments": InWeights()}, 7)
    for own, places in run(2, _embedded):
        assert all(torch.equal(own[name], weights[name]) for name in MATRICES)
        assert {places[name] for name in MATRICES} == {"dealt"}


SHARED = {
    "adamw",
    "comoving-adamw",
    "galore",
    "ldadam",
    "lion",
    "adams",
    "loqt",
    "online-subspace-descent",
    "q-galore",
    "tensor-galore",
    "tucker-adam",
}
"""The recipes whose matrices each process steps for itself; those of all others are dealt out."""


def _recipes(rank, names):
    found = {}
    for name in names:
        params = made(SHAPES, {"*": [Shard(0)]}, mesh_of([2]), torch.float32)
        weights, optimizer = stepped(params, name, _side(name), 5)
        found[name] = weights, where(optimizer)
    return found


def _side(name):
    return {} if comoving.recipes()[name].full_rank else {"side": "right"}


@pytest.mark.parametrize("part", range(4))
def test_every_recipe_in_float32(part):
    names = [*comoving.recipes()][part::4]
    for found in run(2, _recipes, names):
        for name in names:
            weights, _ = stepped(made(SHAPES, dtype=torch.float32), name, _side(name), 5)
            own, places = found[name]
            assert_same(own, weights, 1e-4)
            assert {places[matrix] for matrix in MATRICES} == {"shared" if name in SHARED else "dealt"}, name
            assert places["bias"] == "shared"


def _fifty(rank, name, options):
    return stepped(made(SHAPES, {"*": [Shard(0)]}, mesh_of([2]), torch.float32), name, options, 50)[0]


@pytest.mark.parametrize("name", ["adamw", "tucker-adam", "ldadam", "muon"])
def test_fifty_steps_in_float32(name):
    options = STEADY if name not in {"adamw", "muon"} else {}
    weights, _ = stepped(made(SHAPES, dtype=torch.float32), name, options, 50)
    for own in run(2, _fifty, name, options):
        assert_same(own, weights, 1e-4)
