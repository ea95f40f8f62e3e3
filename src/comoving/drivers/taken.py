"""What stands in ``p.grad`` for a gradient that was taken up inside the backward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NEW = {torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_ZEROS = {torch.ops.aten.zero_.default, torch.ops.aten._foreach_zero_.default}


STEPPED = (
    "freed, since step_in_backward() was called; what stands in p.grad has no numbers. To clip gradients by their norm "
    "call optimizer.step_in_backward(clip=...) in place of clip_grad_norm_() (Lightning's gradient_clip_val is "
    "switched off; a Hugging Face Trainer gets max_grad_norm=0 and a _get_grad_norm() that returns None); "
    "optimizer.gradient_norm is the norm then. step_after_backward() goes back to gradients that stay"
)
SENT = (
    "sent to the other processes as its core alone, since comoving.distributed.compress() was called; what stands in "
    "p.grad has no numbers, and no process has the mean of the gradients. Leave out what reads them, clip_grad_norm_() "
    "(Lightning's gradient_clip_val, a Hugging Face Trainer's max_grad_norm) and GradScaler among them, or train "
    "without compress()"
)
"""Why a gradient is not there, and what to do about it."""


class TakenUp(Tensor):
    """A tensor of a gradient's shape, dtype and device without its numbers, on which arithmetic raises.

    Without it ``p.grad`` would be None, and ``torch.nn.utils.clip_grad_norm_``, like all that skips parameters without
    a gradient, would do nothing and say nothing. It can be copied, moved and set to zero, none of which needs numbers.

    Made by :func:`stand_in`; its storage is a single number.
    """

    of: str
    why: str

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TakenUp({self.of!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "TakenUp":
        return stand_in(self, self.of, self.why)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made, (self.shape, self.dtype, self.device, self.of, self.why)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """A copy of it, nothing for zeros, and an error for the rest.

        Raises:
            RuntimeError: saying where the gradient is, and how gradients are clipped.
        """
        given = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        own = next((x for x in given if isinstance(x, TakenUp)), None)
        if func in _ZEROS:
            for x in given:  # a list may hold gradients as well
                if not isinstance(x, TakenUp):
                    x.zero_()
            return args[0] if func is torch.ops.aten.zero_.default else None
        if func in _NEW and own is not None:
            options = kwargs or {}
            dtype, device = options.get("dtype") or own.dtype, options.get("device") or own.device
            return _made(own.shape, dtype, device, own.of, own.why)
        name, why = (own.of, own.why) if own is not None else ("a parameter", STEPPED)
        raise RuntimeError(f"{func}: the gradient of {name} was taken up inside backward() and {why}")


def stand_in(like: Tensor, name: str, why: str = STEPPED) -> TakenUp:
    """What stands for the gradient of a parameter of this name, and says this where it is asked for numbers."""
    return _made(like.shape, like.dtype, like.device, name, why)


def _made(shape: Sequence[int], dtype: torch.dtype, device: torch.device, of: str, why: str) -> TakenUp:
    number = torch.empty((), dtype=dtype, device=device).expand(shape)
    made: Any = Tensor._make_subclass(TakenUp, number)  # noqa: SLF001
    made.of, made.why = of, why
    return made
