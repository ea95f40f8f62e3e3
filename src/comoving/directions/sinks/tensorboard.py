"""TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from comoving.race.extras import require


class TensorBoard:
    """Scalars in an event file.

    Args:
        folder: where TensorBoard looks.
        resume_at: updates of a run that goes on; TensorBoard forgets what was written of later ones.

    Raises:
        ImportError: without the extra "log".
    """

    def __init__(self, folder: str | Path, resume_at: int | None = None) -> None:
        require("tensorboard", "log")
        writer = require("torch.utils.tensorboard", "log").SummaryWriter
        self._writer = writer(str(folder), purge_step=None if resume_at is None else resume_at + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar each, at this update."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
