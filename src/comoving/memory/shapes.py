"""Models to plan for, without data: built in, from settings, from a Hugging Face config, or from user code."""

import importlib
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..race.extras import require
from .activations import Activations, Operator, Transformer
from .fno import parse_fno
from .llama import LLAMAS

_LANGUAGE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


@dataclass(frozen=True)
class Subject:
    """A model on the meta device, and what is known of its activations.

    Args:
        name: as the user named it.
        module: parameters and buffers without data.
        activations: an estimate, or None where nothing is known.
    """

    name: str
    module: nn.Module
    activations: Activations | None = None


def subject(model: str | nn.Module | object, dtype: torch.dtype | None = None) -> Subject:
    """A model to plan for.

    Args:
        model: a name of :data:`comoving.memory.llama.LLAMAS`; settings ``fno:modes=16x16,channels=64,layers=4``; the
            path of a Hugging Face config, a JSON file; ``package.module:function``, user code that returns a module and
            is called under the meta device; a module, of which a copy without data is made; or a transformers config.
        dtype: of the real floating-point parameters; None for float32, or for a module as it is.

    Raises:
        ValueError: an unknown name, wrong settings, a file that is no config, or a config without the fields that are
            needed, with their names.
        ImportError: a Hugging Face config without transformers, with the extra to install; user code not to be found.
        TypeError: anything else.
    """
    if isinstance(model, nn.Module):
        return Subject(type(model).__name__, _cast(without_data(model), dtype))
    if not isinstance(model, str | Path):
        if not hasattr(model, "to_dict") or not hasattr(model, "model_type"):
            raise TypeError(f"a plan takes a model, its name, or a config of transformers, not {type(model).__name__}")
        return _from_config(str(model.model_type), model.to_dict(), dtype)  # pyright: ignore[reportAttributeAccessIssue]
    name = str(model)
    if name.lower() in LLAMAS:
        sizes = LLAMAS[name.lower()]
        kept = Transformer(sizes.hidden, sizes.kv_width, sizes.intermediate, sizes.layers, True, sizes.vocabulary)
        return Subject(name.lower(), sizes.build(dtype or torch.float32), kept)
    if name.startswith("fno:"):
        fno = parse_fno(name)
        frequencies = prod((*fno.modes[:-1], fno.modes[-1] // 2 + 1))
        kept = Operator(fno.channels, fno.layers, frequencies, fno.points)
        return Subject(name, fno.build(dtype or torch.float32), kept)
    if Path(name).suffix == ".json" or Path(name).is_file():
        return _from_config(Path(name).name, _read(Path(name)), dtype)
    if ":" in name:
        return Subject(name, _cast(_from_code(name), dtype))
    raise ValueError(
        f"unknown model {name!r}: give one of {', '.join(LLAMAS)}, settings such as "
        f"fno:modes=16x16,channels=64,layers=4, the path of a Hugging Face config, or package.module:function"
    )


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are on the meta device; tied ones stay tied."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return deepcopy(model, memo)


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if dtype is not None:
        for p in module.parameters():
            if p.is_floating_point():
                p.data = p.data.to(dtype)
    return module


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no config {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no config, a JSON object with fields")
    return fields


def _from_config(name: str, fields: Mapping[str, Any], dtype: torch.dtype | None) -> Subject:
    """A model of transformers from the fields of its config."""
    vision = "image_size" in fields or "patch_size" in fields
    needed = ("model_type", *(_VISION if vision else _LANGUAGE))
    missing = [field for field in needed if fields.get(field) is None]
    if missing:
        kind = "an image model" if vision else "a language model"
        raise ValueError(f"the config {name} lacks {', '.join(missing)}, which the plan of {kind} needs")
    wrong = [f for f in needed[1:] if not isinstance(fields[f], int) or isinstance(fields[f], bool) or fields[f] < 1]
    if wrong:
        raise ValueError(f"in the config {name}, {', '.join(wrong)} must be integers >= 1")
    transformers = require("transformers", "hf")
    own = {key: value for key, value in fields.items() if key not in {"model_type", "torch_dtype", "dtype"}}
    try:
        config = transformers.AutoConfig.for_model(fields["model_type"], **own)
        maker = transformers.AutoModelForImageClassification if vision else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            module = maker.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"transformers makes no model of the config {name}: {error}") from None
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    kv_width = hidden // heads * int(fields.get("num_key_value_heads") or heads)
    layers, wide = fields["num_hidden_layers"], fields["intermediate_size"]
    if vision:
        tokens = (fields["image_size"] // fields["patch_size"]) ** 2 + 1
        kept = Transformer(hidden, kv_width, wide, layers, False, int(getattr(config, "num_labels", 2)), tokens)
    else:
        gated = any(key.endswith("gate_proj.weight") for key, _ in module.named_parameters())
        kept = Transformer(hidden, kv_width, wide, layers, gated, fields["vocab_size"])
    return Subject(name, _cast(module, dtype), kept)


def _from_code(name: str) -> nn.Module:
    """What ``package.module:function`` returns under the meta device."""
    path, _, function = name.partition(":")
    try:
        found: Callable[[], Any] | None = getattr(importlib.import_module(path), function, None)
    except (ImportError, ValueError) as error:
        raise ImportError(f"--model {name}: {path} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"{path} has no function {function!r} that makes a model")
    with torch.device("meta"):
        module = found()
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} returned a {type(module).__name__}, not a torch.nn.Module")
    return without_data(module)
