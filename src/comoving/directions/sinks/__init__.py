"""Where the figures of readings go: JSON lines, the log, TensorBoard, Weights & Biases."""

from .base import Sink
from .json_lines import JSONLines
from .log import Log
from .parse import parse_sink
from .tensorboard import TensorBoard
from .wandb import WandB

__all__ = ["JSONLines", "Log", "Sink", "TensorBoard", "WandB", "parse_sink"]
