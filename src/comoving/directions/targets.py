"""Which linear layers are meant: patterns of names, and what transformers' models call the same layers."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""All large matrices of a transformer, by the names of timm."""

EQUIVALENTS = {
    "attn.qkv": r"attn\.(qkv|c_attn)|(attention|attn|self_attn)\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value)"
    r"|attention\.(attention|self)\.(query|key|value)",
    "attn.proj": r"attn\.(proj|c_proj)|(attention|attn|self_attn)\.(o_proj|out_proj|dense)|attention\.output\.dense",
    "mlp.fc1": r"mlp\.(fc1|up_proj|gate_proj|gate_up_proj|c_fc|dense_h_to_4h)|intermediate\.dense",
    "mlp.fc2": r"mlp\.(fc2|down_proj|c_proj|dense_4h_to_h)|(?<!attention\.)output\.dense",
}
"""timm's name -> the ends of the names that BERT, GPT-2, GPT-NeoX, LLaMA and ViT of transformers give them."""


def targets(model: nn.Module, patterns: str | Iterable[str] = TARGETS) -> dict[str, nn.Module]:
    """The modules that ``patterns`` name, in the order of the model.

    A pattern is the end of a dotted name (``attn.qkv`` means every module called so), with the wildcards of
    :mod:`fnmatch`; ``attn.qkv``, ``attn.proj``, ``mlp.fc1`` and ``mlp.fc2`` also find the same layers under the names
    that transformers' models give them. Every module found must hold a ``weight`` with two modes.

    Args:
        model: any module.
        patterns: separated by commas, or as a list.

    Raises:
        ValueError: no pattern at all; a pattern that matches nothing, or a module without a matrix; a module, or a
            weight, that two names share.
    """
    wanted = [p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns) if p.strip()]
    if not wanted:
        raise ValueError("no target is named; give patterns such as attn.qkv,mlp.fc1")
    everything = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    everything = [(name, module) for name, module in everything if "parametrizations" not in name.split(".")]
    found: dict[str, nn.Module] = {}
    for pattern in wanted:
        matched = {name: module for name, module in everything if _matches(name, pattern)}
        if not matched:
            raise ValueError(f"pattern {pattern!r} matches no module; matrices are in {_some(_matrices(everything))}")
        for name, module in matched.items():
            if not _is_matrix(module):
                inside = [other for other in _matrices(everything) if other.startswith(name + ".")]
                hint = f"; inside of it are {_some(inside)}" if inside else ""
                raise ValueError(f"pattern {pattern!r} matches {name}, which is no matrix{hint}")
        found |= matched
    ordered = {name: module for name, module in everything if name in found}
    _refuse_shared(ordered)
    return ordered


def matrix_of(module: nn.Module) -> nn.Parameter:
    """The parameter that is trained: the weight itself, or what a parametrization starts from.

    Raises:
        ValueError: a parametrization that starts from several tensors (weight_norm).
    """
    if parametrize.is_parametrized(module, "weight"):
        original = getattr(module.parametrizations.weight, "original", None)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        if original is None:
            raise ValueError(f"the weight of {module} is parametrized from several tensors, no one matrix is trained")
        return original
    return module.weight  # pyright: ignore[reportReturnType]


def _matches(name: str, pattern: str) -> bool:
    if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"):
        return True
    return pattern in EQUIVALENTS and re.search(rf"(^|\.)({EQUIVALENTS[pattern]})$", name) is not None


def _is_matrix(module: nn.Module) -> bool:
    if parametrize.is_parametrized(module, "weight"):  # a look at the weight itself may move it (spectral_norm)
        original: Any = getattr(module.parametrizations["weight"], "original", None)  # pyright: ignore[reportIndexIssue, reportArgumentType]
        return original is None or original.ndim == 2  # without one, matrix_of says why not
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _matrices(everything: Iterable[tuple[str, nn.Module]]) -> list[str]:
    return [name for name, module in everything if _is_matrix(module)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "no module"


def _refuse_shared(found: dict[str, nn.Module]) -> None:
    seen: dict[int, str] = {}
    for name, module in found.items():
        first = seen.setdefault(id(matrix_of(module)), name)
        if first != name:
            raise ValueError(f"{first} and {name} share one weight; name it once, or use a model without the sharing")
