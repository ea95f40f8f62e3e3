"""A model's weights into codes, and back."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..codecs import Int4, Int8
from ..draws import scramble
from ..validate import check_int
from .deferring import DeferringLinear
from .linear import QuantizedLinear, WeightCodec

Model = TypeVar("Model", bound=nn.Module)

# These read their layers' weights themselves, past the layers' own forward.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def quantize(
    model: Model,
    codec: WeightCodec = Int8(rounding="stochastic"),  # noqa: B008  (frozen)
    modules: Sequence[type[nn.Linear]] = (nn.Linear,),
    skip: Sequence[str] = (),
    seed: int = 0,
    compensate: int | None = None,
) -> Model:
    """Replace linear layers by :class:`QuantizedLinear`, in place: of their weights only codes are kept.

    Call it before the optimizer is built. Parameters keep their names and identity, and biases their numbers. Weights
    that are trained need a codec that rounds stochastically: with rounding to nearest an update below half a step is
    lost. Q-GaLore (arXiv 2407.08296) trains in 8 bits with blocks of 256, which is the default.

    Args:
        model: changed in place.
        codec: :class:`comoving.codecs.Int8` or :class:`comoving.codecs.Int4`.
        modules: exact types of the layers to replace, with nn.Linear's own forward.
        skip: glob patterns of the names of layers that stay as they are, such as "lm_head".
        seed: of stochastic rounding; each layer's own follows from it and the layer's place.
        compensate: None to encode every update; a number >= 0 to keep updates beside the codes between refreshes, and
            merge them with so many repetitions of error compensation (:class:`DeferringLinear`), for the recipe "loqt".

    Returns:
        The model.

    Raises:
        TypeError: a codec that cannot store weights, a type that is no linear layer, or a complex weight.
        ValueError: nothing to quantize, a pattern that matches no layer, a weight that is shared, has hooks or
            non-finite numbers, or belongs to a module that reads it itself. Nothing has changed then.
    """
    _check_choice(codec, modules)
    check_int("seed", seed, 0)
    if compensate is not None:
        check_int("compensate", compensate, 0)
    found = [
        (path, m)
        for path, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Linear) and type(m) in modules
    ]
    unused = [pattern for pattern in skip if not any(fnmatchcase(path, pattern) for path, _ in found)]
    if unused:
        raise ValueError(f"no layer of {type(model).__name__} matches skip {', '.join(map(repr, unused))}")
    chosen = [(path, m) for path, m in found if not any(fnmatchcase(path, pattern) for pattern in skip)]
    if not chosen:
        names = ", ".join(kind.__name__ for kind in modules)
        raise ValueError(f"{type(model).__name__} has no layer of type {names} left to quantize")
    holders = _holders(model)
    for path, module in chosen:
        _check(model, path, module, holders)
    for index, (path, module) in enumerate(chosen):
        weight: Any = module.weight
        own = _bias(module), codec, scramble(seed, index)
        stored = QuantizedLinear(weight, *own) if compensate is None else DeferringLinear(weight, *own, compensate)
        _replace(model, path, stored.train(module.training))
    return model


def dequantize(model: Model) -> Model:
    """Replace every :class:`QuantizedLinear` by an nn.Linear with the decoded weight, in place.

    Parameters stay the same objects; optimizers that were built before refuse to go on.

    Raises:
        ValueError: there is none.
    """
    chosen = [(path, m) for path, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no quantized layers")
    for path, module in chosen:
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        linear.weight = module.release()
        linear.register_parameter("bias", module.bias)
        _replace(model, path, linear.train(module.training))
    return model


def _check_choice(codec: object, modules: Sequence[object]) -> None:
    if not isinstance(codec, Int8 | Int4):
        raise TypeError(f"codec must be Int8(...) or Int4(...), which store signed numbers one by one, got {codec!r}")
    for kind in modules:
        if not (isinstance(kind, type) and issubclass(kind, nn.Linear) and kind.forward is nn.Linear.forward):
            raise TypeError(f"modules must be types with the forward of nn.Linear, got {kind!r}")


def _bias(module: nn.Module) -> nn.Parameter | None:
    bias: Any = getattr(module, "bias", None)  # nn.Linear declares none that may be missing
    return bias


def _check(model: nn.Module, path: str, module: nn.Linear, holders: dict[int, list[str]]) -> None:
    weight, parent = module.weight, model.get_submodule(path.rpartition(".")[0])
    if not path:
        raise ValueError("the model is itself a linear layer, which cannot be replaced in place: put it into another")
    if isinstance(parent, _READERS):
        kind = type(parent).__name__
        raise ValueError(f"{path}: {kind} reads its layers' weights itself, where codes would be missed; use skip=")
    if is_lazy(weight):
        raise ValueError(f"{path}.weight is not initialized yet: run the model once")
    if weight.is_complex():
        raise TypeError(f"{path}.weight is {weight.dtype}: only real weights are stored in codes; use skip=")
    names = holders[id(weight)]
    if len(names) > 1:
        raise ValueError(f"{path}.weight is shared, as {' and '.join(names)}: codes have one place; use skip=")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise ValueError(f"{path} has hooks, which would be lost: add them after quantize(), or use skip=")
    if not weight.is_meta and not bool(weight.detach().isfinite().all()):
        raise ValueError(f"{path}.weight is not finite: no step could hold it")


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter, those of shared modules too."""
    names: dict[int, list[str]] = {}
    for name, p in _all_parameters(model):
        names.setdefault(id(p), []).append(name)
    return names


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    above, _, name = path.rpartition(".")
    model.get_submodule(above).register_module(name, module)
