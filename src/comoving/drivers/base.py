"""What the optimizer asks of a driver that brings gradients of its own."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor


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

    def saved(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A parameter's state as a checkpoint of all processes has it."""
        ...

    def loaded(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a parameter's state in a checkpoint is this process's; nothing of the driver's own changes yet."""
        ...

    def adopt(self, loaded: Collection[Tensor]) -> None:
        """Everything is loaded, of these parameters: from now on go by it, and of others by nothing."""
        ...
