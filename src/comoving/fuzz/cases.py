"""Cases: what is built, and what it is given, drawn from two integers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Full
from ..frames import Blocks
from ..grouping import param_groups
from ..optimizer import LowRankOptimizer
from ..recipes import Recipe, build, recipes
from .gradients import STRUCTURES, sequence
from .parts import THIN, composition, pick, shown

__all__ = ["Case", "Parameter", "draw"]

DTYPES: tuple[tuple[torch.dtype, float], ...] = (
    (torch.float32, 6), (torch.complex64, 2), (torch.float64, 1.5), (torch.complex128, 0.7), (torch.bfloat16, 1.5),
    (torch.float16, 0.8),
)  # fmt: skip
NAMES = ("weight", "layers.0.weight", "attn.q.weight", "mlp.up.weight", "conv.weight", "tok_emb.weight", "norm.weight")
_LARGEST = 2500
_FULL_RANK_REFUSES = {
    "side", "scale", "codec", "bases", "ranks", "budget", "transport", "residual", "finder", "cadence",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One parameter of a case.

    Args:
        name: dotted, as in a model.
        shape: of one to five modes.
        dtype: any floating or complex one.
        layout: of its memory: "contiguous", "channels_last" or "transposed" (the modes reversed).
        start: its first values: "zero", "small" (0.02) or "unit" normal.
        structure: of its gradients, one of :data:`comoving.fuzz.gradients.STRUCTURES`.
        strides: of its gradients: "own", that of the parameter; "reversed"; or "conjugate", lazily.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    start: str = "small"
    structure: str = "gaussian"
    strides: str = "own"

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        extra = [x for x in (self.layout, self.start, self.strides) if x not in {"contiguous", "small", "own"}]
        return " ".join([f"{self.name} {kind}{list(self.shape)}", *extra, self.structure])


@dataclass(frozen=True)
class Case:
    """An optimizer, the parameters that it steps, and what happens on the way.

    Args:
        seed, index: what it was drawn from; they seed its gradients too.
        recipe: the name of a recipe; None for a composition of parts.
        options: hyper-parameters and parts.
        parameters: of the model.
        rank: of the recipe or composition.
        lr: learning rate.
        steps: how many.
        experts: whether slices along mode 0 of tensors are experts.
        heads: rows of an attention head; 0 for none.
        resume: before which step a twin is made from a checkpoint; None for none.
        absorbed: gradients in a step: 1, or more through absorb() and apply().
        bad: the step at which one gradient has a NaN that must be skipped; None for none.
        chosen: the recipes that it was drawn from, for its command; none for all.
    """

    seed: int
    index: int
    recipe: str | None
    options: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    rank: Any = 0.25
    lr: float = 1e-2
    steps: int = 10
    experts: bool = False
    heads: int = 0
    resume: int | None = None
    absorbed: int = 1
    bad: int | None = None
    chosen: tuple[str, ...] = field(default=(), compare=False)

    @property
    def command(self) -> str:
        """What repeats it."""
        only = f" --recipes {','.join(self.chosen)}" if self.chosen else ""
        return f"python -m comoving.fuzz --seed {self.seed} --case {self.index}{only}"

    def __str__(self) -> str:
        flags = [
            *([f"absorbed={self.absorbed}"] if self.absorbed > 1 else []),
            *([f"resume={self.resume}"] if self.resume is not None else []),
            *([f"bad={self.bad}"] if self.bad is not None else []),
            *(["experts"] if self.experts else []),
            *([f"heads={self.heads}"] if self.heads else []),
        ]
        rest = shown({"lr": self.lr, "rank": self.rank, **self.options})
        what = ", ".join(map(str, self.parameters))
        return " ".join([f"{self.recipe or 'composition'}({rest})", "on", what, f"steps={self.steps}", *flags])

    def model(self) -> nn.Module:
        """Its parameters, with their first values, in nested modules."""
        root = nn.Module()
        for i, parameter in enumerate(self.parameters):
            *path, own = parameter.name.split(".")
            module = root
            for name in path:
                if name not in dict(module.named_children()):
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.register_parameter(own, nn.Parameter(self._start(parameter, i)))
        return root

    def optimizer(self, model: nn.Module) -> LowRankOptimizer:
        """A fresh optimizer of a model.

        Raises:
            TypeError, ValueError: a composition that is refused.
        """
        special: dict[str, Any] = {}
        if self.experts:
            special["experts"] = [p.name for p in self.parameters if len(p.shape) > 2]
        if self.heads:
            special["heads"] = {p.name: self.heads for p in self.parameters if p.name == "attn.q.weight"}
        if self.recipe is not None:
            return build(self.recipe, model, self.lr, self.rank, **special, **self.options)
        if not special:
            return LowRankOptimizer(model.named_parameters(), self.lr, self.rank, **self.options)
        groups = param_groups(model, 1.0 if self.rank is None else self.rank, **special)
        return LowRankOptimizer(groups, self.lr, **self.options)

    def gradients(self) -> list[list[Tensor]]:
        """For each parameter those of every step, ``absorbed`` in each."""
        return [
            [
                _laid_out(x, parameter)
                for x in sequence(parameter.structure, parameter.shape, parameter.dtype, self._source(1, i), count)
            ]
            for i, parameter in enumerate(self.parameters)
            for count in (self.steps * self.absorbed,)
        ]

    def _start(self, parameter: Parameter, number: int) -> Tensor:
        working = torch.complex128 if parameter.dtype.is_complex else torch.float64
        size = {"zero": 0.0, "small": 0.02, "unit": 1.0}[parameter.start]
        x = torch.randn(parameter.shape, dtype=working, generator=self._source(0, number)) * size
        return _in_layout(x.to(parameter.dtype), parameter.layout)

    def _source(self, role: int, number: int) -> torch.Generator:
        key = Random(f"{self.seed} {self.index} {role} {number}").getrandbits(62)
        return torch.Generator().manual_seed(key)


def _in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.ndim in {4, 5}:
        wanted = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return x.contiguous(memory_format=wanted)
    if layout == "transposed" and x.ndim > 1:
        order = list(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    return x.contiguous()


def _laid_out(gradient: Tensor, parameter: Parameter) -> Tensor:
    if parameter.strides == "own":
        return _in_layout(gradient, parameter.layout)
    if parameter.strides == "conjugate" and gradient.is_complex():
        return gradient.conj()
    return _in_layout(gradient, "transposed")


def draw(seed: int, index: int, chosen: Sequence[str] = ()) -> Case:
    """The case of these two integers.

    Args:
        seed: >= 0.
        index: >= 0.
        chosen: names of recipes, the only ones that are drawn; empty for all, and compositions of parts.

    Raises:
        ValueError: an unknown recipe.
    """
    known = recipes()
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"unknown recipe {unknown[0]!r}; known are {', '.join(known)}")
    r = Random(f"comoving {seed} {index}")
    recipe = known[r.choice(list(chosen or known))] if chosen or r.random() < 0.45 else None
    parameters = _parameters(r)
    experts = r.random() < 0.12 and any(len(p.shape) > 2 for p in parameters)
    heads = 0
    if r.random() < 0.08:
        size = r.choice((2, 4, 8))
        parameters = (*(p for p in parameters if p.name != "attn.q.weight"), _headed(r, size))
        heads = size
    steps = r.randint(8, 16)
    options = _common(r, parameters, experts)
    options |= composition(r) if recipe is None else _for_recipe(r, recipe)
    if recipe is None and not experts and not heads and all(len(p.shape) > 2 for p in parameters) and r.random() < 0.2:
        options["frame"] = Blocks(r.choice((0, 1, 2)), options["frame"])
    if r.random() < 0.06 and "ranks" not in options:
        options |= {"budget": r.choice(("40%", "70%", 0.3)), "codec": "auto", "moments": r.choice(("auto", Full()))}
    skip = options.get("on_nonfinite") == "skip"
    absorbed = r.choice((2, 3)) if not skip and r.random() < 0.12 else 1
    return Case(
        seed, index, None if recipe is None else recipe.name, _settled(options, recipe), parameters,
        _rank(r, parameters, recipe), r.choice((1e-3, 1e-2, 0.1)), steps, experts, heads,
        r.randint(1, steps - 1) if r.random() < 0.35 else None, absorbed,
        r.randrange(steps) if skip and r.random() < 0.7 else None, tuple(chosen),
    )  # fmt: skip


def _parameters(r: Random) -> tuple[Parameter, ...]:
    """One to four; the first has two modes or more."""
    count = r.choices((1, 2, 3, 4), (5, 3, 1.5, 0.5))[0]
    dtype, structure = pick(r, DTYPES), r.choice(list(STRUCTURES))
    names = r.sample(NAMES, count)
    if r.random() < 0.85:
        names = ["weight", *[name for name in names if name != "weight"]][:count]
    found: list[Parameter] = []
    for i, name in enumerate(names):
        own = dtype if r.random() < 0.8 else pick(r, DTYPES)
        shape = _shape(r, least=2 if i == 0 else 1)
        found.append(_parameter(r, name, shape, own, structure if r.random() < 0.6 else r.choice(list(STRUCTURES))))
    return tuple(found)


def _parameter(r: Random, name: str, shape: tuple[int, ...], dtype: torch.dtype, structure: str) -> Parameter:
    layout = r.choices(("contiguous", "transposed", "channels_last"), (8, 1, 1 if len(shape) < 4 else 4))[0]
    strides = r.choices(("own", "reversed", "conjugate"), (8, 1, 1 if dtype.is_complex else 0))[0]
    return Parameter(name, shape, dtype, layout, r.choices(("zero", "small", "unit"), (1, 3, 1))[0], structure, strides)


def _headed(r: Random, size: int) -> Parameter:
    shape = (size * r.randint(2, 5), r.randint(2, 24))
    return _parameter(r, "attn.q.weight", shape, torch.float32, r.choice(list(STRUCTURES)))


def _shape(r: Random, least: int) -> tuple[int, ...]:
    order = r.choices((1, 2, 3, 4, 5), (1.2, 5, 2, 1.5, 0.6))[0]
    order = max(order, least)
    if order == 2 and r.random() < 0.05:
        return r.randint(40, 128), r.randint(40, 256)  # LAPACK has other algorithms for larger matrices
    most = {1: 40, 2: 40, 3: 16, 4: 10, 5: 7}[order]
    while True:
        sizes = tuple(1 if r.random() < 0.08 else r.randint(2, most) for _ in range(order))
        if order > 2 and r.random() < 0.3:
            place = r.randrange(order)
            sizes = (*sizes[:place], r.randint(8, 40), *sizes[place + 1 :])
        if r.random() < 0.03:
            return (1,) * order
        if prod(sizes) <= _LARGEST and (order < 2 or sum(d > 1 for d in sizes) > 1):
            return sizes


def _common(r: Random, parameters: Sequence[Parameter], experts: bool) -> dict[str, Any]:
    """Options of recipes and compositions alike, a few of them away from the default."""
    options: dict[str, Any] = {}

    def maybe(chance: float, name: str, *values: Any) -> None:
        if r.random() < chance:
            options[name] = r.choice(values)

    maybe(0.4, "betas", (0.9, 0.99), (0.95, 0.95), (0.8, 0.9), (0.0, 0.99), (0.99, 0.999), (0.5, 0.5))
    maybe(0.3, "eps", 1e-6, 1e-10, 1e-3, 1e-12)
    maybe(0.6, "weight_decay", 0.0, 0.0, 0.1)
    maybe(0.6, "refresh_every", 1, 2, 3, 4, 5)
    maybe(0.3, "scale", "match", "0.2-match", 0.25, 1.0, 2.0)
    maybe(0.2, "side", "left", "right", "both")
    maybe(0.15, "diagnostics", False)
    maybe(0.15, "maximize", True)
    maybe(0.2, "on_nonfinite", "skip")
    maybe(0.2, "seed", 1, 2, 3)
    maybe(0.05, "amsgrad", True)
    maybe(0.15, "foreach", True, False)
    if any(p.dtype == torch.bfloat16 for p in parameters) and not any(p.dtype == torch.float16 for p in parameters):
        maybe(0.5, "rounding", "stochastic")
    if not experts:
        maybe(0.06, "view", "matrix")
        if all(p.shape[-1] == 2 and len(p.shape) > 1 and not p.dtype.is_complex for p in parameters):
            options["view"] = "pairs"
    return options


def _for_recipe(r: Random, recipe: Recipe) -> dict[str, Any]:
    """Now and then another part than its own."""
    if recipe.name in THIN:
        return {"rule": THIN[recipe.name](r)}
    if recipe.full_rank or r.random() < 0.75:
        return {}
    parts = composition(r)
    role = r.choice(
        sorted(set(parts) & {"transport", "residual", "codec", "moments", "bases", "ranks", "precondition"})
    )
    return {role: parts[role]}


def _settled(options: dict[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """Without what is refused for certain."""
    if recipe is not None and recipe.full_rank:
        return {name: value for name, value in options.items() if name not in _FULL_RANK_REFUSES}
    if recipe is not None and recipe.name == "dion":
        return {name: value for name, value in options.items() if name not in {"side", "view"}}
    return options


def _rank(r: Random, parameters: Sequence[Parameter], recipe: Recipe | None) -> Any:
    if recipe is not None and r.random() < 0.3:
        return None
    if len(parameters) == 1 and r.random() < 0.15:
        return tuple(r.choice((None, r.randint(1, d))) for d in parameters[0].shape)
    return r.choice((1, 2, 3, 4, 8, 0.05, 0.1, 0.25, 0.25, 0.5, 0.5, 0.8, 1.0))
