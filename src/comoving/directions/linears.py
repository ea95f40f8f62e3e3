"""The layers that branches and extraction change: found by patterns, and refused before anything changes."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..validate import check_int
from ..weights import codes_of
from .targets import targets


def changeable(model: nn.Module, patterns: str | Iterable[str], what: str) -> dict[str, nn.Module]:
    """The modules that the patterns name, with plain floating-point weights of their own.

    Raises:
        ValueError: what :func:`targets` refuses; a parametrized or quantized layer, a weight that is not real floating
            point, or one that another module shares.
    """
    if any(type(module).__name__ == "DistributedDataParallel" for module in model.modules()):
        raise ValueError(f"{what}: change the model before DistributedDataParallel wraps it")
    found = targets(model, patterns)
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for _, p in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(p), set()).add(name)
    for name, module in found.items():
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"{what}: {name} is parametrized already; merge or fold that first")
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or codes_of(weight) is not None:
            kind = "quantized" if isinstance(weight, nn.Parameter) and codes_of(weight) is not None else "no parameter"
            dtype = weight.dtype if isinstance(weight, Tensor) and not weight.is_floating_point() else kind
            raise ValueError(f"{what}: the weight of {name} must be a floating-point parameter, it is {dtype}")
        others = sorted(holders[id(weight)] - {name})
        if others:
            raise ValueError(f"{what}: {name} shares its weight with {', '.join(others)}; it would change there, too")
    return found


def check_rank(what: str, name: str, rank: int, shape: Sequence[int]) -> None:
    """Raise unless rank is an int in [1, min(shape)].

    Raises:
        TypeError, ValueError: with the layer, the value and the interval.
    """
    check_int("rank", rank, 1)
    if rank > min(shape):
        raise ValueError(f"{what}: rank must lie in [1, {min(shape)}] for {name} of {tuple(shape)}, got {rank}")


def restored(module: nn.Module) -> nn.Parameter:
    """Take the parametrization of a weight away: the weight is the original parameter again, as it stands.

    It is the first of the module's parameters, as in torch's modules: an optimizer that is built later numbers its
    state by this order.
    """
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for name, p in list(module.named_parameters(recurse=False)):
        if name != "weight":
            delattr(module, name)
            module.register_parameter(name, p)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
