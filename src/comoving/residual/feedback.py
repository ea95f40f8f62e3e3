"""Generalized error feedback."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec, store
from ..finders import Operand
from ..linalg import inner, norm, over
from ..validate import check_choice, check_float, check_int
from .base import Cores, Inside, Passage

_GRADIENTS, _MOMENTA, _WEIGHT = "feedback.gradients.", "feedback.momenta.", "feedback.weight"
_USED = "feedback.used."
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Feedback(Inside):
    """Generalized error feedback (LDAdam, arXiv 2410.16103), for any frame and refresh period.

    g~  = g + e_{t-1}
    e_t = g~ - F' F'^H g~ + a/b (F m - F' m')

    The second term, zero while the frame stands, returns the momentum that a change of frame loses; the rule makes
    a m' + b z of it (Adam: a = b1, b = 1 - b1). With the raw moments m of every step,

    sum F m + (last) a/b F m + e = sum g

    (for Adam; nothing is lost but what the codec rounds). Therefore e need not be formed. It is kept as

    e = A - F C,   C = m/b + Y,

    where A takes up whole gradients, and C is what the frame has used of them: all of it stands in the momentum but
    Y = sum of the earlier momenta since the last refresh. A step then costs no product with F while the frame
    stands, and one when it changes: A <- A + g - F (C - a/b m), Y <- 0.

    Where several processes use the mean of their z, the momentum shows nothing of what one of them has given. Then each
    has to keep C ``own``, as it is, in place of Y, and with the frame

    A <- A + g,                  C <- C + z              while it stands
    A <- A + g - F (C - a/b m),  C <- z + a/b m'         when it changes

    so that the mean of their e is the e of a process that has the mean of their gradients. In one process this is the
    same e.

    With a decay d every step starts from d e_{t-1} instead, that is from dA and dC, and (1 - d) of all earlier e is
    missing in the sum above.

    Args:
        lazy: whether Y is stored. Without, m + Y is taken out of A at every step, which costs that product but
            saves as many numbers as the core has.
        decay: d in (0, 1].
        window: what is kept is dropped before every step whose number is one more than a multiple of this; None: never.
        momentum: whether momentum that a change of frame loses comes again; without, e_t = g~ - F' F'^H g~, the plain
            feedback of DCT-AdamW (arXiv 2505.17967), at one more product where the frame changes.

        own: whether C is stored in place of Y and b, which ``lazy`` has to allow.

    A and Y are stored through the codec, in the slots "feedback.gradients.<name>" and "feedback.momenta.<name>", and
    1/b in "feedback.weight"; or A and C, in "feedback.gradients.<name>" and "feedback.used.<name>".
    """

    batched: ClassVar[bool] = True
    feeds: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    lazy: bool = True
    decay: float = 1.0
    window: int | None = None
    momentum: bool = True
    own: bool = False

    @property
    def replays(self) -> bool:
        """Unless what is kept is dropped now and then."""
        return self.window is None

    def __post_init__(self) -> None:
        check_choice("lazy", self.lazy, (True, False))
        check_choice("momentum", self.momentum, (True, False))
        check_choice("own", self.own, (True, False))
        if self.own and not self.lazy:
            raise ValueError("own=True keeps C, which lazy=False leaves out: use lazy=True, or own=False")
        check_float("decay", self.decay, 0.0, 1.0, open_low=True)
        if self.window is not None:
            check_int("window", self.window, 1)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """What the codec stores of a tensor of the gradient's size, with ``lazy`` of one of the core's; and 1/b.

        With ``own`` there is no 1/b.
        """
        schema = {_GRADIENTS + name: spec for name, spec in codec.schema(shape, dtype).items()}
        if self.own:
            return schema | {_USED + name: spec for name, spec in codec.schema(core_shape, dtype).items()}
        if self.lazy:
            schema |= {_MOMENTA + name: spec for name, spec in codec.schema(core_shape, dtype).items()}
        return schema | {_WEIGHT: Spec((), dtype.to_real(), scalar=True)}

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """(g + dA) - F dC; d = 1 but at the first gradient."""
        share, rows = self._share(passage) if opening else 1.0, passage.rows
        stored = _stored(state, _GRADIENTS)
        if share == 1.0:
            dense = codec.decode_onto(gradient, stored)
        else:
            kept = codec.decode(stored, tuple(gradient.shape)[rows:], gradient.dtype)
            dense = torch.add(gradient, kept, alpha=share, out=torch.empty_like(kept))
        if passage.old_momentum is None:
            return Operand(dense, rows=rows)
        core = self._used(passage.old_momentum, state, codec, rows).mul_(-share)
        return Operand(dense, 1.0, passage.frame, core, rows=rows)

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Tensor:
        """Bring A up to date, and Y with the weight, or C; returns |e|."""
        if self.own:
            return self._keep_own(dense, cores, passage, opening, state, codec)
        rows, core = passage.rows, cores.total
        used = core.add(passage.momentum, alpha=passage.reentry)
        if not opening:
            used += self._earlier(used, state, codec, rows)
        elif passage.old_frame is not None and passage.old_momentum is not None:
            lost = 0.0 if self.momentum or passage.overlap is None else passage.reentry
            surplus = self._used(passage.old_momentum, state, codec, rows).mul_(self._share(passage))
            surplus.sub_(passage.old_momentum, alpha=passage.reentry - lost)
            if self.lazy and passage.overlap is None:
                used += surplus
                _store(codec, surplus, state, _MOMENTA, rows)
            else:
                passage.old_frame.add_lift(dense, surplus, -1.0)
                if lost > 0:
                    passage.frame.add_lift(dense, passage.momentum, lost)
                self._forget(core, state, codec, rows)
        state[_WEIGHT] = torch.full_like(state[_WEIGHT], 1 / passage.intake)
        size = passage.comm.norm(_store(codec, dense, state, _GRADIENTS, rows))
        return _left(size, used, self._returned(passage), rows)

    def _keep_own(  # noqa: PLR0917
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Tensor:
        """Bring A and C up to date; returns |e|, which of several gradients misses what went unsent but of the last."""
        rows, used, inside = passage.rows, cores.newest, cores.unsent
        if not opening or passage.overlap is None:
            share = self._share(passage) if opening else 1.0
            used = used.add(self._own(used, state, codec, rows), alpha=share)
        elif passage.old_momentum is not None and passage.old_frame is not None:
            again = passage.reentry if self.momentum else 0.0
            surplus = self._own(passage.old_momentum, state, codec, rows) * self._share(passage)
            passage.old_frame.add_lift(dense, surplus.sub_(passage.old_momentum, alpha=again), -1.0)
            used = used.add(passage.momentum, alpha=again)
        size = passage.comm.norm(_store(codec, dense, state, _GRADIENTS, rows))
        returned = self._returned(passage)
        if returned is not None:
            inside = returned if inside is None else returned.add_(inside)
        left = _left(size, used, inside, rows)
        _store(codec, used.clone() if used is cores.newest else used, state, _USED, rows)
        return left

    def _returned(self, passage: Passage) -> Tensor | None:
        """What of the momentum that comes again lies inside F'; None for nothing, as where a transport drops none."""
        if not self.momentum or passage.image is None or passage.image is passage.momentum:
            return None
        return (passage.image - passage.momentum).mul_(passage.reentry)

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """A <- f A, and C <- f C.

        That is all with ``own``. Else C is about to become f z + a/b m + Y, so Y takes up (f - 1) a/b m beside f Y;
        without a Y it is A, by F m.
        """
        gradients, rows = _stored(state, _GRADIENTS), passage.rows
        if self.lazy:
            state.update({_GRADIENTS + name: x for name, x in codec.scaled(gradients, factor).items()})
        if self.own:
            state.update({_USED + name: x for name, x in codec.scaled(_stored(state, _USED), factor).items()})
            return
        missing = passage.momentum * ((factor - 1) * passage.reentry)
        if self.lazy:
            earlier = codec.decode(_stored(state, _MOMENTA), tuple(core.shape)[rows:], core.dtype)
            _store(codec, missing.add_(earlier, alpha=factor), state, _MOMENTA, rows)
            return
        lifted = passage.frame.lift(missing)
        kept = codec.decode(gradients, tuple(lifted.shape)[rows:], lifted.dtype)
        _store(codec, kept * factor - lifted, state, _GRADIENTS, rows)

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """The codec's own bounds, of A and of Y or C."""
        bound, more = self.errors(state, codec, rows)
        return bound + more if self.lazy else bound

    def errors(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> tuple[Tensor, Tensor]:
        """Of A, and of Y or C."""
        bound = codec.error(_stored(state, _GRADIENTS), rows)
        if not self.lazy:
            return bound, torch.zeros_like(bound)
        return bound, codec.error(_stored(state, _USED if self.own else _MOMENTA), rows)

    def _share(self, passage: Passage) -> float:
        """d of this step: 0 where what is kept is dropped."""
        dropped = self.window is not None and passage.tick % self.window == 0
        return 0.0 if dropped else float(self.decay)

    def _used(self, momentum: Tensor, state: dict[str, Tensor], codec: Codec, rows: int) -> Tensor:
        """C, a new tensor."""
        if self.own:
            return self._own(momentum, state, codec, rows).clone()
        weight = state[_WEIGHT]
        # A number on the host multiplies what is on a device, a vector of them does not.
        used = momentum * (over(weight.to(momentum.device, non_blocking=True), momentum) if weight.ndim else weight)
        return used.add_(self._earlier(momentum, state, codec, rows))

    @staticmethod
    def _own(like: Tensor, state: dict[str, Tensor], codec: Codec, rows: int) -> Tensor:
        """C as it is kept, in the core's shape and dtype; not to be written to."""
        return codec.decode(_stored(state, _USED), tuple(like.shape)[rows:], like.dtype)

    def _earlier(self, like: Tensor, state: dict[str, Tensor], codec: Codec, rows: int) -> Tensor | float:
        """Y, in the core's shape and dtype."""
        return codec.decode(_stored(state, _MOMENTA), tuple(like.shape)[rows:], like.dtype) if self.lazy else 0.0

    def _forget(self, core: Tensor, state: dict[str, Tensor], codec: Codec, rows: int) -> None:
        """Y = 0, in the core's shape."""
        if not self.lazy:
            return
        shape = tuple(core.shape)
        for name, spec in codec.schema(shape[rows:], core.dtype).items():
            if not spec.seed:  # which goes on from draw to draw
                state[_MOMENTA + name] = state[_MOMENTA + name].new_zeros(shape[:rows] + spec.shape)


def _stored(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def _left(size: Tensor, used: Tensor, inside: Tensor | None, rows: int) -> Tensor:
    """|e| of e = A - F C, given |A|, C and F^H e: the root of |A|^2 - |C|^2 - 2 Re <F^H e, C>."""
    whole = size.clamp_min(_TINY)
    share = (norm(used, rows) / whole).square()
    if inside is not None:
        unit = over(whole, used)
        share = share + 2 * inner(inside / unit, used / unit, rows)
    return size * (1 - share).clamp_min(0).sqrt()


def _store(codec: Codec, x: Tensor, state: dict[str, Tensor], prefix: str, rows: int) -> Tensor:
    """Put x into the state in place of what is stored under the prefix; returns |x|, (*rows)."""
    size, stored = store(codec, x, _stored(state, prefix), rows)
    state.update({prefix + name: x for name, x in stored.items()})
    return size
