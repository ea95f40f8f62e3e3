"""What the optimizer asks of a driver that brings gradients of its own."""

from typing import Protocol


class Driver(Protocol):
    """Takes gradients up elsewhere than in ``p.grad``, and steps by them; its ``str`` is what messages call it."""

    @property
    def waiting(self) -> bool:
        """Whether gradients have been taken up that no state holds."""
        ...

    def step(self) -> None:
        """One step, by the gradients that were taken up."""
        ...

    def drop(self) -> None:
        """Leave them: parameters and states stay as they are."""
        ...
