"""TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from comoving.race.extras import require


class TensorBoard:
    """Scalars in an event file.

    Args:
        folder: where TensorBoard looks.

    Raises:
        ImportError: without the extra "log".
    """

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", "log")
        self._writer = require("torch.utils.tensorboard", "log").SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each, at this update."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
