"""A part of one's own in every role: one class each, nothing registered, trained, copied and resumed."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.cadence.base import on_host
from comoving.codecs import Spec
from comoving.finders import Operand
from comoving.frames import ModeFrame, Modes
from comoving.linalg import norm
from comoving.residual.base import Inside
from comoving.slots import Kind, Slot


@dataclass(frozen=True)
class SignMomentum:
    """m <- b1 m + (1 - b1) z,  d = sign(m)."""

    momentum = "moment.first"
    batched = linear = definite = elementwise = timeless = replays = replaces = True
    corrected = total = False

    def slots(self, shape):
        return (Slot("moment.first", Kind.LINEAR),)

    def recursion(self, clock):
        return clock.beta1, 1 - clock.beta1

    def absorb(self, z, state, clock):
        state["moment.first"] = state["moment.first"].lerp(z, 1 - clock.beta1)

    def direction(self, state, clock, eps):
        return state["moment.first"].sgn()


@dataclass(frozen=True)
class Coordinates:
    """The first coordinates of each mode, for ever."""

    batched = True
    alone = False
    joint = True
    ahead = 0
    fills = (ModeFrame,)
    inertia = 0.0

    def schema(self, shape, ranks, dtype):
        return {}

    def observe(self, gradient, memory, rows=0):
        pass

    def find(self, operand, start, warm, memory):
        eyes = [None if u is None else torch.eye(*u.shape[-2:], dtype=u.dtype).expand_as(u) for u in start.factors]
        return ModeFrame(tuple(None if u is None else u.clone() for u in eyes))


@dataclass(frozen=True)
class Seldom:
    """Every other time that a refresh would be due."""

    batched = True
    alone = False
    compares = ()

    def schema(self):
        return {"last": Spec((), torch.int64, scalar=True)}

    def due(self, slots, when):
        return when.tick - int(slots["last"]) >= 2 * when.every

    def refreshed(self, slots, last, new, when):
        return {"last": on_host(when.tick)}


@dataclass(frozen=True)
class Shorter(Modes):
    """Modes, of which only the first is ever compressed."""

    def ranks(self, shape, rank, side="auto"):
        found = super().ranks(shape, rank, side)
        return (found[0], *[None] * (len(shape) - 1))


@dataclass(frozen=True)
class Halved:
    """Linear moments lose half of themselves with every frame; others start again."""

    batched = resizes = True
    projects = restarts = False

    def slots(self, rule):
        return ()

    def age(self, state, rule, clock):
        pass

    def adopt(self, state, rule, clock):
        pass

    def move(self, state, rule, overlap, clock):
        moved = {}
        for slot in rule:
            x = state[slot.name]
            half = overlap.move(x) * 0.5 if slot.kind is Kind.LINEAR else overlap.move_squares(x)
            moved[slot.name] = half
        return moved


@dataclass(frozen=True)
class Tenth(Inside):
    """A tenth of what the frame loses is kept for the next step."""

    batched = bounded = feeds = True

    def schema(self, codec, shape, core_shape, dtype):
        return {"tenth": Spec(shape, dtype)}

    def restore(self, gradient, passage, opening, state, codec):
        return Operand(gradient + state["tenth"] if opening else gradient, rows=passage.rows)

    def keep(self, dense, cores, passage, opening, state, codec):
        state["tenth"] = (dense - passage.frame.lift(passage.frame.project(dense))) * 0.1
        return norm(state["tenth"], passage.rows)

    def error(self, state, codec, rows=0):
        return torch.zeros(())


@dataclass(frozen=True)
class Clipped:
    """Entries at most 1."""

    batched = replays = True

    def schema(self, shape, dtype):
        return {}

    def apply(self, gradient, state, step, rows=0):
        return gradient.clamp(-1, 1)


@dataclass(frozen=True)
class Half:
    """bfloat16, by hand."""

    batched = signed = True

    @property
    def positive(self):
        return self

    def schema(self, shape, dtype):
        return {"half": Spec(shape, torch.bfloat16)}

    def decode(self, stored, shape, dtype):
        return stored["half"].to(dtype)

    def decode_onto(self, x, stored):
        return x + stored["half"].to(x.dtype)

    def encode(self, x, stored, rows=0):
        stored["half"].copy_(x)
        return norm(x, rows)

    def scaled(self, stored, factor):
        return {"half": stored["half"] * factor}

    def error(self, stored, rows=0):
        return norm(stored["half"], rows) * 2**-8


PARTS = {
    "rule": SignMomentum(),
    "finder": Coordinates(),
    "cadence": Seldom(),
    "frame": Shorter(),
    "transport": Halved(),
    "residual": Tenth(),
    "precondition": Clipped(),
    "codec": Half(),
    "moments": Half(),
}


def trained(options, entries, steps=6):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in [(16, 24)] * 3 + [(12, 10, 9)]]
    given = {"residual": comoving.residual.Feedback()} if "codec" in options else {}
    optimizer = LowRankOptimizer(params, 1e-2, 4, refresh_every=2, **given, **options)
    optimizer.stacked_entries = entries
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("role", PARTS)
def test_a_part_of_ones_own_needs_one_class(role):
    options = {role: PARTS[role]}
    params, optimizer = trained(options, 2**16)
    alone, _ = trained(options, 0)
    usual, _ = trained({}, 2**16)
    assert len(optimizer.engine.batches) == 1
    for p, q in zip(params, alone, strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(p, q) for p, q in zip(params, usual, strict=True))


def test_the_rule_of_the_page_is_that_of_this_test():
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"dataclass": dataclass, "Slot": Slot, "Kind": Kind, "comoving": comoving, "model": nn.Linear(32, 24)}
    exec(code, names)
    rule = names["SignMomentum"]()
    assert {k: v for k, v in vars(SignMomentum).items() if isinstance(v, bool | str) and k[0] != "_"} == {
        k: v for k, v in vars(type(rule)).items() if isinstance(v, bool | str) and k[0] != "_"
    }
