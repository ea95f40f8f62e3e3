"""Short runs of a recipe, each through another part of the engine, and what they do to the weights.

Gradients and first weights come from numpy's legacy generator, which is the same everywhere, and do not depend on the
weights: what differs between two runs differs in the engine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import comoving
from comoving import LowRankOptimizer
from comoving.codecs import Int4, Int8
from comoving.frames import Blocks, Modes
from comoving.ranks import Energy
from comoving.rules import SOAP, Muon
from comoving.views import Heads
from comoving.weights import codes_of, quantize

STEPS = 12
LR = 0.02
REAL, COMPLEX = torch.float64, torch.complex128
Trace = dict[str, list[list[float]]]
"""Parameter -> for each step the root mean square of its change, and two products of it with fixed directions."""

# Each alike parameter is of a batch of three; the fourth has a shape of its own, of sides above 32.
TALL = {"a": (18, 10), "b": (18, 10), "c": (18, 10), "other": (40, 36), "bias": (18,)}
WIDE = {"a": (8, 20), "b": (8, 20), "c": (8, 20), "other": (34, 44)}
TENSORS = {"a": (6, 5, 8), "b": (6, 5, 8), "c": (6, 5, 8), "other": (4, 9, 7), "bias": (7,)}
EXPERTS = {"a": (4, 10, 14), "b": (4, 10, 14), "c": (4, 10, 14), "router": (14, 9)}
ATTENTION = {"a": (24, 12), "b": (24, 12), "c": (24, 12), "out": (12, 24)}
LAYERS = {"a": (18, 12), "b": (18, 12), "c": (18, 12), "other": (14, 20)}


class Run(NamedTuple):
    """A run that has not begun.

    Args:
        optimizer: of all parameters.
        params: by name.
        backward: gradients in a window of the backward pass; 0 where they are set by hand.
        experts: whether slices along mode 0 of tensors have steps without a gradient.
        model: kept alive for the codes that it holds.
    """

    optimizer: LowRankOptimizer
    params: dict[str, nn.Parameter]
    backward: int = 0
    experts: bool = False
    model: nn.Module | None = None


def trace(run: Run) -> Trace:
    """What a run does to the weights."""
    shapes = {name: tuple(p.shape) for name, p in run.params.items()}
    looks = {name: _looks(shape, run.params[name].is_complex(), i) for i, (name, shape) in enumerate(shapes.items())}
    series = [
        {name: _gradients(shape, run.params[name], 100 * k + i) for i, (name, shape) in enumerate(shapes.items())}
        for k in range(max(1, run.backward))
    ]
    found: Trace = {name: [] for name in run.params}
    for t in range(STEPS):
        before = {name: _weights(p) for name, p in run.params.items()}
        rates = [group["lr"] for group in run.optimizer.param_groups]
        given = [{name: _masked(own[name][t], name, i, t, run) for i, name in enumerate(own)} for own in series]
        _step(run, given)
        of = {p: rate for rate, group in zip(rates, run.optimizer.param_groups, strict=True) for p in group["params"]}
        for name, p in run.params.items():
            change = (_weights(p) - before[name]) / of[p]
            found[name].append([_rms(change), *(float((change * look).sum().real) for look in looks[name])])
        for group in run.optimizer.param_groups:
            group["lr"] *= 0.96  # as a schedule would
    return found


def _step(run: Run, given: Sequence[Mapping[str, Tensor | None]]) -> None:
    if run.backward:
        for gradients in given:
            terms = [(run.params[name] * g).sum() for name, g in gradients.items() if g is not None]
            sum(terms[1:], terms[0]).backward()
    else:
        for name, g in given[0].items():
            run.params[name].grad = g
    run.optimizer.step()
    run.optimizer.zero_grad()


def _masked(g: Tensor, name: str, number: int, t: int, run: Run) -> Tensor | None:
    """A gradient, or None: b misses one step, c comes later; of experts some are idle."""
    if (number == 1 and t == 5) or (number == 2 and t < 2):
        return None
    if run.experts and g.ndim == 3:
        g = g.clone()
        for b in range(len(g)):
            if (t + b + number) % 3 == 0 or (b == 3 and t < 4):
                g[b] = 0
    return g


def _weights(p: nn.Parameter) -> Tensor:
    codes = codes_of(p)
    own = p.detach() if codes is None else codes.decode().detach()
    return own.to(COMPLEX if own.is_complex() else REAL, copy=True)


def _rms(x: Tensor) -> float:
    return float(x.abs().square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------------- numbers


def _normal(seed: int, *shape: int, field: bool = False) -> np.ndarray:
    """Standard normal numbers, complex ones in a complex field."""
    source = np.random.RandomState(seed)
    x = source.standard_normal(shape)
    return x if not field else (x + 1j * source.standard_normal(shape)) / sqrt(2)


def _looks(shape: tuple[int, ...], field: bool, number: int) -> list[Tensor]:
    """Two directions of unit length."""
    found = [torch.from_numpy(_normal(7000 + 10 * number + k, *shape, field=field)) for k in range(2)]
    return [look / look.norm() for look in found]


def _signal(shape: tuple[int, ...], field: bool, seed: int) -> np.ndarray:
    """A tensor of rank 3 with well separated parts of it."""
    total = np.zeros(shape, complex if field else float)
    for k, size in enumerate((1.0, 0.6, 0.36)):
        part = np.array(size)
        for n, d in enumerate(shape):
            part = np.multiply.outer(part, _normal(10 * seed + 3 * n + k, d, field=field))
        total += part
    return total


def _gradients(shape: tuple[int, ...], p: Tensor, number: int) -> list[Tensor]:
    """A signal that drifts into another, in noise, of a size that changes."""
    field, seed = p.is_complex(), 1000 + 50 * number
    low, high = _signal(shape, field, seed), _signal(shape, field, seed + 5)
    found = []
    for t in range(STEPS):
        x = (1 - t / STEPS) * low + t / STEPS * high + 0.3 * _normal(20 * seed + t, *shape, field=field)
        found.append(torch.from_numpy(np.asarray((0.6 + 0.1 * (7 * t % 11)) * x)).to(p.dtype))
    return found


def _parameters(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, size: float = 0.5
) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.from_numpy(size * _normal(i, *shape, field=dtype.is_complex)).to(dtype))
        for i, (name, shape) in enumerate(shapes.items())
    }


# ----------------------------------------------------------------------------------------------------------- scenarios


def _options(recipe: str) -> dict[str, Any]:
    """Hyper-parameters away from what is neutral, with three refreshes or more in a run."""
    method = comoving.recipes()[recipe]
    options: dict[str, Any] = {"betas": (0.8, 0.93), "eps": 1e-3, "weight_decay": 0.1, "seed": 3}
    # These two stretch the interval by their own clock.
    every = {"q-galore": 2, "loqt": 3}.get(recipe, min(4, method.options.get("refresh_every", 4)))
    options["refresh_every"] = every
    if isinstance(rule := method.options.get("rule"), Muon) and rule.bf16:
        # Iterates in the weights' precision: products in bfloat16 are each CPU's own.
        options["rule"] = replace(rule, bf16=False)
    if recipe == "soap":
        # The longer side's covariance is singular at first, and which basis its null space gets is each CPU's own.
        options["rule"] = SOAP(one_sided=True)
    return options


def _rank(recipe: str) -> int | None:
    own = comoving.recipes()[recipe].rank
    return 3 if own is None else None


def _own_rule(recipe: str, kind: type) -> dict[str, Any]:
    """The rule of this recipe, where it is of a kind for which :func:`_options` has put another in its place."""
    rule = comoving.recipes()[recipe].options.get("rule")
    return {"rule": rule} if isinstance(rule, kind) else {}


def _layout(recipe: str) -> Any:
    return comoving.recipes()[recipe].options.get("frame", Modes())


def _projecting(recipe: str, **options: Any) -> dict[str, Any]:
    """Options of low-rank recipes; full-rank ones would refuse them."""
    return {} if comoving.recipes()[recipe].full_rank else options


def _build(recipe: str, groups: Any, **options: Any) -> LowRankOptimizer:
    return comoving.build(recipe, groups, LR, _rank(recipe), **(_options(recipe) | options))


def _one_group(
    recipe: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, size: float = 0.5, **options: Any
) -> Run:
    params = _parameters(shapes, dtype, size)
    return Run(_build(recipe, list(params.items()), **options), params)


def matrix(recipe: str) -> Run:
    """Three alike tall matrices, another one, and a bias."""
    return _one_group(recipe, TALL, REAL)


def wide(recipe: str) -> Run:
    """Wide matrices, one of them in a group of other hyper-parameters, without diagnostics."""
    params = _parameters(WIDE, REAL)
    *first, last = params.items()
    own = {"lr": 0.5 * LR, "betas": (0.7, 0.97), "weight_decay": 0.3, "maximize": True}
    return Run(
        _build(recipe, [{"params": [*first[:2], last]}, {"params": [first[2]], **own}], diagnostics=False), params
    )


def tensors(recipe: str) -> Run:
    """Complex tensors of three modes, compressed along two of them where the frame is mode-wise, and a vector."""
    params = _parameters(TENSORS, COMPLEX)
    method = comoving.recipes()[recipe]
    modal = not method.full_rank and {"frame", "view"}.isdisjoint(method.options)
    alike: dict[str, Any] = {"rank": (3, None, 3)} if modal else {}
    *first, other, bias = params.items()
    groups = [{"params": first, **alike}, {"params": [other, bias]}]
    return Run(_build(recipe, groups, **_own_rule(recipe, SOAP)), params)


def experts(recipe: str) -> Run:
    """Stacks of experts, some of them idle, and a matrix."""
    params = _parameters(EXPERTS, REAL)
    *stacks, router = params.items()
    groups = [{"params": stacks, "frame": Blocks(inner=_layout(recipe)), "view": "tensor"}, {"params": [router]}]
    return Run(_build(recipe, groups), params, experts=True)


def heads(recipe: str) -> Run:
    """Attention weights by heads of rows, and one by heads of columns."""
    params = _parameters(ATTENTION, REAL)
    *rows, columns = params.items()
    groups = [
        {"params": rows, "frame": Blocks(0, _layout(recipe)), "view": Heads(12)},
        {"params": [columns], "frame": Blocks(1, _layout(recipe)), "view": Heads(12, "columns")},
    ]
    return Run(_build(recipe, groups, **_own_rule(recipe, SOAP)), params)


def bf16(recipe: str) -> Run:
    """Parameters in bfloat16, into which updates are rounded stochastically."""
    return _one_group(recipe, TALL, torch.bfloat16, 0.05, rounding="stochastic", **_own_rule(recipe, Muon))


def backward(recipe: str) -> Run:
    """Two gradients a step, taken up in the backward pass, and clipped by the norm of all."""
    run = _one_group(recipe, TALL, REAL)
    run.optimizer.step_in_backward(accumulate=2, clip=60.0)
    return run._replace(backward=2)


def hooked(recipe: str) -> Run:
    """Two gradients a step, without clipping: every parameter is stepped by its hook."""
    run = _one_group(recipe, {name: WIDE[name] for name in "abc"}, REAL)
    run.optimizer.step_in_backward(accumulate=2)
    return run._replace(backward=2)


def coded(recipe: str) -> Run:
    """Moments and feedback in 8 bits."""
    return _one_group(recipe, TALL, REAL, moments=Int8(block=32), **_projecting(recipe, codec=Int8(block=64)))


BUDGETS = {"comoving-adamw": 12_500, "dion": 22_500, "shampoo-tucker": 94_200, "streaming-tucker-adam": 34_500}
"""Bytes that are not enough for what the energies ask for; each limit lies between two ranks."""


def adaptive(recipe: str) -> Run:
    """Ranks that follow the energy, as far as a budget allows."""
    policy = Energy(low=0.9, high=0.96, minimum=2, maximum=7, step=1)
    return _one_group(recipe, TALL, REAL, ranks=policy, budget=BUDGETS.get(recipe, 28_000))


def quantized(recipe: str) -> Run:
    """Linear layers whose weights are stored in codes."""
    model = nn.Module()
    for i, (name, (rows, columns)) in enumerate(LAYERS.items()):
        layer = nn.Linear(columns, rows, bias=False, dtype=REAL)
        layer.weight.data = torch.from_numpy(0.5 * _normal(i, rows, columns))
        model.register_module(name, layer)
    if recipe == "loqt":
        quantize(model, Int4(), compensate=5, seed=2)
    else:
        quantize(model, Int8(rounding="stochastic"), seed=2)
    params = {name: model.get_submodule(name).weight for name in LAYERS}
    return Run(_build(recipe, model), params, model=model)


SCENARIOS: dict[str, Callable[[str], Run]] = {
    "matrix": matrix,
    "wide": wide,
    "complex": tensors,
    "experts": experts,
    "heads": heads,
    "bf16": bf16,
    "backward": backward,
    "hooked": hooked,
    "coded": coded,
    "adaptive": adaptive,
    "quantized": quantized,
}
