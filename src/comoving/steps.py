"""The seven steps, on a cell: one row by itself, or the rows of a batch.

1. The gradient is seen as it is best seen (:mod:`comoving.views`), and preconditioned.
2. What the residual kept is added.
3. When a refresh is due, a new frame is found and the moments are carried over to it.
4. The gradient is projected, and the residual keeps what is lost.
5. The rule turns the core into a direction.
6. The direction is lifted; the residual adds what it wants from outside the frame.
7. The weights decay, and the update is written to them.

:func:`absorb` makes steps 1-4, :func:`apply` steps 5-7. Tensors that a cell was given are not written to.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from . import diagnostics
from . import state as slots
from .cadence import When
from .cell import Cell, Open
from .comm import Comm
from .decay import Decay, decay_agreeing
from .finders import Operand
from .finders.delayed import DUE, announced, announcing, come, foreseen, is_awaited, of_each, searched
from .frames import Frame, ModeFrame, Modes, SharedFrame
from .frames import stored as stored_frame
from .groups import update_scale
from .linalg import asks_host, norm
from .residual import Cores, Passage, Update
from .rules.base import averaged
from .rules.turn import Turn, turned
from .searches import Elsewhere, apart
from .sites import Site

Adapt = Callable[[Cell, Tensor], Frame | None]
"""Before step 3, of a cell and its gradient: the cell gets the ranks of its new frame; returned is what is kept of the
old one, None for all of it, as it is."""


@dataclass(frozen=True)
class Now:
    """What the host decided for this step, read once.

    Args:
        lr, rate, betas, eps, weight_decay, scale, every: the group's rates and refresh period; of a step that is
            recorded lr is a tensor without dimensions, on the parameters' device.
        phase: at which steps, modulo the period, frames are refreshed.
        seed: of a first frame.
        key: what seeds of coded frames begin from.
        adapt: chooses ranks; None where they are fixed.
        scope: the context of a refresh: a timer or profiler range.
        clips: whether a window wants to know the norm of what its gradients have outside the frame.
        turn: step 5 of rules that do without the host's clock; it may be compiled.
        comm: joins what several processes see of a gradient.
        elsewhere: who makes searches that are begun ahead; None where they are made at once.
        decay: which entries decay.
    """

    lr: float | Tensor
    rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float | str
    every: int
    phase: int
    seed: int
    key: tuple[int, int]
    adapt: Adapt | None
    scope: Callable[[], AbstractContextManager[Any]]
    clips: bool
    turn: Turn
    comm: Comm
    elsewhere: Elsewhere | None = None
    decay: Decay = "all"

    def due(self, cell: Cell) -> bool:
        """Whether the next gradient brings a new frame; a loaded one of other ranks does not fit, and is at once."""
        if cell.frame.ranks != cell.kind.site.ranks:
            return True
        return cell.tick <= 0 or cell.kind.parts.cadence.due(cell.cadence, self.when(cell))

    def begins(self, cell: Cell) -> bool:
        """Whether the search for the next refresh begins at this step, whose own refresh has been made."""
        parts = cell.kind.parts
        return cell.tick >= 0 and foreseen(parts.finder, parts.cadence, cell.cadence, self.when(cell))

    def when(self, cell: Cell) -> When:
        """This step, as the cadence is asked about it."""
        return When(max(0, cell.tick), self.every, self.phase)


def absorb(cell: Cell, given: Tensor, size: Tensor | None, now: Now) -> None:
    """Steps 1-4.

    Args:
        cell: takes the gradient up.
        given: the gradient, (*rows, d_1, ..., d_N) in the view's shape and working dtype.
        size: its norm, (*rows), where it is known.
        now: what the host decided.
    """
    kind, parts, first = cell.kind, cell.kind.parts, cell.open is None
    seen = parts.precondition.apply(given, cell.precondition, cell.tick + 1, cell.rows)  # 1
    if not kind.site.projected:
        cell.open = Open(seen) if cell.open is None else replace(cell.open, core=cell.open.core + seen)
        cell.check()
        return
    cell.decode(only=parts.rule.momentum)
    passage = cell.standing(now.betas)
    due = first and now.due(cell)
    if due:
        cell.decode()
        cell.t = cell.t.clone()  # transports may set it back
        parts.residual.renew(seen, cell.residual, parts.codec)
    cell.finder = {
        name: x.clone() if (due or x.ndim) and not is_awaited(name) else x for name, x in cell.finder.items()
    }
    seen = parts.residual.split(seen, cell.residual)
    size = size if seen is given else None
    parts.finder.observe(seen, cell.finder, cell.rows)
    restored = parts.residual.restore(seen, passage, first, cell.residual, parts.codec)  # 2
    if not now.comm.alone:
        restored = replace(restored, comm=now.comm)
    looked_at: Operand | None = None
    if due:
        with now.scope():
            restored = restored.measured() if cell.figures is not None else restored
            kept = now.adapt(cell, seen) if now.adapt is not None else None
            looked_at = operand_of(cell, restored, now)
            passage = refresh(cell, looked_at, kept, now)  # 3
    if first and now.begins(cell):
        with now.scope():
            begin(cell, operand_of(cell, restored, now) if looked_at is None else looked_at, now)
    own = restored.project(passage.frame, passage.overlap) if first else passage.frame.project(seen)  # 4
    total = restored.norm() if due and restored.core is not None and cell.figures is not None else None
    sent = now.comm.sent(own, cell.rows)
    if kind.site.one_core and (cell.figures is not None or now.clips):
        passage = replace(passage, comm=now.comm)
    z = sent if cell.open is None else cell.open.core + sent
    cores = Cores(z, sent, None if sent is own else own - sent)
    kept = parts.residual.keep(restored.dense, cores, passage, first, cell.residual, parts.codec)
    before = None if cell.open is None else cell.open.rest
    rest = _outside(kept, seen, own, before, passage) if now.clips else None
    if cell.figures is not None:
        given_size = norm(seen, cell.rows) if size is None else size
        _measure(cell, passage, given_size, total, own, kept, cores.unsent, first, now)
    held = size if parts.residual.holds and first else None
    if cell.open is None:
        cell.open = Open(z, held, rest, refreshed=due and kind.site.deferred, newest=sent)
    else:
        cell.open = replace(cell.open, core=z, size=held, rest=rest, newest=sent)
    cell.encode(moved=due)
    cell.check()


def operand_of(cell: Cell, seen: Operand, now: Now) -> Operand:
    """What finders look at: the gradient and what the residual kept, mixed with the momentum where there is one.

    Args:
        cell: with its momentum decoded.
        seen: the gradient and what the residual kept.
        now: what the host decided.
    """
    rule, finder = cell.kind.parts.rule, cell.kind.parts.finder
    if rule.momentum not in cell.moments:
        return seen
    frame, momentum = cell.frame, cell.moments[rule.momentum]
    looked_at = replace(seen, past=(frame, momentum))
    if finder.inertia > 0:
        core = (averaged(rule, momentum, cell.clock(now.betas)) * finder.inertia).to(seen.dense.dtype)
        looked_at = looked_at.mix(1 - finder.inertia, frame, core)
    return looked_at


def begin(cell: Cell, looked_at: Operand, now: Now) -> None:
    """Begin the search for a frame that is used some steps from now, from the frame that is in use at this one.

    Args:
        cell: gets what was found into its memory, or the search where that goes on elsewhere.
        looked_at: what a refresh at this step looks at.
        now: what the host decided.
    """
    finder, memory = cell.kind.parts.finder, cell.finder
    start = ModeFrame(cast("ModeFrame", cell.frame).factors)  # without those who share it
    if now.elsewhere is not None and looked_at.comm.alone:
        looked_at, start, reads = apart(looked_at, start)
        work = partial(searched, finder, looked_at, start, memory)
        cell.search = now.elsewhere(work, reads, looked_at.dense.device)
    else:
        cell.finder = memory | searched(finder, looked_at, start, memory)
    cell.finder = cell.finder | {DUE: announcing(memory, cell.tick + finder.ahead)}


def refresh(cell: Cell, looked_at: Operand, kept: Frame | None, now: Now) -> Passage:
    """Step 3: a new frame, searched from what is kept of the old one, and the moments in it.

    A first gradient of zeros shows nothing, and finders keep the random start. On the CPU it is looked for again at the
    next step; elsewhere, where the host would have to wait to know, at the next refresh that is due.

    Args:
        cell: with its moments decoded.
        looked_at: what the new frame shall capture.
        kept: what is kept of the old frame where its ranks change.
        now: what the host decided.
    """
    kind, parts, clock = cell.kind, cell.kind.parts, cell.clock(now.betas)
    site, rule = kind.site, parts.rule
    old = cell.frame if rule.momentum in cell.moments else None
    # Rows are stacked only where each has a frame of these ranks already.
    dense = looked_at.dense
    if cell.rows and old is not None:
        start = ModeFrame(old.factors) if isinstance(old, SharedFrame) else old
    else:
        start = parts.frame.start(_of_shape(dense, site), site.ranks, kept or old, now.seed)
    warm = cell.tick > 0 and old is not None and any(r is not None for r in old.ranks)
    new = _found(cell, looked_at, start, warm)
    cell.cadence |= parts.cadence.refreshed(cell.cadence, start if warm else None, new, now.when(cell))
    if cell.tick <= 0 and asks_host(dense) and not bool(now.comm.largest(dense.any().float())):
        cell.tick = -1  # nothing was to be seen so far: look again at the next step
    basis = dict(cell.basis)
    new = cell.shared(stored_frame.put(kind.group, basis, new, old, site.framed.view.shape, now.key))
    cell.turn(basis, new)
    if old is None:
        cell.moments |= slots.first_moments(site, kind.group, dense, cell.t.device)
        return cell.standing(now.betas)
    overlap, momentum = new.overlap(old), cell.moments[rule.momentum]
    moved = parts.transport.move(cell.moments, rule.slots(tuple(momentum.shape[cell.rows :])), overlap, clock)
    gone = {slot.name for slot in slots.rule_slots(site, kind.group)}
    cell.moments = {name: x for name, x in cell.moments.items() if name not in gone} | moved
    if cell.figures is not None:
        cell.figures = cell.figures.clone()
        cell.figures[..., 2] = diagnostics.overlap_defect(overlap)
        cell.figures[..., 3] = new.defect()
    image = moved[rule.momentum] if parts.transport.projects else overlap.move(momentum)
    decay, intake = rule.recursion(clock)
    return Passage(new, moved[rule.momentum], decay, intake, old, momentum, overlap, image, cell.tick, cell.rows)


def _found(cell: Cell, looked_at: Operand, start: Any, warm: bool) -> Frame:
    """The new frame: the one that was announced for this step, or what is found now."""
    finder, memory = cell.kind.parts.finder, cell.finder
    if not finder.ahead:
        return finder.find(looked_at, start, warm, memory)
    # One of other ranks than the frame's was never searched.
    ready = announced(memory, cell.tick if warm and cell.frame.ranks == start.ranks else -1)
    memory |= {DUE: announcing(memory, 0)}
    known = come(memory, len(start.ranks)) if bool(ready.any()) else None
    if known is not None and bool(ready.all()):
        return known
    found: ModeFrame = finder.find(looked_at, start, warm, memory)
    return found if known is None else of_each(ready, known, found)


def apply(cell: Cell, weights: Tensor, now: Now) -> None:
    """Steps 5-7.

    The weights are written last, by the residual: what may raise has been done by then.

    Args:
        cell: that has absorbed a gradient; its moments are as they are stored afterwards.
        weights: (*rows, d_1, ..., d_N) in working precision; changed.
        now: what the host decided.
    """
    assert cell.open is not None
    kind, parts, opened, stored = cell.kind, cell.kind.parts, cell.open, cell.moments
    site, rule = kind.site, parts.rule
    cell.decode()
    target, embedded = weights, kind.embedded
    if embedded is not None:
        weights, kept = embedded.take(weights, cell.rows)
        cell.moments |= kept
    cell.open, cell.t, cell.tick = None, cell.t + 1, cell.tick + 1
    clock = cell.clock(now.betas)
    if site.projected:
        own = rule.slots(site.core_shape)
        _copy({slot.name for slot in parts.transport.slots(own)}, cell, stored)
        parts.transport.age(cell.moments, own, clock)
    if not (rule.replaces or rule.total and not site.projected):
        _copy({slot.name for slot in slots.rule_slots(site, kind.group)}, cell, stored)
    turn = now.turn if rule.timeless else turned
    d = turn(rule, opened.core, cell.moments, clock, now.eps)  # 5
    cautious = now.decay == "cautious" and now.weight_decay > 0
    rate, shrink = -now.rate * now.lr, 1 - now.lr * now.weight_decay if now.weight_decay and not cautious else 1.0
    factor = rate * update_scale(site, now.scale)
    by_modes = tuple(n for n, r in enumerate(site.ranks) if r is not None)
    compressed = by_modes if isinstance(parts.frame, Modes) else None
    moments = dict(cell.moments) if parts.residual.reads else dict[str, Tensor]()
    if slots.coded(kind.group):  # which gives the decoded ones up
        moments = {name: x.clone() for name, x in moments.items()}
    kept = cell.moments
    cell.encode(moved=True)
    cell.check()
    load = partial(cell.load, opened.core)
    update = Update(load, compressed, opened.core, d, factor, shrink, rate, clock, now.eps, opened.size, moments)
    new = weights.clone() if cautious else weights
    parts.residual.write(new, update, cell.residual, parts.codec)  # 6, 7
    if cautious:
        weights.copy_(decay_agreeing(new, weights, now.lr * now.weight_decay))
    if embedded is not None:
        target.copy_(embedded.put(weights, kept, cell.t if cell.recorded else cell.tick, cell.rows))


def _of_shape(x: Tensor, site: Site) -> Tensor:
    """x, or a tensor without numbers of its own, of the shape of what the frame is of, for a layout to look at."""
    return x.new_empty(()).expand(x.shape[: x.ndim - len(site.ranks)] + site.framed.view.shape) if site.one_core else x


def _outside(kept: Tensor | None, seen: Tensor, core: Tensor, before: Tensor | None, passage: Passage) -> Tensor:
    """The norm of what a window's gradients have outside the frame: what is kept, or a bound on what is dropped.

    Args:
        kept: |e| of all gradients of the window, where the residual keeps it, else None.
        seen: the last of them.
        core: its coordinates.
        before: the result of the gradients before it; None for the first.
        passage: that of the momentum, which joins norms of what is here where all have the core.
    """
    if kept is not None:
        return kept
    rows, size = passage.rows, passage.comm.norm(norm(seen, passage.rows))
    lost = (size.square() - norm(core, rows).square()).clamp_min_(0).sqrt_()
    return lost if before is None else lost + before


def _measure(  # noqa: PLR0917
    cell: Cell,
    passage: Passage,
    size: Tensor,
    total: Tensor | None,
    z: Tensor,
    kept: Tensor | None,
    unsent: Tensor | None,
    first: bool,
    now: Now,
) -> None:
    """Write what :mod:`comoving.diagnostics` asks for into figures of the cell's own."""
    parts = cell.kind.parts
    assert cell.figures is not None
    cell.figures, inside = cell.figures.clone(), norm(z, cell.rows)
    one_core = cell.kind.site.one_core
    if kept is None:
        size, inside = (*_of_all(now.comm, size), inside) if one_core else _of_all(now.comm, size, inside)
        diagnostics.measure(cell.figures, size, inside)
        return
    lost = passage.reentry * passage.lost()
    if one_core:
        entries, cores = parts.residual.errors(cell.residual, parts.codec, cell.rows)
        size, entries = _of_all(now.comm, size, entries)
        rounded = entries + cores
    else:
        rounded = parts.residual.error(cell.residual, parts.codec, cell.rows)
        if unsent is not None:
            rounded = rounded + norm(unsent, cell.rows)
        size, inside, kept, lost, rounded = _of_all(now.comm, size, inside, kept, lost, rounded)
    total = None if total is None else now.comm.norm(total)
    diagnostics.measure_kept(cell.figures, size, total, inside, kept, rounded, lost, first)


def _of_all(comm: Comm, *norms: Tensor) -> tuple[Tensor, ...]:
    """Norms of tensors of which each process may have some entries; at once."""
    if comm.alone:
        return norms
    lead = max((x.shape for x in norms), key=len)
    return comm.norm(torch.stack([x.to(norms[0].device).expand(lead) for x in norms])).unbind()


def _copy(names: set[str], cell: Cell, stored: dict[str, Tensor]) -> None:
    """Put copies in place of slots that are about to be changed in place, unless they were decoded."""
    for name in names & cell.moments.keys():
        if cell.moments[name] is stored.get(name):
            cell.moments[name] = cell.moments[name].clone()
