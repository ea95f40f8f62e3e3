"""The host does not wait for the device in a step, of whatever kind it is, but for what is listed here."""

import pytest
import torch
from torch import nn

from comoving import LowRankOptimizer, build, recipes
from comoving.cadence import Growing, Lazy
from comoving.codecs import Int4, Int8, InWeights, RankOne
from comoving.finders import (
    BlockSelection,
    Delayed,
    Exact,
    IncrementalSVD,
    Nystroem,
    Randomized,
    RandomProjection,
    TrainRandomized,
)
from comoving.frames import Blocks, Seeded, SparseModes, Trains
from comoving.ranks import Energy
from comoving.residual import Feedback, Sparse
from comoving.rules import Muon, Shampoo
from comoving.transport import Carry, Keep, Reset
from pretend import DEVICE, OnDevice, Pretend, here, install

STEPS, EVERY = 5, 2
NANS = (0, 3)
"""Skipped: the first step, and one that refreshes some parameters and not others."""

CONVERGED = "torch asks whether it converged"
EIGH = {"refresh: linalg/lapack.py:_eigh": CONVERGED}
SVD = {"refresh: linalg/lapack.py:_svd": CONVERGED}
EIGH_OUTSIDE = {"step: linalg/lapack.py:_eigh": CONVERGED}
LAZY = {"refresh: cadence/lazy.py:_compared": "the host decides when the next refresh is"}
RAISING = {"step: drivers/guard.py:inspect": "one flag, so that nothing changes before it is raised"}
PUT_BACK = {"step: drivers/gradients.py:__exit__": "the seed that the frame is drawn from is on the host"}

OF_RECIPES = {
    "comoving-adamw": EIGH,  # of modes up to 32
    "galore": EIGH, "galore+ef": EIGH, "q-galore": EIGH | LAZY, "loqt": EIGH, "fira": EIGH,
    "ldadam": EIGH, "online-subspace-descent": EIGH,  # the first frame
    "tensorgrad": EIGH, "tensor-galore": EIGH, "tensor-galore+ef": EIGH,
    "nystrom-tucker-adam": EIGH, "streaming-tucker-adam": EIGH,
    "tt-adam": EIGH, "tt-ice-adam": EIGH, "ht-adam": EIGH, "ht-rise-adam": EIGH,
    "snsm": EIGH,
    "coap": SVD,
    "subtrack": EIGH, "grasswalk": EIGH,
    "sumo": EIGH | {"step: linalg/lapack.py:_svd": CONVERGED},
    "shampoo": EIGH_OUTSIDE, "shampoo-tucker": EIGH_OUTSIDE,  # roots
    "soap": EIGH_OUTSIDE, "low-rank-soap": EIGH_OUTSIDE,  # the first bases
}  # fmt: skip
"""Where the host waits in steps of each recipe, and why; nowhere in those of others."""
WHEN_SKIPPING = {"frugal": PUT_BACK, "flora": PUT_BACK, "seeded": PUT_BACK}
"""Beside that with ``on_nonfinite="skip"``."""
OPTIONS = {"q-galore": {"cadence": Lazy(patience=2)}}

