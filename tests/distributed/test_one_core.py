"""Frames along the mode that is cut: the core is the sum of what each process's entries give, and all step it alike."""

from math import prod

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

import comoving
from comoving.codecs import Int8, RankOne
from comoving.diagnostics import SLOT, STORED
from comoving.finders import Exact, Oja, Power
from distributed.placed import assert_same, give, made, mesh_of, weights_of, where
from distributed.processes import run

STEADY = {"finder": Power(inertia=0.9), "refresh_every": 3}
MATRICES = {"tall": (24, 10), "twin": (24, 10), "odd": (13, 11), "few": (5, 16)}  # the last in parts of 2, 2, 1, none
TENSORS = {"cube": (10, 9, 8), "same": (10, 9, 8), "four": (9, 8, 5, 6)}
FEW = {"tall": (24, 10), "few": (5, 16), "cube": (10, 9, 8)}
LEFT, BOTH = STEADY | {"side": "left"}, STEADY | {"side": "both", "diagnostics": False}
CASES = {
    # name: (shapes, the mode that is cut, recipe, rank, options, steps, dtype)
    "Tucker": (TENSORS, 0, "tucker-adam", 0.1, STEADY, 14, torch.float64),
    "left": (MATRICES, 0, "tucker-adam", 0.25, LEFT, 14, torch.float64),
    "both": (FEW, 0, "tucker-adam", 0.1, BOTH, 14, torch.float64),
    "comoving-adamw": (FEW, 0, "comoving-adamw", 0.1, {"side": "left", "refresh_every": 3}, 50, torch.float64),
    "complex": ({"tall": (24, 10), "cube": (9, 8, 5)}, 0, "tucker-adam", 0.1, LEFT, 12, torch.complex128),
    "middle mode": (TENSORS, 1, "tucker-adam", 0.1, STEADY, 8, torch.float64),
    "last mode": ({"cube": (10, 9, 8), "five": (8, 9, 5)}, 2, "tucker-adam", (2, 3, 2), STEADY, 8, torch.float64),
    "columns": ({"odd": (11, 13), "few": (16, 5)}, 1, "ldadam", 0.25, {"side": "right"}, 8, torch.float64),
    "Oja": (TENSORS, 0, "tucker-adam", 0.1, STEADY | {"finder": Oja()}, 8, torch.float64),
    "Exact": (MATRICES, 0, "tucker-adam", 0.1, LEFT | {"finder": Exact()}, 8, torch.float64),
    "mean of moments": (MATRICES, 0, "comoving-adamw", 0.25, LEFT | {"moments": RankOne()}, 8, torch.float64),
    "random bits of moments": (
        MATRICES, 0, "comoving-adamw", 0.25, LEFT | {"moments": Int8(rounding="stochastic")}, 8, torch.float64,
    ),
    "large cores": ({"tall": (24, 10), "twin": (24, 10)}, 0, "tucker-adam", 0.3, LEFT, 8, torch.float64),
    "coded frames": (FEW, 0, "comoving-adamw", 0.1, LEFT | {"bases": Int8()}, 8, torch.float64),
}  # fmt: skip


def _stepped(case, places=None, mesh=None):
    shapes, _, recipe, rank, options, steps, dtype = CASES[case]
    params = made(shapes, places, mesh, dtype)
    optimizer = comoving.build(recipe, params.items(), 1e-2, rank=rank, **options)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    figures = {
        name: optimizer.state[p][SLOT].clone() for name, p in params.items() if SLOT in optimizer.state.get(p, {})
    }
    return params, optimizer, figures


def _alike(params, optimizer):
    """What all processes have of the state: everything but the buffer of entries."""
    return {
        (name, slot): x.clone()
        for name, p in params.items()
        if optimizer.sites[p].one_core
        for slot, x in optimizer.state[p].items()
        if isinstance(x, Tensor) and not slot.startswith("feedback.gradients")
    }


MESHES = {
    "2": ([2], [*CASES]),
    "4": ([4], ["Tucker", "comoving-adamw", "large cores"]),
    "2 x 2": ([2, 2], ["left", "columns"]),
}


def _work(rank, which):
    found = {}
    dims, names = MESHES[which]
    mesh = mesh_of(dims)
    for name in names:
        cut = [*[Replicate()] * (len(dims) - 1), Shard(CASES[name][1])]
        params, optimizer, figures = _stepped(name, {"*": cut}, mesh)
        found[name] = weights_of(params), where(optimizer), _alike(params, optimizer), figures
    return found


@pytest.fixture(scope="module")
def alone():
    return {name: _stepped(name) for name in CASES}


@pytest.mark.parametrize("which", MESHES)
def test_processes_that_share_a_core_do_what_one_does(which, alone):
    """Weights and figures; and what they have of cores and frames is bitwise the same.

    A core with more entries than are here of the parameter, 7 x 10 where there are 6 x 10 of 24 x 10, is dealt out.
    """
    dims, names = MESHES[which]
    found = run(prod(dims), _work, which)
    for name in names:
        params, _, figures = alone[name]
        for own in found:
            weights, places, alike, measured = own[name]
            assert {*places.values()} == {"dealt" if name == "large cores" and which == "4" else "shared"}, name
            assert_same(weights, weights_of(params))
            for key, x in measured.items():
                torch.testing.assert_close(x, figures[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key} {STORED}")
            for key, x in found[0][name][2].items():
                assert torch.equal(x, alike[key]), (name, key)
