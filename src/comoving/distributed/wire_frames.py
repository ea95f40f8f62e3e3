"""Frames for the wire alone: gradients of parameters with a whole frame are sent as cores, and arrive as gradients."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoint import WIRE
from ..codecs import Codec, Full, Spec, store
from ..codecs.base import as_real
from ..comm import Comm
from ..drivers import gradients
from ..finders import Finder, Operand, Power
from ..frames import ModeFrame, Modes
from ..frames.base import SIDES, Ranks, Side
from ..frames.modes import check_rank
from ..linalg import norm, trouble
from ..sites import Site
from ..validate import check_choice, check_int
from .comms import Replicas
from .copies import Copies, whole
from .traffic import Traffic
from .wires import Piece, Sending, Wire

ERROR = WIRE + "error."
"""What the names of the slots of e begin with."""
_TICK, _FRAME = WIRE + "tick", WIRE + "frame."


@dataclass(frozen=True)
class WireFrame:
    """How gradients of parameters with a whole frame, such as Muon's and SOAP's, are sent: in a frame of the wire's.

    Process i has a gradient g_i and an error e_i, which begins at zero:

    z_i = F^H (g_i + e_i),   e_i <- g_i + e_i - F z_i,   and all step by g = F mean of z_i.

    This is error feedback as of PowerSGD (arXiv 1905.13727), with a frame that stays orthonormal, and as it is between
    refreshes, at which it is found in the mean of g_i + e_i. The rule sees F z in place of the mean of the gradients,
    so that training is not that of one process.

    Args:
        rank: of the frames; see :meth:`comoving.frames.Modes.ranks`. An int or a float.
        refresh_every: steps between changes of a frame, >= 1, staggered over the parameters.
        side: which side of a matrix is compressed.
        finder: of frames: one that several processes can use together, and that remembers nothing.
        codec: of e_i.

    Raises:
        TypeError, ValueError: a value outside its interval; a finder, or a codec, that does not serve.
    """

    rank: int | float = 1 / 8
    refresh_every: int = 10
    side: Side = "auto"
    finder: Finder = Power()
    codec: Codec = Full()

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if isinstance(cast("object", self.rank), tuple):
            raise TypeError(
                f"rank must be an int or a float here, which fits parameters of all shapes, got {self.rank}"
            )
        check_int("refresh_every", self.refresh_every, 1)
        check_choice("side", self.side, SIDES)
        if not self.finder.joint or ModeFrame not in self.finder.fills or self.finder.schema((2, 2), (1, None), _REAL):
            raise ValueError(f"finder {self.finder} cannot find frames of the wire: use Power() or Exact()")
        if not self.codec.signed:
            raise ValueError(f"codec {self.codec} stores no signs, which errors have: use Full(), Int8() or Int4()")

    def ranks(self, site: Site) -> Ranks:
        """Those of the frame of a parameter, or of each of its blocks; all None where it is sent whole."""
        return Modes().ranks(_shape(site), self.rank, self.side)

    def serves(self, site: Site) -> bool:
        """Whether cores are sent of this parameter."""
        return site.whole and not site.projected and any(r is not None for r in self.ranks(site))

    def core_shape(self, site: Site) -> tuple[int, ...]:
        """Of what is sent of this parameter, with its blocks in front."""
        return (*_lead(site), *Modes().core_shape(_shape(site), self.ranks(site)))

    def schema(self, site: Site) -> dict[str, Spec]:
        """The tensors that are kept of this parameter: e, and the frame."""
        lead, shape, dtype = _lead(site), _shape(site), site.view.dtype
        frame = {WIRE + name: spec for name, spec in Modes().schema(shape, self.ranks(site), dtype).items()}
        error = {ERROR + name: spec for name, spec in self.codec.schema((*lead, *shape), dtype).items()}
        return {name: spec._replace(shape=(*lead, *spec.shape)) for name, spec in frame.items()} | error

    def imagined(self, site: Site, comm: Comm) -> tuple[Operand, ModeFrame]:
        """What a frame of this parameter is searched in, and from; without data."""
        shape, dtype, lead = _shape(site), site.view.dtype, _lead(site)
        factors = [None if r is None else torch.empty((*lead, d, r), dtype=dtype, device="meta")
                   for d, r in zip(shape, self.ranks(site), strict=True)]  # fmt: skip
        x = torch.empty((*lead, *shape), dtype=dtype, device="meta")
        return Operand(x, rows=len(lead), comm=comm), ModeFrame(tuple(factors))


_REAL = torch.float32


@dataclass(eq=False)
class _Lane:
    """What is kept of one parameter; it is replaced as a whole.

    Args:
        site: the parameter's.
        phase: at which steps, modulo the period, its frame is refreshed.
        state: by the names of :meth:`WireFrame.schema`.
        tick: how many gradients were sent.
    """

    site: Site
    phase: int
    state: dict[str, Tensor]
    tick: int = 0


@dataclass(eq=False)
class _Sent:
    """Cores of one bucket on their way, and what becomes of the state where they are used."""

    params: Sequence[Tensor]
    frames: Sequence[ModeFrame]
    errors: Sequence[dict[str, Tensor]]
    sending: Sending


@dataclass(eq=False)
class WireFrames:
    """The gradients of parameters with whole frames, sent as cores.

    Args:
        settings: rank, and the like.
        sites: of all parameters.
        seed: of the random directions that first frames are searched from.
        wire: of cores.
        comm: joins what frames are searched in.
        traffic: counts cores.
        copies: of what differs from process to process, in checkpoints.
    """

    settings: WireFrame
    sites: Mapping[Tensor, Site]
    seed: int
    wire: Wire
    comm: Replicas
    traffic: Traffic
    copies: Copies
    _open: list[_Sent] = field(default_factory=list[_Sent], init=False)
    _ahead: dict[Tensor, _Lane] = field(default_factory=dict[Tensor, _Lane], init=False)
    """What the lanes become where the optimizer steps by what was sent."""

    def __post_init__(self) -> None:
        own = {p: site for p, site in self.sites.items() if p.requires_grad and self.settings.serves(site)}
        every = self.settings.refresh_every
        self._lanes = {p: self._fresh(p, site, i % every) for i, (p, site) in enumerate(own.items())}
        self._loaded: dict[Tensor, _Lane] = {}

    def __contains__(self, p: Tensor) -> bool:
        return p in self._lanes

    def _fresh(self, p: Tensor, site: Site, phase: int) -> _Lane:
        specs = self.settings.schema(site)
        state = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=p.device) for name, spec in specs.items()}
        return _Lane(site, phase, state)

    # -------------------------------------------------------------------------------------------------------- sending

    def take(self, given: Mapping[Tensor, Tensor], agree_on_idle: bool) -> None:
        """Send what these gradients have in their frames; a collective call.

        Args:
            given: parameter -> gradient of this process, which may be overwritten afterwards.
            agree_on_idle: whether parameters whose gradients are zero on all processes are left as they are.
        """
        # A norm may overflow.
        flags = {p: ~(norm(g).isfinite() | as_real(g).sum().isfinite()) for p, g in given.items()}
        usable = {p: gradients.usable(g, flags[p]) for p, g in given.items()}
        if agree_on_idle:
            seen = [g.any() | flags[p] for p, g in usable.items()]
            live = self.comm.largest(torch.stack(seen).float()).tolist()
            usable = {p: g for (p, g), any_ in zip(usable.items(), live, strict=True) if any_}
        if not usable:
            return
        pieces, frames, errors = list[Piece](), list[ModeFrame](), list[dict[str, Tensor]]()
        for p, g in usable.items():
            piece, frame, error = self._projected(self._ahead.get(p, self._lanes[p]), g)
            pieces.append(piece)
            frames.append(frame)
            errors.append(error)
        device = pieces[0].core.device
        pieces.append(Piece(torch.stack([flags[p].to(device) for p in usable]).float()))
        self._open.append(_Sent([*usable], frames, errors, self.wire.start(pieces, self.comm.group, self.traffic)))

    def _projected(self, lane: _Lane, g: Tensor) -> tuple[Piece, ModeFrame, dict[str, Tensor]]:
        """A core, the frame that it is in, and what is kept of the rest."""
        settings, site = self.settings, lane.site
        seen, before = _seen(site, g), {name.removeprefix(ERROR): x for name, x in lane.state.items() if ERROR in name}
        rows = len(_lead(site))
        total = settings.codec.decode_onto(seen, before)
        frame = self._frame(lane)
        if lane.tick == 0 or lane.tick % settings.refresh_every == lane.phase:
            frame = settings.finder.find(Operand(total, rows=rows, comm=self.comm), frame, lane.tick > 0, {})
        core = frame.project(total)
        arriving = self.wire.sent(core, rows)
        _, error = store(settings.codec, frame.add_lift(total, arriving, -1.0), before)
        return Piece(core, rows), frame, {ERROR + name: x for name, x in error.items()}

    def _frame(self, lane: _Lane) -> ModeFrame:
        """The frame so far, or directions drawn at random to search a first one from."""
        shape = _shape(lane.site)
        if lane.tick > 0:
            return ModeFrame(tuple(lane.state.get(f"{_FRAME}{n}") for n in range(len(shape))))
        ranks, like = self.settings.ranks(lane.site), next(x for name, x in lane.state.items() if _FRAME in name)
        start = Modes().start(like.new_empty(shape), ranks, None, self.seed + lane.site.index)
        lead = _lead(lane.site)
        return ModeFrame(tuple(None if u is None else u.expand(*lead, *u.shape) for u in start.factors))

    # ------------------------------------------------------------------------------------------------------- arriving

    def finish(self) -> None:
        """Wait for all cores, and put the gradients that they make into ``p.grad``, which has been made.

        Where any gradient of any process was not finite, that parameter's becomes NaN on all of them, for the step to
        see, and what is kept stays as it was. One number is read from the device.
        """
        sent, self._open = self._open, []
        if not sent:
            return
        means = [own.sending.wait() for own in sent]
        flags = torch.cat([mean[-1].to(means[0][-1].device) for mean in means]) > 0
        bad = [*flags.tolist()] if trouble(flags.any()) else None
        place = 0
        for own, mean in zip(sent, means, strict=True):
            for p, frame, error, core in zip(own.params, own.frames, own.errors, mean[:-1], strict=True):
                site = self._lanes[p].site
                value = site.view.restore(_laid(site, frame.lift(core)))
                value = value if p.grad is None else p.grad.copy_(value)
                p.grad = value.to(p.dtype)
                if bad is None:
                    frames = {WIRE + name: x.contiguous() for name, x in frame.tensors().items()}
                    lane = self._ahead.get(p, self._lanes[p])
                    self._ahead[p] = replace(lane, state=frames | error, tick=lane.tick + 1)
                elif bad[place]:
                    p.grad.fill_(torch.nan)
                place += 1

    def settle(self) -> None:
        """The optimizer steps by the gradients that were made: what they leave is kept."""
        self._lanes |= self._ahead
        self._ahead.clear()

    def drop(self) -> None:
        """It does not: what is kept stays as it was."""
        self._ahead.clear()
        self.leave()

    def leave(self) -> None:
        """Forget what is on its way."""
        for own in self._open:
            own.sending.leave()
        self._open.clear()

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def saved(self, p: Tensor) -> dict[str, Any]:
        """What is kept of this parameter; of what differs from process to process the copies of all."""
        if p not in self._lanes:
            return {}
        lane = self._lanes[p]
        own = {name: self.copies.joined(x) if self._differs(name, lane.site) else x for name, x in lane.state.items()}
        return {_TICK: lane.tick, **own}

    def loaded(self, p: Tensor, state: Mapping[str, Any]) -> None:
        """Take note of what a checkpoint has of this parameter, for :meth:`adopt`; a collective call.

        Each process gets its own error where as many have saved it, else the mean of all; where a frame has other
        ranks, it is searched anew.

        Raises:
            ValueError: errors of another shape.
        """
        if p not in self._lanes:
            return
        site = self._lanes[p].site
        self._loaded[p] = lane = self._fresh(p, site, self._lanes[p].phase)
        if _TICK not in state:
            return
        specs = self.settings.schema(site)
        errors = {name: spec for name, spec in specs.items() if ERROR in name}
        lane.state |= self._error(p, state, errors)
        frame = {name: whole(x) for name, x in state.items() if name.startswith(_FRAME)}
        wanted = {name: spec for name, spec in specs.items() if name not in errors}
        if {name: x.shape for name, x in frame.items()} == {name: spec.shape for name, spec in wanted.items()}:
            lane.state |= {name: x.to(p.device, wanted[name].dtype) for name, x in frame.items()}
            lane.tick = int(state[_TICK])

    def adopt(self, loaded: Collection[Tensor]) -> None:
        """From now on go by what was loaded of these parameters; others begin anew."""
        known, self._loaded = self._loaded, {}
        self._lanes = {
            p: known[p] if p in loaded else self._fresh(p, lane.site, lane.phase) for p, lane in self._lanes.items()
        }
        self._ahead.clear()

    def _error(self, p: Tensor, state: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Tensor]:
        site, codec = self._lanes[p].site, self.settings.codec
        if {name for name in state if name.startswith(ERROR)} != {*specs}:
            raise ValueError(f"{site.name}: the checkpoint's errors of the wire were stored by another codec")
        copies = dict[str, list[Tensor]]()
        for name, spec in specs.items():
            x = state[name]
            copies[name] = self.copies.own(x, len(spec.shape)) if self._differs(name, site) else [whole(x)]
            if any(one.shape != spec.shape or one.dtype != spec.dtype for one in copies[name]):
                raise ValueError(
                    f"{site.name}: {name} must be {spec.dtype} of shape {spec.shape}, got {x.dtype} {tuple(x.shape)}"
                )
        count = max(map(len, copies.values()))
        each = [{name: own[i % len(own)].to(p.device) for name, own in copies.items()} for i in range(count)]
        if count == 1:
            return {name: x.clone() for name, x in each[0].items()}
        shape, dtype = (*_lead(site), *_shape(site)), site.view.dtype
        plain = [{name.removeprefix(ERROR): x for name, x in one.items()} for one in each]
        total = torch.stack([codec.decode(one, shape, dtype) for one in plain]).mean(0)
        return {ERROR + name: x for name, x in store(codec, total, plain[0])[1].items()}

    def _differs(self, name: str, site: Site) -> bool:
        return ERROR in name and not self.settings.schema(site)[name].seed


def _lead(site: Site) -> tuple[int, ...]:
    """Dimensions that count blocks."""
    return (site.blocks,) if site.blocks else ()


def _shape(site: Site) -> tuple[int, ...]:
    """That of the parameter as it is seen, or of a block."""
    shape, mode = site.view.shape, site.block_mode
    return shape if mode is None else (*shape[:mode], *shape[mode + 1 :])


def _seen(site: Site, g: Tensor) -> Tensor:
    seen = site.view.see(g)
    return seen if site.block_mode is None else seen.movedim(site.block_mode, 0)


def _laid(site: Site, x: Tensor) -> Tensor:
    return x if site.block_mode is None else x.movedim(0, site.block_mode)
