"""The seven steps, on a unit: one parameter or block, or rows of alike ones stacked.

1. The gradient is seen as it is best seen (:mod:`comoving.views`), and preconditioned.
2. What the residual kept is added.
3. When a refresh is due, a new frame is found and the moments are carried over to it.
4. The gradient is projected, and the residual keeps what is lost.
5. The rule turns the core into a direction.
6. The direction is lifted; the residual adds what it wants from outside the frame.
7. The weights decay, and the update is written to them.

:func:`absorb` makes steps 1-4, :func:`apply` steps 5-7. Neither changes a tensor of the state that it is given: both
work on a copy of its dict, which takes the state's place at the end.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from . import bases, diagnostics
from . import state as slots
from .cadence import When
from .finders import Memory, Operand
from .frames import Frame, ModeFrame, Modes
from .groups import update_scale
from .linalg import asks_host, norm
from .residual import Passage, Update
from .rules import Rule
from .rules.base import averaged
from .rules.turn import Turn, turned
from .sites import Site
from .transport import Clock


class Unit(NamedTuple):
    """What is stepped as one: a parameter, or one block of it, or several alike ones stacked.

    Args:
        site: what was decided about it, or about the first of several.
        group: its hyper-parameters.
        state: its tensors by name. Those of several have a leading dimension, a row each, but for what is known to the
            host and the same for all: "tick", "step" and the integers of finder and cadence.
        rows: how many leading dimensions count rows: 0, or 1 for several.
    """

    site: Site
    group: Mapping[str, Any]
    state: dict[str, Any]
    rows: int = 0

    def frame(self) -> Frame:
        """The frame in the state; the whole one of a dense parameter."""
        view = self.site.view
        if not self.site.projected:
            return ModeFrame((None,) * len(view.shape))
        return bases.load(self.group, self.state, view.shape, view.dtype, self.state.get(self.group["rule"].momentum))

    def clock(self) -> Clock:
        """Where its averages stand."""
        beta1, beta2 = self.group["betas"]
        return Clock(self.state["step"], beta1, beta2, self.state["tick"], self.rows)

    def standing(self) -> Passage:
        """The passage of a momentum whose frame stays as it is."""
        frame, rule, state = self.frame(), self.group["rule"], self.state
        decay, intake = rule.recursion(self.clock())
        momentum: Any = state.get(rule.momentum)
        older = frame if rule.momentum in state else None
        return Passage(frame, momentum, decay, intake, older, momentum, tick=state["tick"], rows=self.rows)

    def due(self, frame: Frame | None = None) -> bool:
        """Whether the next gradient brings a new frame; ``frame`` is the one in the state."""
        site = self.site
        # A loaded checkpoint of other ranks does not fit: it is carried over at once.
        if not site.projected or (self.frame() if frame is None else frame).ranks != site.ranks:
            return site.projected
        return self.scheduled()

    def scheduled(self) -> bool:
        """Whether a refresh is scheduled for this step; of rows, whether one is for any."""
        if self.state["tick"] <= 0:
            return True
        cadence = self.group["cadence"]
        own = {name: self.state[slots.CADENCE + name] for name in cadence.parts()}  # faster than a search for them
        return cadence.due(own, self.when())

    def when(self) -> When:
        """This step, as the cadence is asked about it."""
        return When(max(0, self.state["tick"]), self.group["refresh_every"], self.site.phase)

    def unpacked(self, only: str | None = None) -> "Unit":
        """The unit with a state of its own, in which its moments, or ``only`` one of them, are decoded."""
        return self._replace(state=slots.unpacked(self.site, self.group, self.state, only, self.rows))

    def packed(self, held: Mapping[str, Any], moved: bool = True) -> dict[str, Any]:
        """The state of an unpacked unit as it is stored; moments that have not moved keep the codes that are held."""
        return slots.packed(self.site, self.group, self.state, held, moved, self.rows)


Adapt = Callable[[Unit, Tensor, Memory], tuple[Unit, Frame | None]]
"""Before step 3, of a unit, the gradient and the finder's memory: the unit with the ranks of its new frame, and what is
kept of the old one; None for all of it, as it is."""


@dataclass(frozen=True)
class Now:
    """What the host decided for this step.

    Args:
        seed: the optimizer's, of first frames.
        adapt: chooses ranks.
        scope: the context of a refresh: a timer or profiler range.
        clips: whether a window wants to know the norm of what its gradients have outside the frame.
        turn: step 5 of rules that do without the host's clock; it may be compiled.
    """

    seed: int
    adapt: Adapt
    scope: Callable[[], AbstractContextManager[Any]]
    clips: bool
    turn: Turn


def absorb(unit: Unit, seen: Tensor, size: Tensor | None, now: Now) -> None:
    """Steps 1-4.

    Args:
        unit: whose state is brought up to date at the end.
        seen: the gradient, (*rows, d_1, ..., d_N) in the view's shape and working dtype.
        size: its norm, (*rows), where it is known.
        now: what the host decided.
    """
    site, group, stored = unit.site, unit.group, unit.state
    unit = unit.unpacked(only=group["rule"].momentum if site.projected else "")
    given, seen = seen, group["precondition"].apply(seen, unit.state, unit.state["tick"] + 1, unit.rows)  # 1
    if not site.projected:
        core = stored["core"] + seen if "core" in stored else seen
        slots.commit(stored, unit.state | {"core": core})
        return
    passage, opening = unit.standing(), "core" not in stored
    refreshing = opening and unit.due(passage.frame)
    if refreshing:
        unit = unit.unpacked()
        unit.state["step"] = unit.state["step"].clone()  # transports may set it back
    residual, codec, state = group["residual"], group["codec"], unit.state
    memory = {
        name: x.clone() if refreshing or x.ndim else x for name, x in slots.own_slots(state, slots.MEMORY).items()
    }
    if group["diagnostics"]:
        state[diagnostics.SLOT] = state[diagnostics.SLOT].clone()
    if refreshing:
        residual.renew(seen, state, codec)
    seen = residual.split(seen, state)
    size = size if seen is given else None
    group["finder"].observe(seen, memory, unit.rows)
    restored = residual.restore(seen, passage, opening, state, codec)  # 2
    if refreshing:
        with now.scope():
            restored = restored.measured() if group["diagnostics"] else restored
            unit, kept = now.adapt(unit, seen, memory)
            passage = refresh(unit, restored, memory, kept, now.seed)  # 3
        if site.deferred:
            state[slots.REFRESHED] = True
    state.update(slots.prefixed(memory, slots.MEMORY))
    z = restored.project(passage.frame, passage.overlap) if opening else passage.frame.project(seen)  # 4
    state["core"] = z if opening else state["core"] + z
    turned = refreshing and restored.core is not None  # else |g~|^2 = |z|^2 + |e|^2
    total = restored.norm() if turned and group["diagnostics"] else None
    kept = residual.keep(restored.dense, state["core"], passage, opening, state, codec)
    if residual.holds and opening and size is not None:
        state[slots.HELD_NORM] = size
    else:
        state.pop(slots.HELD_NORM, None)
    if now.clips:
        state[slots.REST] = outside(kept, seen, z, state.get(slots.REST), unit.rows)
    if group["diagnostics"]:
        own = norm(seen, unit.rows) if size is None else size
        if kept is None:
            diagnostics.measure(state[diagnostics.SLOT], own, z)
        else:
            lost, rounded = passage.reentry * passage.lost(), residual.error(state, codec, unit.rows)
            diagnostics.measure_kept(state[diagnostics.SLOT], own, total, z, kept, rounded, lost, opening)
    slots.commit(stored, unit.packed(stored, moved=refreshing))


def refresh(unit: Unit, seen: Operand, memory: Memory, kept: Frame | None, seed: int) -> Passage:
    """Step 3: a new frame, searched from what is kept of the old one, and the moments in it; the unit's state changes.

    A first gradient of zeros shows nothing, and finders keep the random start. On the CPU it is looked for again at the
    next step; elsewhere, where the host would have to wait to know, at the next refresh that is due.

    Args:
        unit: unpacked.
        seen: the gradient and what the residual kept.
        memory: the finder's; changed.
        kept: what is kept of the old frame where its ranks change.
        seed: the optimizer's.
    """
    site, group, state = unit.site, unit.group, unit.state
    spec, finder, rule, transport = group["frame"], group["finder"], group["rule"], group["transport"]
    clock = unit.clock()
    old = unit.frame() if rule.momentum in state else None
    # Rows are stacked only where each has a frame of these ranks already.
    start = old if unit.rows and old is not None else spec.start(seen.dense, site.ranks, kept or old, seed + site.index)
    looked_at = seen if old is None else replace(seen, past=(old, state[rule.momentum]))
    if old is not None and finder.momentum > 0:
        core = (averaged(rule, state[rule.momentum], clock) * finder.momentum).to(seen.dense.dtype)
        looked_at = looked_at.mix(1 - finder.momentum, old, core)
    warm = state["tick"] > 0 and old is not None and any(r is not None for r in old.ranks)
    new: Frame = finder.find(looked_at, start, warm, memory)
    timed = group["cadence"].refreshed(slots.own_slots(state, slots.CADENCE), start if warm else None, new, unit.when())
    state.update(slots.prefixed(timed, slots.CADENCE))
    if state["tick"] <= 0 and asks_host(seen.dense) and not bool(seen.dense.any()):
        state["tick"] = -1  # nothing was to be seen so far: look again at the next step
    new = bases.put(group, state, new, old, site.view.shape, (seed, site.index))
    if old is None:
        state.update(slots.first_moments(site, group, seen.dense, state["step"].device))
        return unit.standing()
    overlap, momentum = new.overlap(old), state[rule.momentum]
    moved = transport.move(state, rule.slots(tuple(momentum.shape[unit.rows :])), overlap, clock)
    for name in {slot.name for slot in slots.rule_slots(site, group)} & state.keys():
        del state[name]
    state.update(moved)
    if group["diagnostics"]:
        state[diagnostics.SLOT][..., 2] = diagnostics.overlap_defect(overlap)
        state[diagnostics.SLOT][..., 3] = new.defect()
    image = moved[rule.momentum] if transport.projects else overlap.move(momentum)
    decay, intake = rule.recursion(clock)
    return Passage(new, moved[rule.momentum], decay, intake, old, momentum, overlap, image, state["tick"], unit.rows)


def apply(unit: Unit, weights: Tensor, now: Now) -> dict[str, Any]:
    """Steps 5-7; the state afterwards.

    The weights are written last, by the residual: what may raise has been done by then.

    Args:
        unit: that has absorbed a gradient.
        weights: (*rows, d_1, ..., d_N) in working precision; changed.
        now: what the host decided.
    """
    stored, unit = unit.state, unit.unpacked()
    site, group, state = unit.site, unit.group, unit.state
    rule: Rule = group["rule"]
    state["step"] = state["step"] + 1
    state["tick"] += 1
    clock, z = unit.clock(), state.pop("core")
    if site.projected:
        own = rule.slots(site.core_shape)
        _copy({slot.name for slot in group["transport"].slots(own)}, state, stored)
        group["transport"].age(state, own, clock)
    if not (rule.replaces or rule.total and not site.projected):
        _copy({slot.name for slot in slots.rule_slots(site, group)}, state, stored)
    turn = now.turn if rule.timeless else turned
    d = turn(rule, z, state, clock, group["eps"])  # 5
    rate, shrink = -group["lr"], 1 - group["lr"] * group["weight_decay"]
    factor = rate * update_scale(site, group["scale"])
    by_modes = tuple(n for n, r in enumerate(site.ranks) if r is not None)
    compressed = by_modes if isinstance(group["frame"], Modes) else None
    size = state.pop(slots.HELD_NORM, None)
    update = Update(unit.frame, compressed, z, d, factor, shrink, rate, clock, group["eps"], size)
    packed = unit.packed(stored)
    group["residual"].write(weights, update, packed, group["codec"])  # 6, 7
    return packed


def outside(kept: Tensor | None, seen: Tensor, core: Tensor, before: Tensor | None, rows: int = 0) -> Tensor:
    """The norm of what a window's gradients have outside the frame: what is kept, or a bound on what is dropped.

    Args:
        kept: |e| of all gradients of the window, where the residual keeps it, else None.
        seen: the last of them.
        core: its coordinates.
        before: the result of the gradients before it; None for the first.
        rows: how many leading dimensions count rows.
    """
    if kept is not None:
        return kept
    lost = (norm(seen, rows).square() - norm(core, rows).square()).clamp_min_(0).sqrt_()
    return lost if before is None else lost + before


def _copy(names: set[str], state: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Put copies in place of slots that are about to be changed in place, unless they were decoded."""
    for name in names & state.keys():
        if state[name] is stored.get(name):
            state[name] = state[name].clone()
