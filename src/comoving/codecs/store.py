"""Encoding beside what is there, so that a step that fails has changed nothing."""

from collections.abc import Mapping

from torch import Tensor

from ..linalg import norm
from .base import Codec, Spec
from .full import Full


def store(codec: Codec, x: Tensor, before: Mapping[str, Tensor], rows: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """|x|, (*rows), and x as the codec stores it, in tensors of its own; x, which may be one of them, is given up.

    Args:
        codec: that stores it.
        x: any tensor, with the members of a batch in front.
        before: what is stored so far, which stays as it is: seeds go on from theirs, and so does what is kept.
        rows: how many dimensions count members, 0 or 1.
    """
    if isinstance(codec, Full):
        return norm(x, rows), {"value": x.contiguous()}
    shape = tuple(x.shape)
    lead, schema = shape[:rows], codec.schema(shape[rows:], x.dtype)
    own = {
        name: before[name].clone()
        if spec.seed
        else _kept(before.get(name), x, lead, spec)
        if spec.kept
        else x.new_empty(lead + spec.shape, dtype=spec.dtype)
        for name, spec in schema.items()
    }
    if not x.numel():
        return norm(x, rows), own
    return codec.encode(x, own, rows), own


def _kept(before: Tensor | None, x: Tensor, lead: tuple[int, ...], spec: Spec) -> Tensor:
    """What was there, where it has this shape; else zeros."""
    if before is not None and before.shape == lead + spec.shape:
        return before.clone()
    return x.new_zeros(lead + spec.shape, dtype=spec.dtype)
