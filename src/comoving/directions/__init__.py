"""The few directions in which training moves: watching them, and learning faster along them."""

from .branches import Branch, Branches, add_branches
from .callbacks import lightning_callback, trainer_callback
from .extraction import Extracted, Extraction, extract, prepare
from .gain import Amplifier, Gain, amplify
from .monitor import SpectralMonitor
from .options import add_arguments, from_arguments
from .sinks import JSONLines, Log, TensorBoard, WandB, parse_sink
from .targets import TARGETS, targets

__all__ = [
    "TARGETS",
    "Amplifier",
    "Branch",
    "Branches",
    "Extracted",
    "Extraction",
    "Gain",
    "JSONLines",
    "Log",
    "SpectralMonitor",
    "TensorBoard",
    "WandB",
    "add_arguments",
    "add_branches",
    "amplify",
    "extract",
    "from_arguments",
    "lightning_callback",
    "parse_sink",
    "prepare",
    "targets",
    "trainer_callback",
]
