"""What processes that share rows tell one another: every sum, mean and maximum over them goes through a ``Comm``."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """Joins what each process has of an operand O, so that all see the same one.

    Either each has an operand of its own, and O is the mean of them; or each has some entries of one mode of O, the
    one that is ``split``. Modes are numbered as in :class:`comoving.finders.Operand`, 0 to N - 1, of tensors
    (*rows, d_1, ..., d_N).
    """

    @property
    def alone(self) -> bool:
        """Whether there is nobody to tell anything."""
        ...

    @property
    def split(self) -> int | None:
        """The mode of which each process has some entries; None where each has all of them."""
        ...

    def joined(self, product: Tensor, over: Collection[int]) -> Tensor:
        """Of a product that is linear in O, and contracted over these modes, that of all processes.

        Args:
            product: of what is here of O; given up.
            over: modes.
        """
        ...

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """x with the entries of all processes along this dimension, which counts the mode that is split."""
        ...

    def here(self, x: Tensor, dim: int) -> Tensor:
        """The entries of this process along this dimension, which counts all of the mode that is split; a view."""
        ...

    def length(self, here: int) -> int:
        """How many entries the mode that is split has, of which so many are here."""
        ...

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """What others see of a core that each process has for itself, and sends them: as it is rounded on the way.

        Args:
            core: (*rows, ...), which may be what is returned.
            rows: how many dimensions in front count rows.
        """
        ...

    def largest(self, figure: Tensor) -> Tensor:
        """The largest of real figures of all processes, entry by entry."""
        ...

    def norm(self, norms: Tensor) -> Tensor:
        """Frobenius norms of tensors of which each process has its entries, from the norms of what is here."""
        ...


class Local:
    """One process: all of O is here."""

    alone, split = True, None

    def joined(self, product: Tensor, over: Collection[int]) -> Tensor:
        """The product."""
        return product

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """x."""
        return x

    def here(self, x: Tensor, dim: int) -> Tensor:
        """x."""
        return x

    def length(self, here: int) -> int:
        """What is here."""
        return here

    def sent(self, core: Tensor, rows: int) -> Tensor:
        """The core."""
        return core

    def largest(self, figure: Tensor) -> Tensor:
        """The figure."""
        return figure

    def norm(self, norms: Tensor) -> Tensor:
        """The norms."""
        return norms


LOCAL = Local()
"""The one that there is unless a driver, or a placement, brings another."""
