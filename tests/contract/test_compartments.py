"""No part sees another part's state: given its own slots alone, every recipe does what it does."""

from inspect import signature

import pytest
import torch
from torch import nn

import comoving
from comoving import state as slots

METHODS = {
    "precondition": ("apply",),
    "rule": ("absorb", "direction"),
    "transport": ("move", "age"),
    "residual": ("renew", "split", "restore", "keep", "write", "error"),
}
RECIPES = [*comoving.recipes(), "tucker-adam+ef", "galore+ef"]
SHAPES = [((20, 12), torch.float64), ((12, 10, 9), torch.complex128)]


def declared(optimizer, p):
    """The slots of each role; the transport's stand beside the rule's, which divides by what it carries."""
    site, group = optimizer.sites[p], slots.parts_of(optimizer.sites[p], optimizer.param_groups[0])
    moments = {slot.name for slot in slots.rule_slots(site, group)}
    shape, dtype = site.view.shape, site.view.dtype
    residual = group["residual"].schema(group["codec"], shape, site.core_shape, dtype) if site.projected else {}
    precondition = group["precondition"].schema(shape, dtype)
    return {"rule": moments, "transport": moments, "residual": {*residual}, "precondition": {*precondition}}


def enclosed(patch, optimizer, p):
    """Let every method of every part see its own slots, and what it has put beside them, and nothing else."""
    known, group = declared(optimizer, p), slots.parts_of(optimizer.sites[p], optimizer.param_groups[0])
    for role, methods in METHODS.items():
        for method in methods:
            kind = type(group[role])
            original = getattr(kind, method)
            place = [*signature(original).parameters].index("state")

            def inside(*args, original=original, place=place, own=known[role], others=known):
                state = args[place]
                mine = {name: x for name, x in state.items() if name in own}
                result = original(*args[:place], mine, *args[place + 1 :])
                foreign = {name for names in others.values() if names is not own for name in names} - own
                assert not mine.keys() & foreign
                own.update(mine)
                for name in own & state.keys() - mine.keys():
                    del state[name]
                state.update(mine)
                return result

            patch.setattr(kind, method, inside)


def trained(recipe, shape, dtype, monkeypatch=None):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    model = nn.ParameterList([p])
    options = {} if comoving.recipes()[recipe.removesuffix("+ef")].full_rank else {"refresh_every": 2}
    optimizer = comoving.build(recipe, model, 1e-2, **options)
    if optimizer.sites[p].plain:
        pytest.skip("torch's own AdamW")
    if monkeypatch is not None:
        enclosed(monkeypatch, optimizer, p)
    for _ in range(7):
        p.grad = torch.randn(shape, generator=generator, dtype=dtype)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=["matrix", "complex"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_part_lives_on_its_own_slots(recipe, shape, dtype, monkeypatch):
    expected = trained(recipe, shape, dtype)
    assert torch.equal(trained(recipe, shape, dtype, monkeypatch), expected)


def test_one_that_looks_elsewhere_is_found(monkeypatch):
    original = comoving.residual.Feedback.keep

    def curious(self, dense, core, passage, opening, state, codec):
        state["moment.first"].mul_(0.5)
        return original(self, dense, core, passage, opening, state, codec)

    monkeypatch.setattr(comoving.residual.Feedback, "keep", curious)
    with pytest.raises(KeyError, match=r"moment\.first"):
        trained("tucker-adam", *SHAPES[0], monkeypatch)
