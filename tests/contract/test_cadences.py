"""What every cadence promises, and the intervals of each by its formula."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.cadence import Every, Growing, Lazy, When
from comoving.cadence.base import LONGEST
from comoving.frames import ModeFrame, SparseFrame
from comoving.ranks import Tolerance
from comoving.transport import Carry
from contract.support import CADENCES, COMPLEX, REAL, lone, randn, step

CADENCE = pytest.mark.parametrize("cadence", CADENCES, ids=str)


def fresh(cadence):
    return {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in cadence.schema().items()}


def refreshes(cadence, every, phase, steps, pairs=()):
    """When frames are refreshed, as the engine asks; ``pairs`` of a last and a new frame for each but the first."""
    slots, made, pairs = fresh(cadence), [], iter(pairs)
    for t in range(steps):
        when = When(t, every, phase)
        if t == 0 or cadence.due(slots, when):
            last, new = next(pairs, (None, SAME[1])) if t else (None, SAME[1])
            slots = cadence.refreshed(slots, last, new, when)
            made.append(t)
    return made


def turned(cosine, dtype=REAL, phase=1.0, other=1.0):
    """Two frames whose leading directions have these cosines, of mode 0 and of mode 1."""
    frames = []
    for c, d in ((cosine, 6), (other, 5)):
        u = torch.linalg.qr(randn((d, 3), dtype, d)).Q
        v = u.clone()
        v[:, 0] = phase * (c * u[:, 0] + math.sqrt(1 - c * c) * u[:, 2])
        v[:, 2] = c * u[:, 2] - math.sqrt(1 - c * c) * u[:, 0]
        frames.append((u, v))
    (u0, v0), (u1, v1) = frames
    return ModeFrame((u0, u1, None)), ModeFrame((v0, v1, None))


SAME = turned(1.0)


# ------------------------------------------------------------------------------------------------------- all of them


@CADENCE
def test_slots_are_what_was_declared_and_replaced_instead_of_changed(cadence):
    slots, (last, new) = fresh(cadence), turned(0.9)
    for t in range(12):
        before = {name: x.clone() for name, x in slots.items()}
        cadence.due(slots, When(t, 2, 1))
        after = cadence.refreshed(slots, last if t else None, new, When(t, 2, 1))
        assert all(torch.equal(x, before[name]) for name, x in slots.items())
        schema = cadence.schema()
        assert {name: (tuple(x.shape), x.dtype) for name, x in after.items()} == {
            name: (spec.shape, spec.dtype) for name, spec in schema.items()
        }
        slots = after


@CADENCE
@pytest.mark.parametrize(("every", "phase"), [(1, 0), (4, 0), (4, 3), (4, 6)])
def test_the_second_refresh_keeps_to_the_phase(cadence, every, phase):
    assert refreshes(cadence, every, phase, 9)[:2] == [0, phase % every or every]


@CADENCE
def test_rows_are_due_when_any_of_them_is(cadence):
    own = {name for name, spec in cadence.schema().items() if spec.own or not spec.scalar}
    rows = [cadence.refreshed(fresh(cadence), None, turned(1.0)[1], When(t, 4, 0)) for t in (5, 2, 9)]
    if not cadence.alone:  # then the host steps those of other counts apart
        rows = rows[:1] * 3
    together = {name: torch.stack([row[name] for row in rows]) if name in own else rows[0][name] for name in rows[0]}
    for t in range(1, 30):
        when = When(t, 4, 0)
        assert cadence.due(together, when) == any(cadence.due(row, when) for row in rows)


@CADENCE
def test_a_batch_is_refreshed_as_its_members_are(cadence):
    """Alike parameters at the same steps, and with the same numbers, stacked or not."""

    def trained(entries):
        params = [nn.Parameter(randn((12, 10), REAL, i)) for i in range(3)]
        optimizer = LowRankOptimizer(params, 1e-2, 3, cadence=cadence, refresh_every=2)
        optimizer.stacked_entries = entries
        series, count = [], []
        optimizer.refresh_scope = lambda: count.append(0) or torch.no_grad()
        for t in range(20):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, REAL, 100 * i + t // 6)  # the same for some steps, so that frames settle
            optimizer.step()
            series.append([optimizer.state[p]["frame.1"].clone() for p in params])
        return params, series, len(optimizer.engine.batches), len(count)

    params, frames, batches, _ = trained(2**16)
    alone, expected, none, times = trained(0)
    assert (batches, none) == (1, 0) and 3 * 3 <= times <= 3 * 20
    torch.testing.assert_close(params, alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(frames, expected, rtol=1e-7, atol=1e-7)


@CADENCE
def test_it_goes_with_ranks_that_change(cadence):
    p, optimizer = lone(
        randn((16, 20), REAL), rank=8, cadence=cadence, refresh_every=1, ranks=Tolerance(step=1), transport=Carry()
    )
    ranks = set()
    for t in range(12):
        step(optimizer, p, randn((16, 2), REAL, t) @ randn((2, 20), REAL, 50 + t) + 0.1 * randn((16, 20), REAL, t))
        ranks.add(optimizer.state[p]["frame.0"].shape[1])
    assert len(ranks) > 1 and p.isfinite().all()


@dataclass(frozen=True)
class Watching(Growing):
    """Remembers, beside itself, what it was asked with."""

    seen = []  # noqa: RUF012

    def due(self, slots, when):
        self.seen.append((set(slots), None, None, when))
        return super().due(slots, when)

    def refreshed(self, slots, last, new, when):
        self.seen.append((set(slots), last, new, when))
        return super().refreshed(slots, last, new, when)


def test_the_engine_hands_it_its_own_slots_the_frames_and_the_step():
    Watching.seen.clear()
    p, optimizer = lone(randn((12, 16), torch.float32), rank=3, cadence=Watching(), refresh_every=3)
    for t in range(4):
        before = optimizer.state[p].get("frame.0")
        before = None if before is None else before.clone()
        step(optimizer, p, randn((12, 16), torch.float32, t))
    first, *asked, third = Watching.seen
    assert first[1] is None and [when.tick for *_, when in Watching.seen] == [0, 1, 2, 3, 3]
    assert all(names == {"refreshes", "next"} and when[1:] == (3, 0) for names, *_, when in Watching.seen)
    assert [new for _, _, new, _ in asked] == [None] * 3
    assert torch.equal(third[1].factors[0], before)
    assert torch.equal(third[2].factors[0], optimizer.state[p]["frame.0"])


def test_a_first_gradient_of_zeros_is_looked_at_again_at_the_next_step():
    for cadence in CADENCES:
        p, optimizer = lone(randn((12, 16), REAL), rank=3, cadence=cadence, refresh_every=5)
        count = []
        optimizer.refresh_scope = lambda count=count: count.append(0) or torch.no_grad()
        for t in range(4):
            step(optimizer, p, randn((12, 16), REAL, t) * (t > 1))
        assert len(count) == 3


# ------------------------------------------------------------------------------------------------------- the formulas


def test_every_is_due_at_its_phase_and_follows_an_edited_period():
    assert refreshes(Every(), 3, 2, 12) == [0, 2, 5, 8, 11]
    assert [t for t in range(1, 20) if Every().due({}, When(t, 7, 9))] == [2, 9, 16]


@pytest.mark.parametrize("base", [1.0, 1.2, 1.7, 3.0])
def test_growing_intervals(base):
    made = refreshes(Growing(base), 3, 2, 400)
    assert len(made) > 5 and made[:2] == [0, 2]
    gaps = [b - a for a, b in zip(made[1:], made[2:], strict=False)]
    assert gaps == [3 + math.floor(base**k) for k in range(1, len(gaps) + 1)]


def test_growing_follows_an_edited_period_from_the_next_refresh_on():
    cadence = Growing(1.0)
    slots = cadence.refreshed(fresh(cadence), None, None, When(0, 3, 0))
    assert int(slots["next"]) == 3 and not cadence.due(slots, When(2, 1, 0))
    assert int(cadence.refreshed(slots, None, None, When(3, 10, 0))["next"]) == 3 + 10 + 1


@pytest.mark.parametrize("base", [1.2, 2.0, 1e300])
def test_intervals_that_outgrow_floating_point_are_cut_off(base):
    slots = {"refreshes": torch.tensor(5000), "next": torch.tensor(7)}
    assert int(Growing(base).refreshed(slots, None, None, When(9, 4, 0))["next"]) == 9 + LONGEST
    last, new = turned(1.0)
    slots = {
        "cosines": torch.ones(5),
        "count": torch.tensor(5),
        "lengthened": torch.tensor(5000),
        "next": torch.tensor(7),
    }
    assert int(Lazy().refreshed(slots, last, new, When(9, 4, 0))["next"]) == 9 + LONGEST


COSINES = [0.9, 0.5, 0.8, 0.2, 0.1, 0.9, 0.9]


@pytest.mark.parametrize(
    ("dtype", "phase"), [(REAL, 1.0), (REAL, -1.0), (COMPLEX, 0.6 + 0.8j)], ids=["same sign", "other sign", "complex"]
)
def test_lazy_intervals_by_hand(dtype, phase):
    """Means of two: none, .7, .65, .5, .15, .5, .9 at a threshold of .6, so that j rises by 1, 1, 0, 0, 0, 1."""
    pairs = [turned(c, dtype, phase) for c in COSINES]
    # From refreshes 1, 2, ... on the interval is 4 * 3^j for j = 0, 1, 2, 2, 2, 2, 3.
    expected = [0, 2, 6, 18, 54, 90, 126, 162, 270]
    assert refreshes(Lazy(threshold=0.6, patience=2, growth=3), 4, 2, 271, pairs) == expected


def test_lazy_compares_the_mode_that_has_turned_most():
    cadence = Lazy(threshold=0.5, patience=1)
    for cosines, settled in (((0.9, 0.8), 1), ((0.9, 0.2), 0), ((0.2, 0.9), 0)):
        last, new = turned(cosines[0], other=cosines[1])
        for pair in ((last, new), (SparseFrame(last, None), SparseFrame(new, None))):
            after = cadence.refreshed(fresh(cadence), *pair, When(4, 4, 0))
            assert int(after["lengthened"]) == settled
            assert float(after["cosines"]) == pytest.approx(min(cosines), abs=1e-6)


def test_lazy_compares_nothing_with_a_frame_that_was_drawn():
    cadence = Lazy(threshold=0.0, patience=1)
    after = cadence.refreshed(fresh(cadence), None, turned(1.0)[1], When(4, 4, 0))
    assert (int(after["count"]), int(after["lengthened"]), int(after["next"])) == (0, 0, 8)


def test_parts_are_read_from_text():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 10))
    for text, cadence in (("every", Every()), ("growing(base=2)", Growing(2)), ("lazy(patience=2)", Lazy(patience=2))):
        assert comoving.build("comoving-adamw", model, cadence=text).param_groups[0]["cadence"] == cadence
    with pytest.raises(ValueError, match="muon has full rank: cadence would have nothing to act on"):
        comoving.build("muon", model, cadence="lazy")


def test_one_that_was_saved_under_another_cadence_is_refused():
    p, optimizer = lone(randn((12, 16)), rank=3)
    step(optimizer, p, randn((12, 16)))
    _, other = lone(randn((12, 16)), rank=3, cadence=Growing())
    with pytest.raises(ValueError, match=r"cadence: saved {'part': 'Every'}, here {'part': 'Growing', 'base': 1.2}"):
        other.load_state_dict(optimizer.state_dict())