PARTS = {
    "warm": {"finder": Exact(sweeps=1, sequential=True, warm=True)},
    "incremental": {"finder": IncrementalSVD()},
    "randomized": {"finder": Randomized()},
    "delayed": {"finder": Delayed()},
    "nystroem": {"finder": Nystroem()},
    "slices": {"finder": Nystroem(columns="slices")},
    "sequential": {"finder": Randomized(sequential=True)},
    "randomized train": {"frame": Trains(), "finder": TrainRandomized()},
    "growing": {"cadence": Growing()},
    "lazy": {"cadence": Lazy(patience=1)},
    "sparse core": {"frame": SparseModes(), "finder": BlockSelection(), "rank": 0.2},
    "seeded": {"frame": Seeded(), "finder": RandomProjection()},
    "carry": {"transport": Carry(), "side": "both", "residual": Feedback()},
    "reset": {"transport": Reset()},
    "newton": {"rule": Shampoo(root="newton", every=3)},
    "polar": {"rule": Muon(method="polar"), "rank": 1.0},
    "codes": {"residual": Feedback(), "codec": Int8(rounding="stochastic"), "moments": Int4(rounding="stochastic"),
              "bases": Int8(rounding="stochastic")},
    "coarse bases": {"bases": Int4(block=256, table="linear")},
    "in weights": {"rule": Muon(), "moments": InWeights(), "rank": 1.0},
    "rank one": {"moments": RankOne(), "transport": Keep()},
    "sparse": {"residual": Sparse(choose="probabilistic", first=False)},
    "adaptive ranks": {"ranks": Energy()},
    "blocks": {"frame": Blocks()},
}  # fmt: skip
OF_PARTS = {
    "warm": EIGH | {"refresh: finders/exact.py:find": "whether the last frame is worth going on from"},
    "incremental": EIGH, "randomized": EIGH, "nystroem": EIGH, "slices": EIGH, "sequential": EIGH,
    "randomized train": EIGH,
    "lazy": LAZY,
    "polar": {"step: linalg/lapack.py:_svd": CONVERGED},
    "adaptive ranks": EIGH | {"refresh: ranks/reading.py:read": "ranks are the host's to choose"},
    "blocks": {"step: engine.py:blocks_of": "which blocks have a gradient"},
}  # fmt: skip
ONCE = {
    "adaptive ranks": {"step: drivers/guard.py:stops": "what has changed its shape cannot be put back on the device"},
    "blocks": {"step: drivers/guard.py:stops": "blocks that open cannot be put back on the device"},
}
"""With ``on_nonfinite="skip"`` likewise."""


@pytest.fixture(autouse=True)
def device(monkeypatch):
    install(monkeypatch)


class Model(nn.Module):
    """A matrix, a complex tensor of three modes, two alike ones that are stacked, and what stays dense."""

    def __init__(self, on=OnDevice):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"wide": (12, 20), "a": (10, 14), "b": (10, 14), "bias": (6,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(on(torch.randn(shape, generator=generator))))
        self.spectral = nn.Parameter(on(torch.randn(9, 8, 10, generator=generator, dtype=torch.complex64)))

    def with_gradients(self, t, bad=False, on=OnDevice):
        for i, p in enumerate(self.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i), dtype=p.dtype)
            if bad:
                g.view(-1)[i] = torch.nan
            p.grad = on(g)


def train(make, on_nonfinite):
    """Where the host waited in some steps, each as often as in the step with most of it."""
    most: dict[str, int] = {}
    with Pretend() as mode:
        model = Model()
        optimizer = make(model, on_nonfinite)
        optimizer.refresh_scope = mode.refresh
        for t in range(STEPS):
            model.with_gradients(t, on_nonfinite == "skip" and t in NANS)
            mode.waits.clear()
            optimizer.step()
            most |= {where: max(most.get(where, 0), mode.waits.count(where)) for where in mode.waits}
    assert all(p.own.isfinite().all() for p in model.parameters())
    if on_nonfinite == "skip":
        assert int(optimizer._guard.skipped.own) == len(NANS)
    return most


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("recipe", [*recipes(), "galore+ef", "tensor-galore+ef"])
def test_steps_of_recipes(recipe, on_nonfinite):
    options = {} if recipes()[recipe.split("+")[0]].full_rank else {"refresh_every": EVERY}
    options |= OPTIONS.get(recipe, {})
    waits = train(lambda model, way: build(recipe, model, 1e-2, on_nonfinite=way, **options), on_nonfinite)
    if on_nonfinite == "raise":
        assert waits[next(iter(RAISING))] == 1
    expected = OF_RECIPES.get(recipe, {}) | (RAISING if on_nonfinite == "raise" else WHEN_SKIPPING.get(recipe, {}))
    assert set(waits) == set(expected)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("part", PARTS)
