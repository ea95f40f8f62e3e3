"""Who takes part: our recipes by their own names, other people's optimizers by foreign ones.

A contender is written ``name`` or ``name:key=value;key=value``; the overrides go to :func:`comoving.build` (for
a foreign contender: to its constructor), values read as Python literals where they are, as strings elsewhere. "all" is
every recipe of ours.
"""

import hashlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comoving
from comoving.composition.table import FILE
from comoving.methods import DEFAULT
from comoving.race import sources
from comoving.race.extras import require
from comoving.race.settings import Rank, SettingsError, literal
from comoving.ranks.limit import parse_budget

ALL = "all"
"""Every recipe of ours, in place of a name."""


class Refused(Exception):
    """A contender cannot train this model; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One entry of ``--optimizers``.

    Args:
        label: as typed.
        name: without the overrides.
        overrides: keyword arguments.
        foreign: how to build it if it is not ours.
    """

    label: str
    name: str
    overrides: dict[str, Any]
    foreign: "Foreign | None" = None

    @property
    def relative_rate(self) -> float:
        """Default learning rate as a multiple of AdamW's."""
        return (
            comoving.recipes()[self.name.partition("+")[0]].relative_rate
            if self.foreign is None
            else self.foreign.relative_rate
        )

    @property
    def note(self) -> str:
        """What a reader of the table should know about it; often empty."""
        return "" if self.foreign is None else self.foreign.note

    def build(self, model: nn.Module, lr: float, rank: Rank, weight_decay: float) -> Any:
        """The optimizer; a recipe with a rank of its own keeps it.

        Raises:
            Refused: if it cannot take these weights, or its package is missing.
            TypeError, ValueError: for overrides that it does not know.
        """
        if self.foreign is None:
            own = comoving.recipes()[self.name.partition("+")[0]].rank
            options = {"rank": rank if own is None else own, "weight_decay": weight_decay, **self.overrides}
            return comoving.build(self.name, model, lr=lr, **options)
        try:
            return self.foreign.build(model, lr, rank, weight_decay, **self.overrides)
        except ImportError as error:
            raise Refused(str(error)) from error

    def code(self, wrapped: bool = False) -> str:
        """Digest of the code that steps: a finished run is used again only while it stays the same.

        Of ours, what :mod:`comoving` imports, and of the default optimizer the table that it chooses from; ``wrapped``
        for a run in several processes, to which more code belongs.
        """
        if self.foreign is not None:
            return ",".join([torch.__version__, *(version(package) for package in self.foreign.packages)])
        own = [*sources.of_optimizers(wrapped), *([FILE] if self.name == DEFAULT.name else [])]
        return f"{torch.__version__},{sources.digest(own)}"


@dataclass(frozen=True)
class Foreign:
    """Somebody else's optimizer.

    Args:
        build: (model, lr, rank, weight_decay, **overrides) -> optimizer.
        relative_rate: its usual rate as a multiple of AdamW's.
        note: shown in the report.
        packages: distributions it comes from.
    """

    build: Callable[..., Any]
    relative_rate: float = 1.0
    note: str = ""
    packages: tuple[str, ...] = field(default=("torch",))


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def version(package: str) -> str:
    """Installed version of a distribution, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def parse(label: str) -> Contender:
    """Read ``name:key=value;key=value``.

    Raises:
        SettingsError: for an unknown name (the message lists the known ones) or an override that is not ``key=value``.
    """
    name, _, rest = label.partition(":")
    name = name.strip()
    if name not in FOREIGN and name.partition("+")[0] not in (ours := comoving.recipes()):
        raise SettingsError(f"unknown optimizer {name!r}; ours: {', '.join(ours)}; foreign: {', '.join(FOREIGN)}")
    overrides: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in rest.split(";"))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise SettingsError(f"override {part!r} of {name!r} is not key=value")
        overrides[key.strip()] = literal(value)
    return Contender(label, name, overrides, FOREIGN.get(name))


def named(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels, with "all" as every recipe, at its own relative rate, that is not in the list by itself."""
    labels = tuple(labels)
    others = [name for name in comoving.recipes() if name not in labels]
    return tuple(name for label in labels for name in (others if label == ALL else [label]))


