"""The optimizer's state of W = R + U C V^T: split between R and C, and put together again."""

from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..codecs import Full
from ..precondition import Plain
from ..residual import Discard
from ..rules import Adam
from ..rules.adam import FIRST, SECOND
from ..sites import Site
from ..state import SECOND_MAX
from .hooks import group_of
from .orthonormal import add_lifted, inside

LINEAR = ("exp_avg", "momentum_buffer", FIRST)
"""Averages of gradients: C gets U^T m V, R the rest."""
SQUARED = ("exp_avg_sq", "max_exp_avg_sq", SECOND, SECOND_MAX)
"""Averages of squares: C gets (U * U)^T v (V * V), what v would be for uncorrelated entries; R keeps v."""
COUNTED = ("step", "mu_product")
"""Numbers that are the same for both."""
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Keys of groups that are learning rates: the optimizer's, and what schedulers write beside it."""

# What makes torch's AdamW of a group of this package's, since that is what stepped R.
_DENSE: dict[str, Any] = {
    "rank": 1.0, "rule": Adam(), "precondition": Plain(), "residual": Discard(), "moments": Full(), "reasons": None,
}  # fmt: skip


def check(optimizer: Optimizer, name: str, p: Tensor) -> None:
    """Raise unless the state of a parameter can be split.

    Raises:
        ValueError: an optimizer that keeps another kind of state, which the message names; a state that is not finite.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError("extract: LBFGS has one group and a history of all parameters together, which cannot be split")
    site: Site | None = getattr(optimizer, "sites", {}).get(p)
    if site is not None and not site.plain:
        kind = "projected" if site.projected else "stepped in a whole frame by another rule or rounding"
        raise ValueError(
            f"extract: {name} is {kind} in this optimizer, and the moments of R would have to leave the subspace, "
            f"which they cannot in coordinates of a frame of their own: give it rank=1.0 and Adam's rule, or use "
            f"torch's AdamW"
        )
    for key, value in optimizer.state.get(p, {}).items():
        if key in COUNTED or (key in LINEAR + SQUARED and value is None):
            continue
        if key not in LINEAR + SQUARED or not isinstance(value, Tensor) or value.shape != p.shape:
            keys = ", ".join(map(str, optimizer.state[p]))
            raise ValueError(
                f"extract: the state of {name} in {type(optimizer).__name__} has {key}, which cannot be split between "
                f"R and C; its keys are {keys}, known are {', '.join(LINEAR + SQUARED + COUNTED)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"extract: {key} of {name} is not finite")


def momentum(optimizer: Optimizer, p: Tensor) -> Tensor | None:
    """The average of gradients in the state of a parameter; None without one."""
    state = optimizer.state.get(p, {})
    return next((state[key] for key in LINEAR if state.get(key) is not None), None)


def split(optimizer: Optimizer, p: Tensor, core: Tensor, u: Tensor, v: Tensor) -> None:
    """Give C its share of the state of W, and take it from R."""
    state = optimizer.state.get(p)
    if not state:
        return
    own: dict[str, Any] = {}
    for key, value in state.items():
        if key in LINEAR and value is not None:
            own[key] = inside(value, u, v)
            add_lifted(value, u, own[key], v, -1.0)
        elif key in SQUARED and value is not None:
            own[key] = inside(value, u.square(), v.square())
        else:
            own[key] = value.clone() if isinstance(value, Tensor) else value
    optimizer.state[core] = own


def join(optimizer: Optimizer, p: Tensor, core: Tensor, u: Tensor, v: Tensor) -> None:
    """m_W = m_R + U m_C V^T; second moments and counts are those of R."""
    state, own = optimizer.state.get(p, {}), optimizer.state.get(core, {})
    for key in LINEAR:
        if state.get(key) is not None and own.get(key) is not None:
            add_lifted(state[key], u, own[key].to(u.dtype), v)


def add_groups(
    optimizer: Optimizer, cores: dict[str, tuple[Tensor, Tensor]], boost: float, weight_decay: float | None
) -> list[int]:
    """Add the parameters C in groups of their own, one for each group that has matrices R.

    Args:
        optimizer: any.
        cores: name of C -> (R, C).
        boost: every learning rate of the new group is this times that of R's; other options are R's.
        weight_decay: None for R's.

    Returns:
        The numbers of R's groups, in the order of the new ones.
    """
    place, ours = group_of(optimizer), hasattr(optimizer, "sites")
    sources = sorted({place[r] for r, _ in cores.values()})
    before = len(optimizer.param_groups)
    try:
        for source in sources:
            group = optimizer.param_groups[source]
            options = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
            options |= {key: boost * options[key] for key in RATES if key in options}
            if weight_decay is not None:
                options["weight_decay"] = weight_decay
            mine = [(name, c) for name, (r, c) in cores.items() if place[r] == source]
            params = mine if "param_names" in group else [c for _, c in mine]
            optimizer.add_param_group({**options, **(_DENSE if ours else {}), "params": params})
    except Exception:
        for index in range(len(optimizer.param_groups) - 1, before - 1, -1):
            remove_group(optimizer, index)
        raise
    return sources


def remove_group(optimizer: Optimizer, index: int) -> None:
    """Take a group of any optimizer away, with its parameters' state."""
    own = getattr(optimizer, "remove_param_group", None)
    if own is not None:
        own(index)
        return
    for p in optimizer.param_groups.pop(index)["params"]:
        optimizer.state.pop(p, None)
