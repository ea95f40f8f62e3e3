"""What the engine asks of a rank policy, and the notches by which the adaptive ones move."""

from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple, Protocol

from ..frames.base import Ranks
from ..validate import check_float, check_int


class Record(NamedTuple):
    """What validation has said so far: plain numbers, part of the optimizer's ``state_dict()``.

    Args:
        best: the lowest loss reported.
        stale: reports since then, or since ranks were last raised for them.
        notches: by how many ranks were raised for lack of improvement.
    """

    best: float = float("inf")
    stale: int = 0
    notches: int = 0


@dataclass(frozen=True)
class Reading:
    """What a gradient g says about the frame U in use when it is due for a refresh.

    Args:
        spectra: for each compressed mode the shares |u^H g_(n)|^2 / |g|^2 of g's energy along the principal directions
            u of the momentum inside the mode's span, most momentum first. None for whole modes. Modes do not see one
            another; the error of the whole frame obeys |g - F F^H g|^2 <= |g|^2 sum_n outside(n).
    """

    spectra: tuple[tuple[float, ...] | None, ...]

    def outside(self, mode: int) -> float:
        """The share of g's energy that the mode's directions leave out."""
        return max(0.0, 1.0 - sum(self.spectra[mode] or ()))


class Policy(Protocol):
    """Chooses the ranks of a parameter; a frozen dataclass of hyper-parameters, without tensors."""

    @property
    def adaptive(self) -> bool:
        """Whether ranks ever change."""
        ...

    def initial(self, base: Ranks, shape: tuple[int, ...]) -> Ranks:
        """The ranks of the first frame, from those that the layout chose."""
        ...

    def wanted(
        self, reading: Reading, ranks: Ranks, base: Ranks, shape: tuple[int, ...], tick: int, notches: int
    ) -> Ranks:
        """The ranks of the next frame; None exactly where ``ranks`` has it.

        Args:
            reading: of the frame in use.
            ranks: of the frame in use.
            base: those that the layout chose.
            shape: of the parameter's view.
            tick: the number of this step, from 0.
            notches: see :class:`Record`.
        """
        ...

    def below(self, size: int, rank: int) -> int | None:
        """The next lower rank of a mode of this size, None at its limit."""
        ...

    def heard(self, record: Record, loss: float) -> Record:
        """The record after one more validation loss."""
        ...


def heard(record: Record, loss: float) -> Record:
    """The record with the best loss, and the count of reports that did not better it."""
    return record._replace(best=loss, stale=0) if loss < record.best else record._replace(stale=record.stale + 1)


@dataclass(frozen=True, kw_only=True)
class Notches:
    """Ranks move by notches: multiples of ``step`` between two limits; modes no longer than ``step`` take every rank.

    The limits themselves are ranks too, so that a mode can be whole or, with ``minimum=1``, keep one direction. A mode
    at rank d_n still stores its square factor, so that it can shrink again.

    Args:
        minimum: lowest rank of a mode: an int >= 1, or a fraction in (0, 1] of the mode, rounded up.
        maximum: highest rank, likewise, rounded down; where the two conflict the maximum counts.
        step: >= 1; 8 keeps matrix products on tensor cores.
    """

    adaptive = True

    minimum: int | float = 1
    maximum: int | float = 1.0
    step: int = 8

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if isinstance(value, int):
                check_int(name, value, 1)
            else:
                check_float(name, value, 0.0, 1.0, open_low=True)
        check_int("step", self.step, 1)
        if isinstance(self.minimum, int) is isinstance(self.maximum, int) and self.minimum > self.maximum:
            raise ValueError(f"minimum must be <= maximum, {self.maximum!r}, got {self.minimum!r}")

    def admissible(self, size: int) -> tuple[int, ...]:
        """The ranks that a mode of this size can take, rising."""
        high = self.maximum if isinstance(self.maximum, int) else max(1, floor(self.maximum * size + 1e-9))
        high = min(high, size)
        low = self.minimum if isinstance(self.minimum, int) else ceil(self.minimum * size - 1e-9)
        low = max(1, min(low, high))
        step = self.step if size > self.step else 1
        return tuple(sorted({low, high, *range(step * ceil(low / step), high, step)}))

    def at_least(self, size: int, rank: float) -> int:
        """The lowest admissible rank that is not below this one, or the highest of all."""
        ranks = self.admissible(size)
        return next((r for r in ranks if r >= rank - 1e-9), ranks[-1])

    def below(self, size: int, rank: int) -> int | None:
        """The next lower admissible rank."""
        return next((r for r in reversed(self.admissible(size)) if r < rank), None)

    def initial(self, base: Ranks, shape: tuple[int, ...]) -> Ranks:
        """The layout's ranks, rounded up to admissible ones."""
        return tuple(None if r is None else self.at_least(d, r) for r, d in zip(base, shape, strict=True))

    def heard(self, record: Record, loss: float) -> Record:
        """Only remembered."""
        return heard(record, loss)

    def within(self, reading: Reading, ranks: Ranks, shape: tuple[int, ...], most: float, least: float) -> Ranks:
        """Ranks that keep the energy outside each mode between two shares.

        A mode grows to its next admissible rank where more than ``most`` is outside, and shrinks at once to the lowest
        one that leaves no more than ``least`` outside; in between it stays.
        """
        return tuple(
            None if r is None else self._mode(reading, n, r, shape[n], most, least) for n, r in enumerate(ranks)
        )

    def _mode(self, reading: Reading, mode: int, rank: int, size: int, most: float, least: float) -> int:
        if reading.outside(mode) > most:
            return self.at_least(size, rank + 1)
        spectrum = reading.spectra[mode] or ()
        enough = (r for r in self.admissible(size) if r < rank and 1 - sum(spectrum[:r]) <= least)
        return next(enough, min(rank, self.admissible(size)[-1]))
