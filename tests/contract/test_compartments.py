"""A part is given the slots that it declares and no others, at every call; what it puts beside them is refused."""

from inspect import signature

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving import state as slots
from comoving.cadence import Growing
from comoving.finders import Exact
from comoving.precondition import Plain
from comoving.residual import Feedback
from comoving.rules import Adam

METHODS = {
    "precondition": ("apply",),
    "finder": ("observe", "find"),
    "cadence": ("due", "refreshed"),
    "transport": ("move", "age"),
    "rule": ("absorb", "direction"),
    "residual": ("renew", "split", "restore", "keep", "write", "error"),
}
GIVEN = {"finder": "memory", "cadence": "slots"}
"""What a part calls its compartment; "state" elsewhere."""
PASSING = {"rule.passing", "held"}
"""Names for what lives within a step only: from absorb to direction, and from keep to write."""
WAITING = {"held.indices": "sparse.indices"}
"""Under which name a slot waits within a step to be chosen anew."""
RECIPES = [*comoving.recipes(), "tucker-adam+ef", "galore+ef"]
SHAPES = [((20, 12), torch.float64), ((12, 10, 9), torch.complex128)]


def declared(kind):
    """The slots of each role, and which of them may be missing."""
    site, group = kind.site, kind.group
    shape, dtype = site.view.shape, site.view.dtype
    moments = slots.rule_slots(site, group)
    found = {"rule": {slot.name for slot in moments}, "precondition": {*group["precondition"].schema(shape, dtype)}}
    found |= {"transport": found["rule"], "finder": set(), "cadence": set(), "residual": set()}
    if site.projected:
        found["finder"] = {*group["finder"].schema(shape, site.ranks, dtype)}
        found["cadence"] = {*group["cadence"].schema()}
        found["residual"] = {*group["residual"].schema(group["codec"], shape, site.core_shape, dtype)}
    return found, {slot.name for slot in moments if slot.kind is slots.Kind.CACHE}


def watched(patch, kind, calls):
    """Look at what every method of every part is given and leaves."""
    known, caches = declared(kind)

    def look(names, role, method, moment):
        own = {WAITING.get(name, name) for name in names} - PASSING
        assert own | (caches & known[role]) == known[role], (role, method, moment)

    for role, methods in METHODS.items():
        part = type(kind.group[role])
        for method in methods:
            original = getattr(part, method)
            place = [*signature(original).parameters].index(GIVEN.get(role, "state"))

            def inside(*args, original=original, place=place, role=role, method=method):
                calls.append((role, method))
                look(args[place], role, method, "before")
                result = original(*args)
                look(args[place], role, method, "after")
                if isinstance(result, dict):
                    look(result, role, method, "returned")
                return result

            patch.setattr(part, method, inside)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=["matrix", "complex"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_part_is_given_its_own_slots(recipe, shape, dtype, monkeypatch):
    """Stacked or alone, with and without a gradient for some, and in a window of two gradients."""
    generator, calls = torch.Generator().manual_seed(0), []
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for _ in range(3)]
    full = comoving.recipes()[recipe.removesuffix("+ef")].full_rank
    optimizer = comoving.build(recipe, params, 1e-2, **({} if full else {"refresh_every": 2}))
    if optimizer.sites[params[0]].plain:
        pytest.skip("torch's own AdamW")
    kind = optimizer.engine.kind(params[0])
    watched(monkeypatch, kind, calls)
    for t in range(6):
        for i, p in enumerate(params):
            p.grad = None if (t, i) == (3, 1) else torch.randn(shape, generator=generator, dtype=dtype)
        optimizer.step()
    for _ in range(2):
        optimizer.absorb(params[0], torch.randn(shape, generator=generator, dtype=dtype))
    optimizer.apply(params[0])
    assert {role for role, _ in calls} == ({*METHODS} if kind.site.projected else {"precondition", "rule", "residual"})


class Stray(Adam):
    def absorb(self, z, state, clock):
        super().absorb(z, state, clock)
        state["stray"] = z.clone()


class Forgotten(Adam):
    """Hands on what it never takes."""

    def absorb(self, z, state, clock):
        super().absorb(z, state, clock)
        state["rule.passing"] = z


class StrayPlain(Plain):
    def apply(self, gradient, state, step, rows=0):
        state["stray"] = gradient
        return gradient


class StrayExact(Exact):
    def observe(self, gradient, memory, rows=0):
        memory["stray"] = gradient.clone()


class StrayGrowing(Growing):
    def refreshed(self, slots, last, new, when):
        return super().refreshed(slots, last, new, when) | {"stray": torch.zeros((), dtype=torch.int64)}


class StrayFeedback(Feedback):
    def keep(self, dense, cores, passage, opening, state, codec):
        state["stray"] = dense.clone()
        return super().keep(dense, cores, passage, opening, state, codec)


STRAYS = {
    "rule": [Stray(), Forgotten()],
    "precondition": [StrayPlain()],
    "finder": [StrayExact()],
    "cadence": [StrayGrowing()],
    "residual": [StrayFeedback()],
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("role", "part"), [(role, part) for role, parts in STRAYS.items() for part in parts], ids=str)
def test_what_a_part_puts_beside_its_slots_is_refused(role, part, rows):
    """By its name, before any weight of the step is written."""
    params = [nn.Parameter(torch.ones(12, 16)) for _ in range(rows)]
    optimizer = LowRankOptimizer(params, 1e-2, 3, refresh_every=1, **{role: part})
    name = "rule.passing" if isinstance(part, Forgotten) else "stray"
    for t in range(2):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        with pytest.raises(RuntimeError, match=rf"{role} .*{name}"):
            optimizer.step()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
