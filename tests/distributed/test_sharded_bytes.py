"""What each process holds of sharded parameters, and what it sends in a step."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

import comoving
from distributed.placed import STEADY, built, give, made, mesh_of
from distributed.processes import run

WIDTH, INNER, LAYERS = 64, 176, 4
LLAMA = {
    f"layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in (
        *((name, (WIDTH, WIDTH)) for name in ("q", "k", "v", "o")),
        ("gate", (INNER, WIDTH)),
        ("up", (INNER, WIDTH)),
        ("down", (WIDTH, INNER)),
    )
}


def _moments(optimizer):
    """Bytes of all that is no frame, no figure and no count."""
    total = 0
    for state in optimizer.state.values():
        own = {name: x for name, x in state.items() if isinstance(x, torch.Tensor) and x.ndim and x.numel() > 8}
        total += sum(x.numel() * x.element_size() for name, x in own.items() if not name.startswith("frame"))
    return total


def _held(params, recipe):
    options = {} if comoving.recipes()[recipe].full_rank else {"side": "right"}
    optimizer = comoving.build(recipe, params.items(), 1e-3, **options | ({"rank": 1 / 8} if options else {}))
    give(params, 0)
    optimizer.step()
    return _moments(optimizer), comoving.state_bytes(optimizer)


def _bytes(rank, recipe):
    return _held(made(LLAMA, {"*": [Shard(0)]}, mesh_of([dist.get_world_size()]), torch.float32), recipe)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("recipe", ["adamw", "galore", "comoving-adamw", "muon"])
def test_each_process_holds_its_share_of_the_moments(recipe, count):
    moments, state = _held(made(LLAMA, dtype=torch.float32), recipe)
    found = run(count, _bytes, recipe)
    assert sum(own for own, _ in found) == moments
    for own, all_here in found:
        assert abs(own * count / moments - 1) < 0.02
        assert all_here < state


def _sent(rank, recipe, count, options):
    shapes = {f"m{i}": (16, 8) for i in range(count)}
    params = made(shapes, {"*": [Shard(0)]}, mesh_of([2]))
    optimizer = built(params, recipe, options)
    traffic = {
        id(comm): comm.traffic
        for spread in optimizer.roster.placements.values()
        for comm in (spread.comm, spread.comm_of_all)
    }
    found = []
    for step in range(8):
        calls, sent = (sum(t.calls for t in traffic.values()), sum(t.bytes for t in traffic.values()))
        give(params, step)
        optimizer.step()
        found.append((sum(t.calls for t in traffic.values()) - calls, sum(t.bytes for t in traffic.values()) - sent))
    return found


@pytest.mark.parametrize("recipe", ["adamw", "galore", "comoving-adamw"])
def test_between_refreshes_little_is_sent(recipe):
    """A flag for all gradients, and the figures of a batch: two calls however many matrices are in it."""
    options = {} if recipe == "adamw" else STEADY | {"refresh_every": 4}
    few, many = (run(2, _sent, recipe, count, options)[0] for count in (2, 24))
    least, most = min(few), min(many)
    assert most[0] == least[0] <= (1 if recipe == "adamw" else 3)
    assert most[1] <= 24 * 8 * 12 + 4
    if recipe != "adamw":
        assert max(many) > most


def test_between_refreshes_a_shared_core_is_sent_once():
    """16 x 8 at rank 4: 4 x 8 numbers a matrix, in one sum for all of them; figures in four more, or none."""
    for diagnostics, calls in ((True, 6), (False, 2)):
        options = STEADY | {"refresh_every": 4, "side": "left", "diagnostics": diagnostics}
        least = min(run(2, _sent, "comoving-adamw", 24, options)[0])
        assert least[0] == calls
        assert 24 * 32 * 8 <= least[1] <= 24 * (32 + diagnostics * 12) * 8 + 4
