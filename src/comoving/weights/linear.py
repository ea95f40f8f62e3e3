"""A linear layer whose weight is stored in codes."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..codecs import Int4, Int8
from ..draws import scramble

WeightCodec = Int8 | Int4
FACTOR, CHANGE = "factor", "change"
"""Buffers of :class:`comoving.weights.DeferringLinear`."""


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W = decode(codes), (out_features, in_features).

    Buffers hold W as the codec stores it: "codes", "step", and "seed", on the host, where the codec rounds
    stochastically. ``weight`` is a carrier: a parameter of W's shape and dtype, through which names, gradients and
    optimizers find W, but with the storage of a single NaN, so that who reads it instead of the codes notices. The
    forward pass decodes W, multiplies, and forgets it; the backward pass decodes it again. The gradient is that of W,
    as if the codes were continuous.

    An optimizer of this package finds the codes by the carrier (:func:`codes_of`), decodes, updates in float32 and
    encodes again. Any other optimizer fails to write to the carrier.

    The state dict holds the buffers and not the carrier; one of an ordinary linear layer is encoded when it is loaded.
    ``to(dtype)`` changes the dtype of products and gradients, not what is stored.

    Args:
        weight: the parameter W, real; becomes the carrier, the same object.
        bias: a parameter or None.
        codec: :class:`comoving.codecs.Int8` or :class:`comoving.codecs.Int4`.
        seed: of stochastic rounding, in [0, 2^63).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, codec: WeightCodec, seed: int = 0) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.codec = codec
        for name, spec in codec.schema(tuple(weight.shape), weight.dtype).items():
            device = torch.device("cpu") if spec.seed else weight.device
            self.register_buffer(name, torch.zeros(spec.shape, dtype=spec.dtype, device=device))
            if spec.seed:
                self.get_buffer(name).fill_(scramble(seed))
        with torch.no_grad():
            if not weight.is_meta:
                self.encode(weight.detach().to(_working(weight.dtype), copy=True))
            weight.data = _carrier(weight)
        self.weight = weight
        self.register_parameter("bias", bias)
        _OWNERS[id(weight)] = self

    def stored(self) -> dict[str, Tensor]:
        """What the codec stores, seed included."""
        names = self.codec.schema((self.out_features, self.in_features), torch.float32)
        return {name: self.get_buffer(name) for name in names}

    def numbers(self) -> list[Tensor]:
        """What is stored on the weight's device, without the seed."""
        return [x for x in self.stored().values() if x.ndim > 0]

    def codes_alone(self) -> Tensor:
        """What the codes say, a new tensor, in float32 or the carrier's wider dtype."""
        return self.codec.decode(self.stored(), (self.out_features, self.in_features), _working(self.weight.dtype))

    def decode(self) -> Tensor:
        """W, a new tensor, in float32 or the carrier's wider dtype."""
        return _read(self.codec, self._kept(), (self.out_features, self.in_features), _working(self.weight.dtype))

    def _kept(self) -> dict[str, Tensor]:
        """All that W is read of."""
        kept = {name: x for name, x in self.stored().items() if x.ndim > 0}
        return kept | {name: x for name in (FACTOR, CHANGE) if (x := self._buffers.get(name)) is not None}

    def encode(self, x: Tensor) -> None:
        """Store W, rounded as the codec rounds; overwrites x, contiguous and in the dtype of :meth:`decode`."""
        self.codec.encode(x, self.stored())

    def release(self) -> nn.Parameter:
        """The weight as an ordinary parameter, the same object, with the decoded numbers instead of the codes."""
        self.weight.data = self.decode().to(self.weight.dtype)
        _OWNERS.pop(id(self.weight), None)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b, in the carrier's dtype, or autocast's where that is on.

        Raises:
            RuntimeError: the weight was replaced by another parameter.
        """
        if codes_of(self.weight) is not self:
            raise RuntimeError(
                "the weight of a QuantizedLinear was replaced: it holds no numbers, they are in the codes. Load a "
                "state dict, or take comoving.weights.dequantize(model), assign, and quantize again"
            )
        kind, dtype = x.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x = x.to(dtype)
        stored = self._kept()
        apply: Callable[..., Tensor] = _Product.apply
        return apply(x, self.weight, self.bias, self.codec, dtype, tuple(stored), *stored.values())

    def extra_repr(self) -> str:
        """Sizes and codec."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, codec={self.codec}"

    # ------------------------------------------------------------------------------------- moving, copying and loading

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move the codes with the model, in the dtypes that they have; the carrier stays a single number."""
        carrier = self.weight
        moved = fn(carrier.detach().as_strided((), ()))
        if moved.dtype.is_complex:
            raise TypeError(f"a QuantizedLinear holds a real weight, and cannot become {moved.dtype}")
        parameters, buffers = self._parameters, self._buffers
        self._parameters, self._buffers = {"bias": self.bias}, {}  # dtypes of what is stored stay
        try:
            super()._apply(fn, recurse)
            parameters["bias"] = self._parameters["bias"]
        finally:
            self._parameters, self._buffers = parameters, buffers
        for name, stored in self.stored().items():
            if stored.ndim > 0:
                other = fn(stored)
                buffers[name] = other if other.dtype == stored.dtype else stored.to(other.device)
        gradient, carrier.grad = carrier.grad, None
        data = _carrier(moved.expand(carrier.shape))
        if carrier.is_meta != moved.is_meta:  # no parameter can change between these two
            del _OWNERS[id(carrier)]
            carrier = parameters["weight"] = nn.Parameter(data, carrier.requires_grad)
            _OWNERS[id(carrier)] = self
        else:
            carrier.data = data
        if gradient is not None:
            carrier.grad = fn(gradient)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given, key = dict(state_dict), f"{prefix}weight"
        names, shape = list(self.stored()), (self.out_features, self.in_features)
        dense = given.pop(key, None)
        if dense is not None and not any(f"{prefix}{name}" in given for name in names):
            if tuple(dense.shape) != shape or dense.is_complex():
                error_msgs.append(f"size mismatch for {key}: {dense.dtype} {tuple(dense.shape)} into codes of {shape}")
            else:
                self.encode(dense.detach().to(self.weight.device, _working(self.weight.dtype), copy=True).contiguous())
            given |= {f"{prefix}{name}": self.get_buffer(name).clone() for name in names}
        elif dense is not None:
            unexpected_keys.append(key)
        super()._load_from_state_dict(given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:
            missing_keys.remove(key)

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedLinear":
        """A copy with a carrier of its own, of a single number too; an optimizer that is copied along holds it."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        mine = self.weight
        carrier = memo.setdefault(id(mine), nn.Parameter(_carrier(mine), mine.requires_grad))
        carrier.data = _carrier(carrier)  # which may be one without data
        if mine.grad is not None:
            carrier.grad = deepcopy(mine.grad, memo)
        new.__setstate__(deepcopy(self.__dict__, memo))
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a copy or a pickle."""
        super().__setstate__(state)
        _OWNERS[id(self.weight)] = self


_OWNERS: WeakValueDictionary[int, QuantizedLinear] = WeakValueDictionary()


def codes_of(p: Tensor) -> QuantizedLinear | None:
    """The module that holds a parameter's codes; None for a parameter that holds its own numbers."""
    owner = _OWNERS.get(id(p))
    return owner if owner is not None and owner.weight is p else None


