"""What a monitor reads of a layer: its weight, and its momentum out of any optimizer's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..cell import Cell
from ..optimizer import LowRankOptimizer
from ..rules.adam import FIRST
from ..weights import codes_of
from .spectra import working

MOMENTA = ("exp_avg", "momentum_buffer")
"""What the momentum is called in the state of torch's optimizers, and of most others."""


@torch.no_grad()
def effective_weight(module: nn.Module) -> Tensor:
    """The matrix that the layer multiplies by: after parametrizations, decoded from codes, detached.

    Float32 or wider if decoded; else it may share the parameter's storage.
    """
    if parametrize.is_parametrized(module, "weight"):
        return _undisturbed(module).detach()
    weight: Any = module.weight
    codes = codes_of(weight)
    return (weight if codes is None else codes.decode()).detach()


def _undisturbed(module: nn.Module) -> Tensor:
    """A parametrized weight as in evaluation: spectral_norm's power iteration would go on at every look in training."""
    parts: Any = module.parametrizations
    modes = [(part, part.training) for part in parts.modules()]
    parts.eval()
    try:
        weight: Any = module.weight
    finally:
        for part, training in modes:
            part.training = training
    return weight


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside of those of Accelerate or Lightning."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Whether an optimizer of this package takes gradients up inside the backward pass."""
    return isinstance(optimizer, LowRankOptimizer) and optimizer.steps_in_backward


@torch.no_grad()
def momentum_of(optimizer: Optimizer, p: Tensor) -> Tensor | None:
    """The momentum of a parameter, of its shape; None before its first gradient.

    Of an optimizer of this package it is the rule's momentum (for Adam m), lifted from the frame: F m, or that of each
    block; where a preconditioner stands before the rule, it is that of preconditioned gradients. Of any other one it is
    the state "exp_avg" (Adam and its relatives) or "momentum_buffer" (SGD, Muon).

    Raises:
        ValueError: the state has neither, or one of another shape than the parameter's; the message says what it has.
    """
    if isinstance(optimizer, LowRankOptimizer):
        return _lifted(optimizer, p)
    state: Mapping[str, Any] = optimizer.state.get(p, {})
    if not state and p.grad is None:
        return None
    for name in MOMENTA:
        if isinstance(state.get(name), Tensor) and state[name].shape == p.shape:
            return state[name]
    stored = ", ".join(f"{n} {tuple(x.shape)}" if isinstance(x, Tensor) else str(n) for n, x in state.items())
    raise ValueError(
        f"{type(optimizer).__name__} has no momentum of shape {tuple(p.shape)} that is known: its state holds "
        f"{stored or 'nothing'}; looked for {' and '.join(MOMENTA)}. Leave momentum out of kinds"
    )


def _lifted(optimizer: LowRankOptimizer, p: Tensor) -> Tensor | None:
    site, state = optimizer.sites[p], optimizer.state.get(p, {})
    if not state:
        return None
    if site.plain:
        return state[FIRST]
    rows = optimizer.engine.rows_of(p)
    if not site.blocks:
        return site.view.restore(_core_lifted(rows[0].cell()))
    layout = optimizer.roster.group_of(p)["frame"]
    shape, known = layout.block_shape(site.view.shape), {row.block: row for row in rows}
    whole = [
        _core_lifted(known[str(b)].cell())
        if str(b) in known
        else torch.zeros(shape, dtype=site.view.dtype, device=p.device)
        for b in range(site.blocks)
    ]
    return site.view.restore(torch.stack(whole, layout.mode))


def _core_lifted(cell: Cell) -> Tensor:
    site, name = cell.kind.site, cell.kind.parts.rule.momentum
    cell.decode(only=name)
    if name not in cell.moments:
        return torch.zeros(site.view.shape, dtype=site.view.dtype)
    core = cell.moments[name]
    return cell.frame.lift(core) if site.projected else working(core)