def test_steps_of_parts(part, on_nonfinite):
    options = {"rank": 0.25, "refresh_every": EVERY} | PARTS[part]
    if part == "blocks":  # of tensors alone

        def make(model, way):
            return LowRankOptimizer([("spectral", model.spectral)], 1e-2, on_nonfinite=way, **options)
    else:

        def make(model, way):
            return LowRankOptimizer(model.named_parameters(), 1e-2, on_nonfinite=way, **options)

    waits = train(make, on_nonfinite)
    skipping = WHEN_SKIPPING.get(part, {}) | ONCE.get(part, {})
    expected = OF_PARTS.get(part, {}) | (RAISING if on_nonfinite == "raise" else skipping)
    assert set(waits) == set(expected)


def test_every_exception_is_of_something():
    assert OF_RECIPES.keys() | OPTIONS.keys() <= {*recipes(), "galore+ef", "tensor-galore+ef"}
    assert OF_PARTS.keys() | ONCE.keys() <= PARTS.keys()
    assert WHEN_SKIPPING.keys() <= {*recipes(), *PARTS}


def test_the_default_waits_for_nothing_where_modes_are_long():
    with Pretend() as mode:
        model = nn.Module()
        model.weight = nn.Parameter(OnDevice(torch.randn(40, 36, generator=torch.Generator().manual_seed(0))))
        optimizer = build("comoving-adamw", model, 1e-2, on_nonfinite="skip")
        for _ in range(6):
            model.weight.grad = torch.randn(40, 36, device=DEVICE)
            optimizer.step()
    assert mode.waits == []


SKIPPED = ["tucker-adam", "q-galore", "apollo", "soap", "shampoo", "shampoo-tucker", "adafactor", "lion", "adamw"]


@pytest.mark.parametrize("recipe", SKIPPED)
def test_a_first_step_that_is_skipped_changes_no_weight_and_no_average(recipe):
    with Pretend():
        model = Model()
        before = {name: p.own.clone() for name, p in model.named_parameters()}
        optimizer = build(recipe, model, 1e-2, on_nonfinite="skip")
        model.with_gradients(0, bad=True)
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p.own, before[name])
            state = optimizer.state[p]
            assert float(state["step"].own) == 0
            averages = [x for n, x in state.items() if n.startswith("moment") and isinstance(x, OnDevice)]
            averages += [state[n] for n in ("exp_avg", "exp_avg_sq") if n in state]
            assert all(x.own.abs().amax() < 1e-30 for x in averages if x.dtype.is_floating_point or x.dtype.is_complex)
        for t in range(1, 4):
            model.with_gradients(t)
            optimizer.step()
    for name, p in model.named_parameters():
        moved = (p.own - before[name]).abs()
        assert 0 < moved.amax() < 0.3


@pytest.mark.parametrize("recipe", ["tucker-adam", "comoving-adamw", "apollo", "muon", "soap", "adamw", "lion"])
def test_steps_are_those_of_the_cpu(recipe):
    on_host = Model(on=lambda x: x)
    other = build(recipe, on_host, 1e-2, on_nonfinite="skip")
    with Pretend():
        model = Model()
        optimizer = build(recipe, model, 1e-2, on_nonfinite="skip")
        for t in range(5):
            model.with_gradients(t, bad=t == 3)
            optimizer.step()
            on_host.with_gradients(t, bad=t == 3, on=lambda x: x)
            other.step()
    if recipe not in {"apollo", "adamw"}:
        assert any(len(batch.rows) == 2 for batch in optimizer.engine.batches)
    for (name, p), q in zip(model.named_parameters(), on_host.parameters(), strict=True):
        apart = (p.own - q.detach()).abs()
        assert apart.mean() < 2e-4, name  # of weights that have moved by some 1e-2