def stored(labels: Iterable[str], codecs: Sequence[str]) -> tuple[str, ...]:
    """Each label once for every codec, which stores the moments and, where there is any, what is fed back.

    Raises:
        SettingsError: a contender that is not ours.
    """
    if not codecs:
        return tuple(labels)
    found: list[str] = []
    for label in labels:
        contender = parse(label)
        if contender.foreign is not None:
            raise SettingsError(f"--codec stores the state of comoving's own recipes, and {contender.name} is none")
        roles = ["moments"] if comoving.recipes()[contender.name.partition("+")[0]].full_rank else ["moments", "codec"]
        for codec in codecs:
            options = ";".join(f"{role}={codec}" for role in roles)
            found.append(f"{label}{';' if contender.overrides else ':'}{options}")
    return tuple(found)


def budgeted(labels: Iterable[str], budgets: Sequence[str]) -> tuple[str, ...]:
    """Each label of the default optimizer once for every budget of its state; others as they are.

    Raises:
        SettingsError: no such label, or a budget that is none.
    """
    labels = tuple(labels)
    if not budgets:
        return labels
    for budget in budgets:
        try:
            parse_budget(budget, least=0)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    if not any(parse(label).name == DEFAULT.name for label in labels):
        raise SettingsError(f"--budget is of {DEFAULT.name}, which is not among {', '.join(labels)}")
    found: list[str] = []
    for label in labels:
        contender = parse(label)
        takes = contender.name == DEFAULT.name and "budget" not in contender.overrides
        start = f"{label}{';' if contender.overrides else ':'}budget="
        found += [f"{start}{budget}" for budget in budgets] if takes else [label]
    return tuple(found)


def hidden_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that low-rank methods are about: matrices and complex tensors that are no embedding, head or norm.

    Foreign optimizers project exactly these.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    left_out = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    left_out |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    names = ("classifier", "lm_head", "embeddings", "embed_tokens", "lifting", "projection")
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad
        and id(p) not in left_out
        and not any(part in names for part in name.split("."))
        and ((p.ndim == 2 and min(p.shape) > 1) or (p.is_complex() and p.ndim >= 2))
    }


