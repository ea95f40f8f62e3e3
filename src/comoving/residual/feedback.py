"""Generalized error feedback."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec, store
from ..finders import Operand
from ..linalg import inner, norm, over
from ..validate import check_choice, check_float, check_int
from .base import Inside, Passage

_GRADIENTS, _MOMENTA, _WEIGHT = "feedback.gradients.", "feedback.momenta.", "feedback.weight"
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

    With a decay d every step starts from d e_{t-1} instead, that is from dA and dC, and (1 - d) of all earlier e is
    missing in the sum above.

    Args:
        lazy: whether Y is stored. Without, m + Y is taken out of A at every step, which costs that product but
            saves as many numbers as the core has.
        decay: d in (0, 1].
        window: what is kept is dropped before every step whose number is one more than a multiple of this; None: never.
        momentum: whether momentum that a change of frame loses comes again; without, e_t = g~ - F' F'^H g~, the plain
            feedback of DCT-AdamW (arXiv 2505.17967), at one more product where the frame changes.

    A and Y are stored through the codec, in the slots "feedback.gradients.<name>" and "feedback.momenta.<name>", and
    1/b in "feedback.weight".
    """

    batched: ClassVar[bool] = True
    feeds: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    lazy: bool = True
    decay: float = 1.0
    window: int | None = None
    momentum: bool = True

    @property
    def replays(self) -> bool:
        """Unless what is kept is dropped now and then."""
        return self.window is None

    def __post_init__(self) -> None:
        check_choice("lazy", self.lazy, (True, False))
        check_choice("momentum", self.momentum, (True, False))
        check_float("decay", self.decay, 0.0, 1.0, open_low=True)
        if self.window is not None:
            check_int("window", self.window, 1)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """What the codec stores of a tensor of the gradient's size, with ``lazy`` of one of the core's; and 1/b."""
        schema = {_GRADIENTS + name: spec for name, spec in codec.schema(shape, dtype).items()}
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
        self, dense: Tensor, core: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Tensor:
        """Bring A, Y and the weight up to date; returns |e|."""
        rows = passage.rows
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
        size = _store(codec, dense, state, _GRADIENTS, rows)
        whole = size.clamp_min(_TINY)
        # |e|^2 = |A|^2 - |C|^2 - 2 Re <F'^H e, C>, and only a transport that drops momentum leaves any of e inside F'.
        share = (norm(used, rows) / whole).square()
        if self.momentum and passage.image is not None and passage.image is not passage.momentum:
            unit = over(whole, used)
            inside = (passage.image - passage.momentum).div_(unit)
            share = share + 2 * passage.reentry * inner(inside, used / unit, rows)
        return size * (1 - share).clamp_min(0).sqrt()

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """A <- f A, and C <- f C.

        C is about to become f z + a/b m + Y, so Y takes up (f - 1) a/b m beside f Y; without a Y it is A, by F m.
        """
        gradients, rows = _stored(state, _GRADIENTS), passage.rows
        missing = passage.momentum * ((factor - 1) * passage.reentry)
        if self.lazy:
            state.update({_GRADIENTS + name: x for name, x in codec.scaled(gradients, factor).items()})
            earlier = codec.decode(_stored(state, _MOMENTA), tuple(core.shape)[rows:], core.dtype)
            _store(codec, missing.add_(earlier, alpha=factor), state, _MOMENTA, rows)
            return
        lifted = passage.frame.lift(missing)
        kept = codec.decode(gradients, tuple(lifted.shape)[rows:], lifted.dtype)
        _store(codec, kept * factor - lifted, state, _GRADIENTS, rows)

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """The codec's own bounds, of A and of Y."""
        bound = codec.error(_stored(state, _GRADIENTS), rows)
        return bound + codec.error(_stored(state, _MOMENTA), rows) if self.lazy else bound

    def _share(self, passage: Passage) -> float:
        """d of this step: 0 where what is kept is dropped."""
        dropped = self.window is not None and passage.tick % self.window == 0
        return 0.0 if dropped else float(self.decay)

    def _used(self, momentum: Tensor, state: dict[str, Tensor], codec: Codec, rows: int) -> Tensor:
        """C, a new tensor."""
        weight = state[_WEIGHT]
        # A number on the host multiplies what is on a device, a vector of them does not.
        used = momentum * (over(weight.to(momentum.device, non_blocking=True), momentum) if weight.ndim else weight)
        return used.add_(self._earlier(momentum, state, codec, rows))

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


def _store(codec: Codec, x: Tensor, state: dict[str, Tensor], prefix: str, rows: int) -> Tensor:
    """Put x into the state in place of what is stored under the prefix; returns |x|, (*rows)."""
    size, stored = store(codec, x, _stored(state, prefix), rows)
    state.update({prefix + name: x for name, x in stored.items()})
    return size
