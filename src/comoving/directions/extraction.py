"""Extraction (E4): the good directions of a matrix become a small parameter of their own, which learns faster."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..validate import check_choice, check_float, check_int
from . import carry, schedules
from .hooks import before_step, check_owned, check_strided, group_of, refuse_in_backward
from .linears import changeable, check_rank, restored
from .orthonormal import add_lifted, inside, random_directions, widest_dtype, working_dtype
from .sources import SOURCES, Source, leading, source_of


class Extracted(nn.Module):
    """R -> R + U C V^T, in float32 at least, also under autocast.

    Args:
        u: U, (d_out, r).
        core: C, (r, r), the parameter.
        v: V, (d_in, r).
    """

    U: Tensor
    V: Tensor

    def __init__(self, u: Tensor, core: Tensor, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("U", u)
        self.register_buffer("V", v)
        self.C = nn.Parameter(core)

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight."""
        with torch.autocast(weight.device.type, enabled=False):
            wide = self.C.dtype
            return (weight.to(wide) + (self.U @ self.C) @ self.V.mT).to(weight.dtype)


@dataclass(frozen=True)
class _Layer:
    """A layer before it is changed: the weight, which becomes R, and what is to be extracted."""

    module: nn.Module
    weight: nn.Parameter
    extracted: Extracted


