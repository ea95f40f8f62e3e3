"""Codes that are kept in the weights themselves."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Codec, Spec
from .int8 import Int8


@dataclass(frozen=True)
class InWeights:
    """Codes in the low mantissa bits of the float32 weights that they are of, so that they take no memory.

    A float32 weight has 23 bits of mantissa, while bfloat16, whose 7 suffice for forward and backward passes, is what
    they are mostly rounded to there. Of moments in 8 bits, codes and steps take 9 of the 23; weights keep 14 and are
    rounded to them stochastically (:mod:`comoving.codecs.mantissa`). The state is empty: a checkpoint of the model has
    the moments in it, and goes on bitwise with one of the optimizer for the step count.

    Whoever else changes the weights (an average put in their place, a cast, a new start) changes what is kept in them.
    A sum over all bits tells; moments then begin anew from zero, as a new optimizer's would.

    For ``moments`` of float32 and complex64 parameters in a whole frame, of Muon's kind of rule and Lion, which go by
    no age of their averages. Parameters with few entries in a row, so that steps would take more than 12 bits of each
    weight, are refused.

    Args:
        codec: that makes the codes; one that rounds to the nearest, since seeds would be state.
    """

    codec: Codec = Int8()  # noqa: RUF009

    def __post_init__(self) -> None:
        if isinstance(self.codec, InWeights):
            raise ValueError("codec of InWeights() must be one that stores by itself, got InWeights() again")
        drawn = [n for n, spec in self.codec.schema((8, 8), torch.float32).items() if spec.seed or spec.kept]
        if drawn:
            raise ValueError(
                f"codec must keep nothing between encodings, as with rounding='nearest', got {self.codec}, which keeps "
                f"{', '.join(drawn)}"
            )

    @property
    def batched(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the codec does."""
        return self.codec.batched

    @property
    def signed(self) -> bool:
        """As the codec does."""
        return self.codec.signed

    @property
    def positive(self) -> Codec:
        """The codec's own; where the codes are is asked of this one."""
        return self.codec.positive

    def schema(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Spec]:
        """What the codec stores, which is in no state."""
        return self.codec.schema(shape, dtype)

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As the codec does."""
        return self.codec.decode(stored, shape, dtype)

    def decode_onto(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """As the codec does."""
        return self.codec.decode_onto(x, stored)

    def encode(self, x: Tensor, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """As the codec does."""
        return self.codec.encode(x, stored, rows)

    def scaled(self, stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """As the codec does."""
        return self.codec.scaled(stored, factor)

    def error(self, stored: Mapping[str, Tensor], rows: int = 0) -> Tensor:
        """As the codec does."""
        return self.codec.error(stored, rows)
