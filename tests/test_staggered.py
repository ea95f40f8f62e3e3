"""Alike parameters whose frames are refreshed alone, each at steps of its own, and stepped together in between."""

import copy

import pytest
import torch
from torch import nn

from comoving import build, state_bytes
from comoving.cadence import Lazy
from comoving.codecs import Full
from comoving.engine import Engine
from comoving.finders import Power, RandomProjection
from comoving.frames import Blocks, Seeded
from comoving.residual import Sparse

COUNT = 5
ALONE = {
    "apollo": {},
    "apollo, drawn": {"frame": Seeded()},
    "apollo-mini": {},
    "flora": {},
    "frugal": {},
    "q-galore": {},
    "q-galore, impatient": {
        "finder": Power(),
        "cadence": Lazy(threshold=0.2, patience=1),
        "moments": Full(),
        "bases": Full(),
    },
    "tensorgrad": {},
    "tensorgrad, drawn": {"residual": Sparse(fraction=0.1, choose="probabilistic", first=False)},
}
"""Recipe -> options over its own."""
EVERY = pytest.mark.parametrize("name", ALONE)


def model(dtype=torch.float64, shapes=((24, 16),) * COUNT):
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes])


def made(name, m, **options):
    return build(name.partition(",")[0], m, 1e-2, **(ALONE[name] | {"refresh_every": 4} | options))


def pair(name, dtype=torch.float64, **options):
    models = model(dtype), model(dtype)
    optimizers = [made(name, m, **options) for m in models]
    optimizers[1].stacked_entries = 0
    return models, optimizers


def give(params, step):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(models, optimizers, steps):
    for step in steps:
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            o.step()


def same(models):
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", [name for name in ALONE if name != "frugal"]
)  # which counts steps from its own refresh
def test_those_that_are_not_due_are_stepped_together(name, monkeypatch):
    stepped, step_of = [], Engine.step

    def noted(self, which, *args):
        stepped.append([row.p for row in which.rows])
        return step_of(self, which, *args)

    monkeypatch.setattr(Engine, "step", noted)
    (m, _), (optimizer, _) = pair(name, refresh_every=20)
    phases = [optimizer.sites[p].phase for p in m]
    assert len({*phases}) == COUNT
    for step in range(12):
        give(m, step)
        stepped.clear()
        optimizer.step()
        alone = {id(params[0]) for params in stepped if len(params) == 1}
        for p, phase in zip(m, phases, strict=True):
            assert (id(p) in alone) == (step in {0, phase})


@EVERY
def test_they_are_stepped_as_if_they_were_alone(name):
    models, optimizers = pair(name)
    for step in range(14):
        run(models, optimizers, [step])
        same(models)
        assert state_bytes(optimizers[0]) == state_bytes(optimizers[1])
    for p, q in zip(*models, strict=True):
        a, b = optimizers[0].state[p], optimizers[1].state[q]
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-9, atol=1e-11)


@EVERY
def test_a_pair_of_which_one_is_due_keeps_no_others_alive(name):
    shapes = ((24, 16),) * 2
    models = model(shapes=shapes), model(shapes=shapes)
    optimizers = [made(name, m) for m in models]
    optimizers[1].stacked_entries = 0
    for step in range(9):
        run(models, optimizers, [step])
        assert state_bytes(optimizers[0]) == state_bytes(optimizers[1])
    same(models)


@EVERY
def test_checkpoints_go_between_those_alone_and_together(name):
    models, optimizers = pair(name)
    run(models, optimizers, range(6))
    states = [copy.deepcopy(o.state_dict()) for o in optimizers]
    for o, state in zip(optimizers, reversed(states), strict=True):
        o.load_state_dict(state)
    run(models, optimizers, range(6, 12))
    same(models)


@EVERY
def test_a_checkpoint_of_another_rank_is_taken_up(name):
    if name == "apollo-mini":
        pytest.skip("of rank 1")
    models, optimizers = pair(name, rank=5)
    run(models, optimizers, range(3))
    state = copy.deepcopy(optimizers[0].state_dict())
    if optimizers[0].param_groups[0]["transport"].resizes:
        narrow = [made(name, m, rank=3) for m in models]
        narrow[1].stacked_entries = 0
        for o in narrow:
            o.load_state_dict(state)
        run(models, narrow, range(3, 9))
        same(models)
    else:
        with pytest.raises(ValueError, match="cannot take moments"):
            made(name, models[0], rank=3).load_state_dict(state)


@EVERY
def test_skipped_steps_of_some(name):
    models = model(), model()
    optimizers = [made(name, m, on_nonfinite="skip") for m in models]
    optimizers[1].stacked_entries = 0
    for step in range(9):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            if step in {3, 6}:
                m[1].grad[0, 0] = torch.nan
            o.step()
    same(models)
    assert [o.skipped_steps for o in optimizers] == [2, 2]


@EVERY
def test_experts_too(name):
    layout = build(name.partition(",")[0], model(), **ALONE[name]).param_groups[0]["frame"]
    models = [nn.ParameterList([nn.Parameter(model()[0].detach().expand(6, -1, -1).clone())]) for _ in range(2)]
    optimizers = [made(name, m, frame=Blocks(0, layout), rank=3) for m in models]
    optimizers[1].stacked_entries = 0
    for step in range(9):
        for m, o in zip(models, optimizers, strict=True):
            give(m, step)
            m[0].grad[step % 6] = 0
            o.step()
    same(models)
    assert optimizers[0].engine.batches
    assert not optimizers[1].engine.batches


def test_a_refresh_that_fails_is_tried_again():
    models, optimizers = pair("apollo")
    run(models, optimizers, range(5))

    def fails(*args, **kwargs):
        raise MemoryError("no more")

    for m in models:
        give(m, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomProjection, "find", fails)
        with pytest.raises(MemoryError, match="no more"):
            optimizers[0].step()
    for o in optimizers:
        o.step()
    same(models)
    run(models, optimizers, range(6, 10))
    same(models)