class Extraction:
    """What :func:`extract` returns.

    Attributes:
        layers: names of the layers, in the model's order.
    """

    def __init__(self, optimizer: Optimizer, layers: Mapping[str, _Layer], scheduler: Any) -> None:
        self.layers = tuple(layers)
        self._optimizer, self._scheduler, self._layers = optimizer, scheduler, dict(layers)
        self._energy: dict[str, Tensor] = {}
        self._frozen = False
        self._handles = [
            before_step(optimizer, "extract", self._project_gradients),
            optimizer.register_step_post_hook(self._project_update),
        ]

    def directions(self, name: str) -> tuple[Tensor, Tensor]:
        """U (d_out, r) and V (d_in, r) of a layer."""
        extracted = self._layer(name).extracted
        return extracted.U, extracted.V

    def core(self, name: str) -> nn.Parameter:
        """C (r, r) of a layer."""
        return self._layer(name).extracted.C

    def rest(self, name: str) -> nn.Parameter:
        """R (d_out, d_in) of a layer, the parameter that was its weight."""
        return self._layer(name).weight

    def energy(self) -> dict[str, Tensor]:
        """Name -> p_t = |U^T G V|^2 / |G|^2 of the gradient at the last step, before projection; 0 for G = 0.

        Scalars on the device; no entry before the first step and after :meth:`freeze_rest`.
        """
        return dict(self._energy)

    def freeze_rest(self) -> None:
        """Stop the training of R (control B3): in these layers only C, and biases, learn. Until :meth:`fold`."""
        self._check_unfolded()
        self._frozen = True
        self._energy.clear()
        for layer in self._layers.values():
            layer.weight.requires_grad_(False)
            layer.weight.grad = None

    @torch.no_grad()
    def fold(self) -> None:
        """Back to plain weights: the parameter that was the weight holds R + U C V^T.

        C leaves the optimizer, with its groups, and its moments return: m_W = m_R + U m_C V^T; second moments and
        counts are those of R, which trains again. The scheduler given to :func:`extract` forgets the groups.

        Raises:
            RuntimeError: folded already.
        """
        self._check_unfolded()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        place = group_of(self._optimizer)
        indices = sorted({place[layer.extracted.C] for layer in self._layers.values()}, reverse=True)
        for layer in self._layers.values():
            u, core, v = layer.extracted.U, layer.extracted.C, layer.extracted.V
            weight = restored(layer.module)
            wide = widest_dtype(weight.device)
            weight.copy_(weight.to(wide) + u.to(wide) @ core.to(wide) @ v.to(wide).mT)
            weight.requires_grad_(True)
            weight.grad = None
            carry.join(self._optimizer, weight, core, u, v)
        for index in indices:
            carry.remove_group(self._optimizer, index)
        if self._scheduler is not None:
            schedules.shrink(self._scheduler, indices)

    @torch.no_grad()
    def _project_gradients(self) -> None:
        """G - U U^T G V V^T."""
        for name, layer in self._layers.items():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            check_strided(f"extract: {name}", gradient)
            u, v = self.directions(name)
            core = inside(gradient, u, v)
            whole = gradient.to(u.dtype).square().sum()
            self._energy[name] = core.square().sum() / whole.clamp_min(torch.finfo(u.dtype).tiny)
            add_lifted(gradient, u, core, v, -1.0)

    @torch.no_grad()
    def _project_update(self, stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """U^T R V = 0 held before the step: to project R is to project its update."""
        for name, layer in self._layers.items() if not self._frozen else ():
            u, v = self.directions(name)
            add_lifted(layer.weight, u, inside(layer.weight, u, v), v, -1.0)

    def _layer(self, name: str) -> _Layer:
        self._check_unfolded()
        if name not in self._layers:
            raise KeyError(f"{name} is none of the extracted layers {', '.join(self.layers)}")
        return self._layers[name]

    def _check_unfolded(self) -> None:
        if not self._handles:
            raise RuntimeError("this extraction is folded already")


@torch.no_grad()
def extract(
    model: nn.Module,
    targets: str | Iterable[str],
    optimizer: Optimizer,
    *,
    rank: int = 8,
    source: Source = "weight",
    initial: Mapping[str, Tensor] | None = None,
    boost: float = 5.0,
    weight_decay: float | None = None,
    scheduler: Any = None,
    seed: int = 0,
) -> Extraction:
    """Split matrices at the end of warm-up: W = R + U C V^T, of which C learns faster than R.

    U (d_out, r) and V (d_in, r) are the leading singular vectors of the source, C = U^T W V, so that U^T R V = 0
    whichever source it is, and the function is unchanged. Before each step R's gradient becomes G - U U^T G V V^T, and
    after it R is projected likewise, so that R never moves inside the subspace. The optimizer's state is carried: with
    m and v those of W, C gets U^T m V and (U * U)^T v (V * V), R keeps m - U U^T m V V^T and v, and counts are the
    same; likewise the momentum of SGD. C's v is exact where entries of the gradient are uncorrelated.

    Call it between two steps: the gradient of R is cleared. R is the parameter that was the weight; C is added to the
    optimizer in a group of its own for each group that has matrices R. A state_dict of the model holds R, C, U and V:
    see :func:`prepare` for loading it. A fused layer like qkv is one matrix here; d_out and d_in are the modes of
    the weight as it is stored, which transformers' Conv1D has the other way round. In half precision U, C and V are
    float32, and U^T R V is zero up to rounding of R.

    A scheduler that was made before and is not given here does not know the new groups: torch's LambdaLR then fails at
    its next step; CosineAnnealingLR, which goes from each rate to the next, serves C too, but fails past its minimum.
    Give it, or make it anew.

    Args:
        model: changed in place.
        targets: patterns; see :func:`comoving.directions.targets`.
        optimizer: torch's SGD, Adam, AdamW and relatives whose state has their keys; this package's for parameters that
            it steps by torch's AdamW (recipe "adamw", rank 1.0).
        rank: r in [1, min(d_out, d_in)].
        source: what the directions come from: "weight"; "change", W minus ``initial``; "momentum", the optimizer's
            average of gradients; "random", seeded orthonormal bases (control B2).
        initial: for "change" alone: a state_dict from before training, or layer's name -> weight.
        boost: > 0; C's learning rate, and what schedulers keep beside it, is this times that of R.
        weight_decay: >= 0, of C; None for that of R.
        scheduler: of this optimizer; its new groups follow those of R.
        seed: of random bases.

    Raises:
        TypeError, ValueError: patterns that do not fit; layers that are parametrized or share weights; a value outside
            its interval; weights or state that are not finite; an optimizer without these parameters, stepping in the
            backward pass, or with a state that cannot be split, whose keys are named; a source that is missing or zero.
            Nothing has changed then.
    """
    check_choice("source", source, SOURCES)
    check_int("seed", seed, 0)
    check_float("boost", boost, 0.0, open_low=True)
    if weight_decay is not None:
        check_float("weight_decay", weight_decay, 0.0)
    if (initial is not None) != (source == "change"):
        raise ValueError(f"initial is needed for source='change' and only there, got source={source!r}")
    refuse_in_backward(optimizer, "extract")
    modules = changeable(model, targets, "extract")
    weights: dict[str, nn.Parameter] = {name: _trained(name, module) for name, module in modules.items()}
    check_owned(optimizer, {f"the weight of {name}": p for name, p in weights.items()})
    for name, p in weights.items():
        check_rank("extract", name, rank, p.shape)
        if not bool(p.isfinite().all()):
            raise ValueError(f"extract: the weight of {name} is not finite")
        carry.check(optimizer, name, p)
    if scheduler is not None:
        schedules.check(scheduler, optimizer)
    layers: dict[str, _Layer] = {}
    for index, (name, p) in enumerate(weights.items()):
        if source == "random":
            u, v = (random_directions((d, rank), p, seed, index, side) for side, d in enumerate(p.shape))
        else:
            u, v = leading(name, source_of(name, p, source, initial, optimizer), rank, working_dtype(p.dtype))
        layers[name] = _Layer(modules[name], p, Extracted(u, _core(p, u, v), v))
    names = {name: f"{name}.parametrizations.weight.0.C" for name in layers}
    cores: dict[str, tuple[Tensor, Tensor]] = {
        names[name]: (layer.weight, layer.extracted.C) for name, layer in layers.items()
    }
    sources = carry.add_groups(optimizer, cores, boost, weight_decay)
    if scheduler is not None:
        schedules.extend(scheduler, sources, boost)
    for layer in layers.values():
        part = layer.extracted
        carry.split(optimizer, layer.weight, part.C, part.U, part.V)
        wide = widest_dtype(layer.weight.device)
        lifted = part.U.to(wide) @ part.C.to(wide) @ part.V.to(wide).mT
        layer.weight.copy_(layer.weight.to(wide) - lifted)
        layer.weight.grad = None
        parametrize.register_parametrization(layer.module, "weight", part)
    return Extraction(optimizer, layers, scheduler)


def prepare(
    model: nn.Module,
    targets: str | Iterable[str],
    optimizer: Optimizer,
    *,
    rank: int = 8,
    boost: float = 5.0,
    weight_decay: float | None = None,
    scheduler: Any = None,
) -> Extraction:
    """The structure that :func:`extract` leaves, to load a checkpoint of it into.

        extraction = prepare(model, targets, optimizer, rank=8)
        model.load_state_dict(...), optimizer.load_state_dict(...), scheduler.load_state_dict(...)

    It is an extraction along random directions, without a decomposition; what is loaded overwrites them. Call it on a
    new model and optimizer with the arguments of the extraction that was saved, and :meth:`Extraction.freeze_rest`
    again where it had been called.

    Args:
        model: changed in place.
        targets: as for :func:`extract`, and so are all that follow.
        optimizer: without state, or with one.
        rank: r.
        boost: of the learning rates, which a loaded state overwrites.
        weight_decay: of C, likewise.
        scheduler: of this optimizer.

    Raises:
        TypeError, ValueError: as :func:`extract`.
    """
    return extract(
        model, targets, optimizer, rank=rank, source="random", boost=boost, weight_decay=weight_decay,
        scheduler=scheduler,
    )  # fmt: skip


def _trained(name: str, module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if not weight.requires_grad:
        raise ValueError(f"extract: the weight of {name} is frozen")
    return weight


def _core(p: Tensor, u: Tensor, v: Tensor) -> Tensor:
    wide = widest_dtype(p.device)
    return inside(p, u.to(wide), v.to(wide)).to(u.dtype)
