"""Encoding beside what is there, so that a step that fails has changed nothing."""

from collections.abc import Mapping

from torch import Tensor

from ..linalg import norm
from .base import Codec
from .full import Full


def store(codec: Codec, x: Tensor, held: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """|x|, and x as the codec stores it, in parts of its own; x, which may be one of them, is given up.

    Args:
        codec: that stores it.
        x: any tensor.
        held: the parts so far, which stay as they are: seeds go on from theirs.
    """
    if isinstance(codec, Full):
        return norm(x), {"value": x.contiguous()}
    parts = codec.parts(tuple(x.shape), x.dtype)
    own = {
        name: held[name].clone() if part.seed else x.new_empty(part.shape, dtype=part.dtype)
        for name, part in parts.items()
    }
    return codec.encode(x, own), own
