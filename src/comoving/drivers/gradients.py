"""Bad gradients: refused before anything changes, or undone on the device."""

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..codecs.base import as_real
from ..finders.delayed import is_awaited
from ..frames.stored import PREFIX
from ..linalg import norm
from ..linalg.entries import is_short
from ..rounding import SEED
from ..sites import Site
from ..state import MEMORY


def check_layout(params: Iterable[Tensor], sites: Mapping[Tensor, Site]) -> None:
    """Raise unless every gradient is dense.

    Raises:
        RuntimeError: naming the parameter and the layout.
    """
    for p in params:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise RuntimeError(f"{sites[p].name} has a {p.grad.layout} gradient; only dense gradients are supported")


def norms(found: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The Frobenius norm of each parameter's gradient, on its device; not finite where the gradient is not."""
    few = [g for g in found.values() if is_short(g)]
    # One call for many small ones takes a quarter of the time.
    short = iter(torch._foreach_norm(few) if few else ())  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return {p: next(short) if is_short(g) else norm(g) for p, g in found.items()}


def any_nonfinite(figures: Iterable[Tensor]) -> Tensor:
    """One flag for all gradients, on the first one's device, from one scalar figure of each."""
    listed = list(figures)
    device = listed[0].device
    return ~torch.stack([x if x.device == device else x.to(device) for x in listed]).isfinite().all()


def sums(given: Iterable[Tensor]) -> list[Tensor]:
    """The sum of each gradient's entries: not finite if one of them is not, and safe where a norm overflows."""
    real = [as_real(g.resolve_conj()) for g in given]
    return [g.sum(dtype=g.dtype if g.dtype == torch.float64 else torch.float32) for g in real]


def nonfinite(given: Mapping[Tensor, Tensor], sites: Mapping[Tensor, Site]) -> list[str]:
    """The parameters whose gradient has a NaN or an infinity; a norm may overflow where every entry is finite."""
    return [sites[p].name for p, g in given.items() if not bool(g.isfinite().all())]


def refuse_nonfinite(culprits: str) -> None:
    """Raise for gradients that have a NaN or an infinity.

    Raises:
        RuntimeError: naming the parameters.
    """
    raise RuntimeError(
        f"non-finite gradient in {culprits}: nothing was changed. Look for a diverging loss, or pass "
        f'on_nonfinite="skip" to skip such steps'
    )


def usable(gradient: Tensor, bad: Tensor | None) -> Tensor:
    """The gradient, or zero where the flag is set: no decomposition may see a NaN."""
    return gradient if bad is None else torch.where(bad.to(gradient.device), torch.zeros_like(gradient), gradient)


class Undo(AbstractContextManager[None]):
    """Undoes what happens inside to parameters and their state, where a flag on the device says so.

    Args:
        flag: one boolean.
        params: what to put back where it is set.
        states: likewise, and with each what slots that are still to come begin as.
    """

    def __init__(
        self, flag: Tensor, params: list[Tensor], states: list[tuple[MutableMapping[str, Any], dict[str, Tensor]]]
    ) -> None:
        self._flag, self._params, self._states = flag, params, states

    def __enter__(self) -> None:
        """Remember."""
        self._values = [p.clone() for p in self._params]
        self._slots = [_clones(state) | awaited for state, awaited in self._states]

    def __exit__(self, *error: object) -> None:
        """Choose, entry by entry, on the device."""
        for p, value in zip(self._params, self._values, strict=True):
            p.copy_(torch.where(self._flag.to(p.device), value, p))
        for (state, _), slots in zip(self._states, self._slots, strict=True):
            for name, old in slots.items():
                new = state.get(name)
                if new is None or new.shape != old.shape:
                    continue
                if new.device != self._flag.device and new.device.type == "cpu":
                    # For a number on the host the flag would be fetched: only for one that a frame is drawn from.
                    if torch.equal(new, old) or not _draws_frame(name, state):
                        continue
                new.copy_(torch.where(self._flag.to(new.device), old, new))


def _draws_frame(name: str, state: Mapping[str, Any]) -> bool:
    """Whether a slot is the seed of a factor that is stored nowhere: moments would stay, and their frame would not."""
    factor, dot, last = name.rpartition(".")
    stored = any(other == factor or other.startswith(f"{factor}.codes") for other in state)
    return bool(dot) and last == "seed" and name.startswith(PREFIX) and not stored


def _searched(name: str) -> bool:
    """Whether a slot is one for a frame that is to come: a step that is skipped has looked for it at zeros."""
    return name.startswith(MEMORY) and is_awaited(name.removeprefix(MEMORY))


def _clones(state: Mapping[str, Any]) -> dict[str, Tensor]:
    # Ranks change only where the flag was read on the host. Seeds of rounding go on, as the count of steps does: to put
    # them back the host would have to wait for the flag at every step.
    return {
        name: value.clone()
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.startswith("ranks") and name != SEED and not _searched(name)
    }