@pytest.mark.parametrize("recipe", ["galore", "tucker-adam", "comoving-adamw", "coap"])
def test_after_a_first_gradient_of_zeros_the_frame_comes_with_the_next_refresh(recipe):
    with Pretend() as mode:
        model = Model()
        optimizer = build(recipe, model, 1e-2, refresh_every=3, on_nonfinite="skip")
        frames = []
        for t in range(5):
            model.with_gradients(t)
            if t == 0:
                for p in model.parameters():
                    p.grad.mul_(0)
            optimizer.step()
            frames.append(optimizer.state[model.wide]["frame.0"].own.clone())
        assert all("_eigh" in where or "_svd" in where for where in mode.waits)
    for u in frames:
        torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1]), rtol=0, atol=1e-5)
    changes = [not torch.equal(a, b) for a, b in zip(frames, frames[1:], strict=False)]
    assert 1 <= sum(changes) <= 2


class Recording(Pretend):
    """Lists the operations on the device, with every number that the host gives them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, OnDevice) for t in types):
            self.operations.append((here(), str(func), numbers((*args, *(kwargs or {}).values()))))
        return super().__torch_dispatch__(func, types, args, kwargs)


def numbers(given):
    if isinstance(given, list | tuple):
        return [numbers(x) for x in given]
    return given if isinstance(given, int | float) else None


BY_THE_STEP = {
    "flora": {"precondition/factored.py:apply": "the decay rate of its means goes by the step"},
    "smmf": {"linalg/entries.py:lerp": "the decay rate of the first moment goes by the step"},
}
"""Which operations of steps between refreshes have other numbers at every step, and why."""


@pytest.mark.parametrize("recipe", recipes())
def test_steps_between_refreshes_are_the_same_operations(recipe):
    with Recording() as mode:
        model = Model()
        options = {} if recipes()[recipe].full_rank else {"refresh_every": 1000}
        optimizer = build(recipe, model, 1e-2, on_nonfinite="skip", **options)
        for t in range(7):  # the last two of them, at which no root is due either
            model.with_gradients(t)
            earlier, mode.operations = mode.operations, []
            optimizer.step()
    pairs = list(zip(earlier, mode.operations, strict=True))
    assert len(pairs) > 100
    assert all(a[:2] == b[:2] for a, b in pairs)
    assert {a[0] for a, b in pairs if a != b} == BY_THE_STEP.get(recipe, {}).keys()


# --------------------------------------------------------------------------------------------------- the device itself


WAITING = {
    "truth": lambda x: bool(x.any()),
    "number": lambda x: float(x.sum()),
    "item": lambda x: x[0, 0].item(),
    "list": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.zeros(3, 2).copy_(x),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "from the host": lambda x: torch.zeros(3, 2).to(x),
    "copy from the host": lambda x: x.copy_(torch.zeros(3, 2)),
    "eigenvalues": lambda x: torch.linalg.eigh(x.mT @ x),
}
FREE = {
    "products": lambda x: (x.mT @ x).add_(1).sum(),
    "number on the host": lambda x: x * torch.tensor(2.0),
    "from the host, not waited for": lambda x: torch.zeros(3, 2).to(x.device, non_blocking=True),
    "choice": lambda x: torch.where(x > 0, x, 0),
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "random": lambda x: torch.rand(3, device=x.device, generator=torch.Generator(x.device)),
    "cholesky": lambda x: torch.linalg.cholesky_ex(x.mT @ x),
}


@pytest.mark.parametrize("read", WAITING)
def test_the_device_notes_what_waits_for_it(read):
    with Pretend() as mode:
        WAITING[read](OnDevice(torch.ones(3, 2)))
    assert mode.waits == ["step: outside"]


@pytest.mark.parametrize("use", FREE)
def test_and_nothing_else(use):
    with Pretend() as mode:
        result = FREE[use](OnDevice(torch.ones(3, 2)))
    assert mode.waits == []
    assert all(x.device == DEVICE for x in (result if isinstance(result, tuple) else [result]))


def test_other_tensors_of_the_host_are_refused():
    x = OnDevice(torch.ones(3, 2))
    for mixed in (
        lambda: x + torch.ones(3, 2),
        lambda: torch.stack([x, torch.ones(3, 2)]),
        lambda: torch.ones(2) @ x.mT,
    ):
        with Pretend(), pytest.raises(AssertionError, match="two devices"):
            mixed()
    with pytest.raises(AssertionError, match="outside"):
        x + 1