def _working(dtype: torch.dtype) -> torch.dtype:
    """Half precision is decoded to float32."""
    return torch.promote_types(dtype, torch.float32)


def _carrier(like: Tensor) -> Tensor:
    """The shape and dtype of a weight on the storage of one number."""
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(like.shape)


class _Product(torch.autograd.Function):
    """X W^T + b from the codes of W, which are kept for the backward pass instead of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        carrier: Tensor,
        bias: Tensor | None,
        codec: WeightCodec,
        dtype: torch.dtype,
        names: tuple[str, ...],
        *stored: Tensor,
    ) -> Tensor:
        ctx.codec, ctx.dtype, ctx.names, ctx.shape = codec, dtype, names, tuple(carrier.shape)
        ctx.dtypes = carrier.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if carrier.requires_grad else None, *stored)
        return F.linear(x, _decoded(ctx, stored), bias if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch calls it by place)
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        given: Tensor = grad_outputs[0]
        x, *stored = ctx.saved_tensors
        rows = given.reshape(-1, given.shape[-1])
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        of, of_bias = ctx.dtypes
        return (
            given @ _decoded(ctx, stored) if by_x else None,
            (rows.mT @ x.reshape(-1, x.shape[-1])).to(of) if by_weight else None,
            rows.sum(0).to(of_bias) if by_bias else None,
            *(None for _ in range(3 + len(stored))),
        )


def _decoded(ctx: Any, stored: Any) -> Tensor:
    named = dict(zip(ctx.names, stored, strict=True))
    return _read(ctx.codec, named, ctx.shape, _working(ctx.dtype)).to(ctx.dtype)


def _read(codec: WeightCodec, stored: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """W = decode(codes), + P B or B P^T where there is a change in a frame."""
    codes = codec.decode(stored, shape, dtype)
    if CHANGE not in stored:
        return codes
    p, b = stored[FACTOR].to(dtype), stored[CHANGE].to(dtype)
    return codes.addmm_(p, b) if tuple(b.shape) == (p.shape[1], shape[1]) else codes.addmm_(b, p.mT)
