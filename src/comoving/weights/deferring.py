"""A quantized layer that keeps what it learns beside its codes until the frame changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..validate import check_int
from .linear import CHANGE, FACTOR, QuantizedLinear, WeightCodec


class DeferringLinear(QuantizedLinear):
    """y = x W^T + b with W = decode(codes) + P B, or + B P^T (LoQT, arXiv 2405.16528).

    P, (m, r) or (n, r), is the factor of the optimizer's frame, and B, (r, n) or (m, r), the sum of its updates since
    the last refresh, in float32. Codes are written at refreshes alone, where P B is merged into them: rounding errors
    come in only as often as frames change, and B takes up what P can hold of them:

        Q = q(W),  B = P^T (W - Q);   repeatedly  Q = q(W - P B),  B = P^T (W - Q);   the pair of least |W - Q - P B|

    P is the very tensor of the optimizer's state where that holds it in full, so that it is there once.

    Args:
        weight, bias, codec, seed: as for :class:`QuantizedLinear`.
        compensate: repetitions, >= 0.
    """

    factor: Tensor | None
    change: Tensor | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, codec: WeightCodec, seed: int = 0, compensate: int = 5
    ) -> None:
        check_int("compensate", compensate, 0)
        super().__init__(weight, bias, codec, seed)
        self.compensate = compensate
        self.register_buffer(FACTOR, None)
        self.register_buffer(CHANGE, None)

    def merge(self, weights: Tensor, factor: Tensor, left: bool) -> None:
        """Encode W, and begin a new B in the frame of this factor.

        Args:
            weights: W, in the dtype of :meth:`decode`.
            factor: P, orthonormal.
            left: whether it stands on the left.
        """
        best: tuple[Tensor, list[Tensor], Tensor] | None = None
        aim = weights
        for _ in range(self.compensate + 1):
            self.encode(aim.clone(memory_format=torch.contiguous_format))
            rest = weights - self.codes_alone()
            change = factor.mT @ rest if left else rest @ factor
            lifted = factor @ change if left else change @ factor.mT
            error, codes = (rest - lifted).norm(), [x.clone() for x in self.numbers()]
            if best is None:
                best = error, codes, change
            else:  # chosen on the device, so that nothing is read
                better = error < best[0]
                chosen = [torch.where(better, new, old) for new, old in zip(codes, best[1], strict=True)]
                best = torch.minimum(error, best[0]), chosen, torch.where(better, change, best[2])
            aim = weights - lifted
        assert best is not None
        for x, value in zip(self.numbers(), best[1], strict=True):
            x.copy_(value)
        self.factor, self.change = factor, best[2]

    def take(self, weights: Tensor, shrink: float | Tensor) -> None:
        """B from a weight that was updated within the frame: the codes' share has shrunk, by their steps."""
        assert self.factor is not None and self.change is not None
        rest = weights - self.codes_alone().mul_(shrink)
        left = tuple(self.change.shape) == (self.factor.shape[1], self.in_features)
        self.change = self.factor.mT @ rest if left else rest @ self.factor
        self.stored()["step"].mul_(shrink)  # last, since the product may fail

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in (FACTOR, CHANGE):
            given = state_dict.get(prefix + name)
            # A new tensor in any case: the old one may be the optimizer's.
            setattr(self, name, None if given is None else torch.empty_like(given, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DeferringLinear":
        super()._apply(fn, recurse)
        for name in (FACTOR, CHANGE):
            own: Tensor | None = getattr(self, name)
            if own is not None:
                setattr(self, name, own.to(self.numbers()[0].device))
        return self
