"""Generalized error feedback."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec, Part
from ..frames import ModeFrame
from .base import Loss

_PREFIX = "feedback."


@dataclass(frozen=True)
class Feedback:
    """Generalized error feedback (LDAdam, arXiv 2410.16103), for any frame and refresh period.

    g~  = g + e_{t-1}
    e_t = g~ - F' F'^H g~ + b1/(1 - b1) (F m - F' m')

    The second term, zero while the frame stands, returns the momentum that a change of frame loses. With the raw
    moments m of every step,  sum F m + (last) b1/(1 - b1) F m + e = sum g:  nothing is lost but what the codec rounds.
    The buffer e has the gradient's size and is stored through the codec in slots "feedback.<part>".
    """

    def parts(self, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
        """The codec's parts of a tensor of the gradient's size."""
        return {_PREFIX + name: part for name, part in codec.parts(shape, dtype).items()}

    def add_to(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """g + e, in the buffer itself where the codec stores it plainly."""
        return codec.decode_onto(gradient, _stored(state))

    def keep(
        self,
        gradient: Tensor,
        core: Tensor,
        frame: ModeFrame,
        loss: Loss | None,
        state: dict[str, Tensor],
        codec: Codec,
    ) -> Tensor:
        """Form e_t in place in g~, measure and encode it."""
        if loss is None:
            error = frame.add_lift(gradient, core, -1.0)
        else:
            error = frame.add_lift(gradient, core.add(loss.new_momentum, alpha=loss.factor), -1.0)
            loss.old_frame.add_lift(error, loss.old_momentum, loss.factor)
        return codec.encode(error, _stored(state))

    def error(self, state: dict[str, Tensor], codec: Codec) -> Tensor:
        """The codec's own bound."""
        return codec.error(_stored(state))


def _stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): part for name, part in state.items() if name.startswith(_PREFIX)}
