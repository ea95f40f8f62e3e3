"""The few directions in which training moves: watching them, and learning faster along them."""

from .callbacks import lightning_callback, trainer_callback
from .monitor import SpectralMonitor
from .options import add_arguments, from_arguments
from .sinks import JSONLines, Log, TensorBoard, WandB, parse_sink
from .targets import TARGETS, targets

__all__ = [
    "TARGETS",
    "JSONLines",
    "Log",
    "SpectralMonitor",
    "TensorBoard",
    "WandB",
    "add_arguments",
    "from_arguments",
    "lightning_callback",
    "parse_sink",
    "targets",
    "trainer_callback",
]
