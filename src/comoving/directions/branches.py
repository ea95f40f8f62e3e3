"""Branches: low-rank additions to linear layers, with amplitudes that learn faster (studies 1 and 2)."""

from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..validate import check_choice, check_float, check_int
from .clamp import bound, gram_product
from .hooks import check_owned
from .linears import changeable, check_rank, restored
from .orthonormal import random_directions
from .targets import TARGETS, matrix_of

Backbone = Literal["trainable", "frozen", "zero"]

FUSED = ("qkv", "qkv_proj", "c_attn", "in_proj")
"""Names of layers with d_out = 3 d_in whose rows are those of q, then k, then v."""


class Branch(nn.Module):
    """W -> W + [U_1 diag(a_1) V_1^T; ...; U_P diag(a_P) V_P^T], block by block of d_out/P rows.

    Args:
        weight: W, (d_out, d_in).
        parts: P, which divides d_out.
        rank: r.
        amplitude: of all entries of a at first.
        key: seeds U and V.
    """

    def __init__(self, weight: Tensor, parts: int, rank: int, amplitude: float, *key: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        u = random_directions((parts, rows // parts, rank), weight, *key, 0)
        v = random_directions((parts, columns, rank), weight, *key, 1)
        self.U, self.V = nn.Parameter(u.to(weight.dtype)), nn.Parameter(v.to(weight.dtype))
        # In half precision the clamp, and small steps, would be lost in rounding.
        self.a = nn.Parameter(u.new_full((parts, rank), amplitude))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the branch."""
        scaled = self.U * self.a.to(self.U.dtype).unsqueeze(-2)
        return weight + (scaled @ self.V.mT).reshape(weight.shape)


class Branches:
    """What :func:`add_branches` returns: the branches of a model, by the names of their layers.

    Attributes:
        layers: name -> layer.
        limits: name -> the largest sigma_max that the clamp allows; None where there is no clamp.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        limits: Mapping[str, float] | None,
        trained: Mapping[str, bool],
    ) -> None:
        self.layers, self.limits = dict(layers), None if limits is None else dict(limits)
        self._model, self._trained = model, dict(trained)

    def __getitem__(self, name: str) -> Branch:
        """The branch of a layer."""
        return _branch(self.layers[name])

    def param_groups(self, lr: float, amplitude_rate: float = 10.0, weight_decay: float = 0.01) -> list[dict[str, Any]]:
        """Two groups for any optimizer: all trainable parameters, U and V among them; and the amplitudes.

        Args:
            lr: >= 0, of the first group.
            amplitude_rate: > 0; the amplitudes learn at ``lr * amplitude_rate``, without weight decay.
            weight_decay: >= 0, of the first group.
        """
        check_float("lr", lr, 0.0)
        check_float("amplitude_rate", amplitude_rate, 0.0, open_low=True)
        check_float("weight_decay", weight_decay, 0.0)
        amplitudes = list(self._amplitudes().values())
        apart = {id(a) for a in amplitudes}
        others = [p for p in self._model.parameters() if p.requires_grad and id(p) not in apart]
        return [
            {"params": others, "lr": lr, "weight_decay": weight_decay},
            {"params": amplitudes, "lr": lr * amplitude_rate, "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def sigma_max(self) -> dict[str, Tensor]:
        """Name -> sigma_max of U_p diag(a_p) V_p^T for each part, (P,), at most 0.2% above its true value.

        On the device; nothing is read on the host.
        """
        products = {name: gram_product(b.U, b.a, b.V) for name, b in self._each()}
        found: dict[str, Tensor] = {}
        for kind in {(k.shape[-1], k.device) for k in products.values()}:  # all of one rank at once
            names = [name for name, k in products.items() if (k.shape[-1], k.device) == kind]
            bounds = bound(torch.cat([products[name] for name in names]))
            found |= dict(zip(names, bounds.split([products[name].shape[0] for name in names]), strict=True))
        return {name: found[name] for name in products}

    @torch.no_grad()
    def clamp(self) -> None:
        """Scale the amplitudes of each part whose sigma_max exceeds its limit down to it: to [0.998, 1] of the limit.

        Raises:
            ValueError: the branches were made without a clamp.
        """
        limits = self._limits()
        for name, sigma in self.sigma_max().items():
            a = self[name].a
            a.mul_((limits[name] / sigma).clamp_max(1.0).unsqueeze(-1).to(a.dtype))

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Clamp after each step of this optimizer.

        Returns:
            A handle, whose ``remove()`` ends it.

        Raises:
            ValueError: an optimizer that does not hold the amplitudes; branches without a clamp.
        """
        self._limits()
        check_owned(optimizer, {f"the amplitudes of {name}": a for name, a in self._amplitudes().items()})

        def hook(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clamp()

        return optimizer.register_step_post_hook(hook)

    @torch.no_grad()
    def merge(self) -> None:
        """Write W + U diag(a) V^T to the weights, the same parameters as ever, and take the branches away.

        Weights that were frozen train again if they did before. Remove handles of :meth:`attach` first, and build a new
        optimizer: this one's amplitudes are gone.

        Raises:
            RuntimeError: merged already.
        """
        if not all(parametrize.is_parametrized(layer, "weight") for layer in self.layers.values()):
            raise RuntimeError("these branches are merged already")
        for name, layer in self.layers.items():
            merged = layer.weight
            restored(layer).copy_(merged).requires_grad_(self._trained[name])  # pyright: ignore[reportArgumentType]

    def _each(self) -> list[tuple[str, Branch]]:
        return [(name, _branch(layer)) for name, layer in self.layers.items()]

    def _amplitudes(self) -> dict[str, Tensor]:
        return {name: branch.a for name, branch in self._each()}

    def _limits(self) -> dict[str, float]:
        if self.limits is None:
            raise ValueError("these branches were made with clamp=None; there is nothing to clamp")
        return self.limits


def add_branches(
    model: nn.Module,
    targets: str | Iterable[str] = TARGETS,
    *,
    rank: int = 8,
    backbone: Backbone = "trainable",
    clamp: float | None = 0.7,
    parts: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> Branches:
    """Add a low-rank branch to linear layers: effective weight W + U diag(a) V^T, by a parametrization.

    U (P, d_out/P, r) and V (P, d_in, r) start with random orthonormal columns, a (P, r) at 0 under a trainable
    backbone, so that the function is unchanged, else at the limit of the clamp (1/sqrt(d_in) without), so that each
    part starts with r singular values of that size. A state_dict holds W, U, a and V; to load it, call this on the new
    model first. In half precision U and V have the weight's dtype, and a float32.

    The clamp keeps sigma_max(U_p diag(a_p) V_p^T) <= clamp/sqrt(d_in) by scaling a_p, once :meth:`Branches.attach` is
    called, after each step. sigma_max is known to 0.2% from above, so that it is held at 0.998 of the limit at least.

    Args:
        model: changed in place.
        targets: patterns; see :func:`comoving.directions.targets`. Layers must be ``torch.nn.Linear``.
        rank: r in [1, min(d_out/P, d_in)].
        backbone: "trainable"; "frozen", W as it is initialized; "zero", W = 0 and frozen. Biases train in any case.
        clamp: c > 0; None for no clamp.
        parts: P >= 1, for all layers or by their names; by default 3 for layers called qkv, qkv_proj, c_attn or in_proj
            with d_out = 3 d_in, one each for q, k and v, and 1 for others. (GPT-NeoX's query_key_value has rows head
            by head, so that thirds of it are no q, k and v.)
        seed: of U and V; the global generators stay as they are.

    Raises:
        TypeError, ValueError: patterns that do not fit; a layer that is no ``torch.nn.Linear``, is parametrized already
            or shares its weight; weights that are not floating point; a value outside its interval. Nothing has
            changed then.
    """
    check_choice("backbone", backbone, ("trainable", "frozen", "zero"))
    check_int("seed", seed, 0)
    if clamp is not None:
        check_float("clamp", clamp, 0.0, open_low=True)
    layers = changeable(model, targets, "add_branches")
    shares = _parts(layers, parts)
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"add_branches: {name} is a {type(layer).__name__}, and only torch.nn.Linear has branches")
        if layer.out_features % shares[name]:
            raise ValueError(
                f"add_branches: parts = {shares[name]} does not divide the {layer.out_features} rows of {name}"
            )
        check_rank("add_branches", name, rank, (layer.out_features // shares[name], layer.in_features))
    limits: dict[str, float] = {}
    trained: dict[str, bool] = {}
    for index, (name, layer) in enumerate(layers.items()):
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        limits[name] = (1.0 if clamp is None else clamp) / sqrt(weight.shape[1])
        amplitude = 0.0 if backbone == "trainable" else limits[name]
        branch = Branch(weight.detach(), shares[name], rank, amplitude, seed, index)
        trained[name] = weight.requires_grad
        if backbone != "trainable":
            weight.requires_grad_(False)
        if backbone == "zero":
            weight.detach().zero_()
        parametrize.register_parametrization(layer, "weight", branch)
    return Branches(model, layers, None if clamp is None else limits, trained)


def _branch(layer: nn.Module) -> Branch:
    if not parametrize.is_parametrized(layer, "weight"):
        raise RuntimeError("these branches are merged already")
    branch = layer.parametrizations.weight[0]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    assert isinstance(branch, Branch)
    return branch


def _parts(layers: Mapping[str, nn.Module], given: int | Mapping[str, int] | None) -> dict[str, int]:
    """P of each layer.

    Raises:
        TypeError, ValueError: not an int >= 1, or the name of no layer.
    """
    if isinstance(given, Mapping):
        unknown = sorted(set(given) - set(layers))
        if unknown:
            raise ValueError(f"parts names {', '.join(unknown)}, which is none of the layers {', '.join(layers)}")
    found: dict[str, int] = {}
    for name, layer in layers.items():
        own = given.get(name) if isinstance(given, Mapping) else given
        if own is None:
            rows, columns = matrix_of(layer).shape
            own = 3 if name.rpartition(".")[2] in FUSED and rows == 3 * columns else 1
        check_int(f"parts of {name}", own, 1)
        found[name] = own
    return found