def matrices(model: nn.Module, who: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices and all other parameters, for methods that know matrices only."""
    hidden = hidden_weights(model)
    tensors = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in hidden.items() if p.ndim != 2 or p.is_complex()]
    if tensors:
        raise Refused(
            f"{who} projects real matrices only; this model's hidden weights are tensors such as {tensors[0]}"
        )
    chosen = {id(p) for p in hidden.values()}
    return list(hidden.values()), [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]


def matrix_rank(rank: Rank, matrix: Tensor) -> int:
    """Directions on the short side: an int as it is, a fraction of the entries as that fraction of the side."""
    if isinstance(rank, tuple):
        raise Refused(f"takes one rank for all matrices, not {rank}")
    short = min(matrix.shape)
    return min(rank, short) if isinstance(rank, int) else max(1, round(rank * short))


def projected_groups(hidden: list[nn.Parameter], rest: list[nn.Parameter], rank: Rank, **options: Any) -> list[Any]:
    """Param groups of galore-torch and apollo-torch: the rest, then one group per rank."""
    by_rank: dict[int, list[nn.Parameter]] = {}
    for p in hidden:
        by_rank.setdefault(matrix_rank(rank, p), []).append(p)
    return [{"params": rest}, *({"params": ps, "rank": r, **options} for r, ps in by_rank.items())]


class Together:
    """Several optimizers stepped as one: what the runner needs of the optimizer interface, no more."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        self.parts = parts

    @property
    def state(self) -> dict[Tensor, Any]:
        """State of all parts, by parameter."""
        return {p: state for part in self.parts for p, state in part.state.items()}

    def state_dict(self) -> dict[str, Any]:
        """Of all parts."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of all parts, whose groups are new ones then."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Step every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad()


def torch_adamw(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """torch.optim.AdamW on everything."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, **options)


def torch_muon(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """torch.optim.Muon on hidden matrices, AdamW on the rest."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise Refused(f"torch {torch.__version__} has no torch.optim.Muon")
    hidden, rest = matrices(model, "torch's Muon")
    options = {"adjust_lr_fn": "match_rms_adamw", **options}
    return Together(
        muon(hidden, lr=lr, weight_decay=weight_decay, **options),
        torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay),
    )


def galore_torch(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """GaLoreAdamW with its README's settings, except the refresh period: short runs would see one frame only."""
    package = require("galore_torch", "bench")
    hidden, rest = matrices(model, "galore-torch")
    options = {"update_proj_gap": 50, "scale": 0.25, "proj_type": "std", **options}
    groups = projected_groups(hidden, rest, rank, **options)
    return package.GaLoreAdamW(groups, lr=lr, weight_decay=weight_decay, no_deprecation_warning=True)


def apollo_torch(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """APOLLO with its README's settings, except the refresh period."""
    package = require("apollo_torch", "bench")
    hidden, rest = matrices(model, "apollo-torch")
    chosen = {
        "proj": "random",
        "scale_type": "channel",
        "scale": 1,
        "update_proj_gap": 50,
        "proj_type": "std",
        **options,
    }
    return package.APOLLOAdamW(projected_groups(hidden, rest, rank, **chosen), lr=lr, weight_decay=weight_decay)


def torchao_adamw8bit(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """torchao's AdamW with 8-bit moments."""
    package = require("torchao.optim", "bench")
    if any(p.is_complex() for p in model.parameters()):
        raise Refused("torchao's 8-bit AdamW sets the imaginary part of complex weights to zero")
    return package.AdamW8bit(model.parameters(), lr=lr, weight_decay=weight_decay, **options)


def soap(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """pytorch_optimizer's SOAP on everything."""
    package = require("pytorch_optimizer", "bench")
    if any(p.is_complex() for p in model.parameters()):
        raise Refused("pytorch_optimizer's SOAP does not support complex weights")
    return package.SOAP(model.parameters(), lr=lr, weight_decay=weight_decay, **options)


def neuralop_tensor_galore(model: nn.Module, lr: float, rank: Rank, weight_decay: float, **options: Any) -> Any:
    """neuraloperator's AdamW with the hidden weights in its Tensor-GaLore group."""
    package = require("neuralop.training", "pde")
    hidden = list(hidden_weights(model).values())
    if any(p.ndim < 3 for p in hidden):
        raise Refused("neuraloperator's Tensor-GaLore is for tensors; this model's hidden weights are matrices")
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    share = list(rank) if isinstance(rank, tuple) else rank
    return package.AdamW(rest, lr=lr, weight_decay=weight_decay, galore_params=hidden, galore_rank=share, **options)


FOREIGN = {
    "torch-adamw": Foreign(torch_adamw),
    "torch-muon": Foreign(
        torch_muon, note="Muon on hidden matrices (update RMS matched to AdamW's), AdamW on the rest"
    ),
    "galore-torch": Foreign(galore_torch, 4.0, "update_proj_gap 50, scale 0.25", ("galore-torch",)),
    "apollo-torch": Foreign(
        apollo_torch, 4.0, "random projection, channel scaling, update_proj_gap 50", ("apollo-torch",)
    ),
    "torchao-adamw8bit": Foreign(torchao_adamw8bit, packages=("torchao",)),
    "pytorch-optimizer-soap": Foreign(soap, packages=("pytorch_optimizer",)),
    "neuralop-tensor-galore": Foreign(
        neuralop_tensor_galore,
        note="as published: an `is None and` where `is None or` is meant keeps the first gradient's subspace for ever",
        packages=("neuraloperator",),
    ),
}


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    """Every tensor inside dicts, lists, tensor subclasses and plain objects (projectors), each object visited once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        # A quantized tensor of torchao is a wrapper: its storage is empty, its parts are what is kept.
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
        else:
            for name in flatten()[0]:
                if isinstance(part := getattr(value, name), Tensor):  # a DTensor has its mesh there, too
                    yield from tensors_in(part, seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | torch.Generator):
        yield from tensors_in(vars(value), seen)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a slice keeps the whole of what it was cut from.

    Of a tensor that is sharded over processes what is in this one.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(list(tensors))}
    return sum(storages.values())


def state_bytes(optimizer: Any, parameters: Iterable[Tensor] | None = None) -> int:
    """Bytes of optimizer state, of all parameters or of ``parameters`` only; parameters and gradients do not count."""
    state = optimizer.state
    kept = list(state.values()) if parameters is None else [state[p] for p in parameters if p in state]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    own = {p.untyped_storage().data_ptr() for p in tensors_in(trained)}
    return storage_bytes(t for t in tensors_in(kept) if t.untyped_storage().data_ptr() not in own)
