"""TensorGRaD: a few entries are kept exactly, beside what the frame holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor

from ..codecs import Codec, Spec
from ..draws import generator
from ..finders import Operand
from ..linalg import each_row, norm
from ..rules import Adam, Rule
from ..slots import Kind, Slot
from ..validate import check_choice, check_float, check_int
from .base import HELD, Cores, Passage, Update

_PREFIX, _INDICES, _DRAWS, _OLD = "sparse.", "sparse.indices", "sparse.draws", "held.indices"
_KINDS = {Kind.LINEAR, Kind.VARIANCE, Kind.SCALAR}
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sparse:
    """Entries Omega of the gradient with moments of their own, beside the low-rank part (TensorGRaD, arXiv 2501.02379).

    first       x = g on Omega,   z = F^H (g - x)          the frame sees what they leave
    otherwise   z = F^H g,        x = (g - F z) on Omega   they are taken from what the frame leaves

    w <- shrink w + factor F d - lr scale d_x on Omega

    with d_x the rule's direction for x. Omega is chosen at each refresh, from g or from g - F z, and stored as
    ascending indices of the flattened tensor, integers of 4 bytes (8 above 2^31 entries). A gradient that is zero
    everywhere leaves it as it is. Several gradients of one step add up.

    Args:
        fraction: of the entries, in (0, 1), rounded up.
        choose: "top", the largest |g|; "random", uniformly; "probabilistic", one after another with probability
            proportional to |g|. Draws are those of the seed and their number, equal on all ranks.
        first: as above.
        scale: of d_x, > 0; the group's own does not concern it.
        statistics: what becomes of moments when Omega changes: "carry" leaves each with its entry, and entries that
            are new start at zero; "keep" hands them to the new indices in ascending order, as the authors do; "reset"
            zeroes all. The rule's clock runs on.
        rule: turns x into d_x, entry by entry.
        seed: >= 0.

    The state is "sparse.indices", the rule's slots by "sparse.<slot>", and "sparse.draws" where there are any. Every
    row of a batch has indices and moments of its own.
    """

    batched: ClassVar[bool] = True  # where the rule is
    alone: ClassVar[bool] = True  # what is chosen may have to be drawn, row by row
    entrywise: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    feeds: ClassVar[bool] = False
    rescales: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    reads: ClassVar[bool] = False

    fraction: float = 0.05
    choose: str = "top"
    first: bool = True
    scale: float = 1.0
    statistics: str = "carry"
    rule: Rule = Adam()  # noqa: RUF009  (frozen)
    seed: int = 0

    @property
    def replays(self) -> bool:
        """Where the rule does."""
        return self.rule.replays

    def __post_init__(self) -> None:
        check_float("fraction", self.fraction, 0.0, 1.0, open_low=True, open_high=True)
        check_choice("choose", self.choose, ("top", "random", "probabilistic"))
        check_choice("first", self.first, (True, False))
        check_float("scale", self.scale, 0.0, open_low=True)
        check_choice("statistics", self.statistics, ("carry", "keep", "reset"))
        check_int("seed", self.seed, 0)
        if isinstance(self.rule, type) or not all(
            hasattr(self.rule, x) for x in ("direction", "elementwise", "batched")
        ):
            raise TypeError(f"rule must be a rule part, got {self.rule!r}")
        self._slots(2)
        if not self.rule.batched:
            object.__setattr__(self, "batched", False)

    def schema(
        self, codec: Codec, shape: tuple[int, ...], core_shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, Spec]:
        """Indices, the rule's slots for a vector of as many entries, and a count of draws.

        Raises:
            ValueError: so many entries that nothing is left to the frame.
        """
        entries, count = prod(shape), self.count(shape)
        if count >= entries:
            raise ValueError(
                f"residual {self} keeps {count} of {entries} entries exactly, which leaves nothing to the frame"
            )
        schema = {_INDICES: Spec((count,), torch.int32 if entries < 2**31 else torch.int64)}
        for slot in self._slots(count):
            whole = Spec((count,), dtype.to_real() if slot.kind is Kind.VARIANCE else dtype)
            schema[_PREFIX + slot.name] = Spec((), torch.float32, scalar=True) if slot.kind is Kind.SCALAR else whole
        return schema if self.choose == "top" else schema | {_DRAWS: Spec((), torch.int64, scalar=True, own=True)}

    def count(self, shape: tuple[int, ...]) -> int:
        """How many entries of a tensor of this shape are kept."""
        return ceil(self.fraction * prod(shape))

    def renew(self, gradient: Tensor, state: dict[str, Tensor], codec: Codec) -> None:
        """Choose Omega from g, or put it off until g - F z is known."""
        state[_OLD] = state.pop(_INDICES)
        if self.first:
            self._choose(gradient, state)

    def split(self, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """g - x where the entries are taken first, else g."""
        if not self.first:
            return gradient
        self._hold(gradient, state)
        at = state[_INDICES].long()
        if at.ndim > 1:
            return each_row(gradient, at.ndim - 1).scatter(-1, at, 0).view(gradient.shape)
        return gradient.flatten().index_fill(0, at, 0).view(gradient.shape)

    def restore(
        self, gradient: Tensor, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> Operand:
        """The gradient itself: nothing comes from earlier steps."""
        return Operand(gradient, rows=passage.rows)

    def keep(
        self, dense: Tensor, cores: Cores, passage: Passage, opening: bool, state: dict[str, Tensor], codec: Codec
    ) -> None:
        """Where the frame comes first: choose Omega when it is due, and hold g on it."""
        if self.first:
            return
        if _OLD in state:
            self._choose(dense - passage.frame.lift(cores.total), state)
        self._hold(dense, state)

    def size(self, core: Tensor, rest: Tensor, state: dict[str, Tensor]) -> Tensor:
        """What the frame holds, what it leaves, and the entries, where they are no part of the rest."""
        seen = torch.hypot(norm(core, rest.ndim), rest.to(core.device))
        return torch.hypot(seen, norm(state[HELD], rest.ndim)) if self.first else seen

    def rescale(self, factor: float, core: Tensor, passage: Passage, state: dict[str, Tensor], codec: Codec) -> None:
        """The entries are multiplied."""
        state[HELD] = state[HELD] * factor

    def write(self, weights: Tensor, update: Update, state: dict[str, Tensor], codec: Codec) -> None:
        """w <- shrink w + factor F d + rate scale d_x."""
        x, indices = state.pop(HELD), state[_INDICES].long()
        if not self.first:
            x = x - _entries(update.frame.lift(update.core), indices)
        own = {slot.name: state[_PREFIX + slot.name] for slot in self._slots(indices.shape[-1])}
        if not self.rule.replaces:
            own = {name: value.clone() for name, value in own.items()}
        self.rule.absorb(x, own, update.clock)
        d = self.rule.direction(own, update.clock, update.eps).mul_(update.rate * self.scale)
        state.update({_PREFIX + slot.name: own[slot.name] for slot in self._slots(indices.shape[-1])})
        at = _unravelled(indices, weights.shape[update.rows :])  # the weights may be a slice
        if update.rows:
            at = (torch.arange(len(indices), device=indices.device).unsqueeze(-1), *at)
        update.write(weights)
        weights[at] += d

    def error(self, state: dict[str, Tensor], codec: Codec, rows: int = 0) -> Tensor:
        """Zero: nothing is encoded."""
        return torch.zeros(())

    def _hold(self, gradient: Tensor, state: dict[str, Tensor]) -> None:
        entries = _entries(gradient, state[_INDICES].long())
        state[HELD] = state[HELD] + entries if HELD in state else entries

    def _choose(self, looked_at: Tensor, state: dict[str, Tensor]) -> None:
        """Omega from the entries that are looked at, of no batch, and the moments on it."""
        old, size = state.pop(_OLD), looked_at.flatten().abs()
        count = old.shape[0]
        weight = size if self.choose == "top" else self._drawn(size, state)
        new = weight.topk(count).indices.sort().values.to(old.dtype)
        if self.choose != "random":
            # Nothing was to be seen: the old ones stay, unless they are the zeros that all slots begin as.
            new = torch.where(size.any() | (old[-1] < count - 1), new, old)
        state[_INDICES] = new
        if self.statistics == "keep":
            return
        place = torch.searchsorted(old, new).clamp_max_(count - 1)
        stays = (old[place] == new) & (self.statistics == "carry")
        for slot in self._slots(count):
            x = state[_PREFIX + slot.name]
            if slot.kind is not Kind.SCALAR:
                state[_PREFIX + slot.name] = torch.where(stays, x[place], 0)
            elif self.statistics == "reset":
                state[_PREFIX + slot.name] = torch.zeros_like(x)

    def _drawn(self, size: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Numbers whose largest are the draw: e, or |g| / e, of exponential e (Efraimidis and Spirakis, 2006)."""
        draws = int(state[_DRAWS])
        state[_DRAWS] = torch.tensor(draws + 1, device="cpu")
        waits = torch.empty(size.shape, dtype=torch.float64, device="cpu")
        waits.exponential_(generator=generator(self.seed, draws))
        waits = waits.to(size.device, non_blocking=True)
        return waits if self.choose == "random" else (size / size.amax().clamp_min(_TINY)).double() / waits

    def _slots(self, count: int) -> tuple[Slot, ...]:
        """The rule's slots for a vector of this length.

        Raises:
            ValueError: a rule that is not elementwise.
        """
        if not self.rule.elementwise:
            raise ValueError(f"rule must be elementwise, without statistics of modes, got {self.rule!r}")
        return self.rule.slots((count,))


def _entries(x: Tensor, at: Tensor) -> Tensor:
    """The entries of each row of x at its own indices, (*rows, count)."""
    return each_row(x, at.ndim - 1).gather(-1, at) if at.ndim > 1 else x.flatten()[at]


def _unravelled(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """The index along each mode; torch's own function would wait for the device."""
    along: list[Tensor] = []
    for size in reversed(shape):
        along.append(indices % size)
        indices = indices // size
    return tuple(reversed(along))
