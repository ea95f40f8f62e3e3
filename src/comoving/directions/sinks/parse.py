"""Sinks from words on a command line."""

from .base import Sink
from .json_lines import JSONLines
from .log import Log
from .tensorboard import TensorBoard
from .wandb import WandB


def parse_sink(text: str, resume_at: int | None = None) -> Sink:
    """The sink that ``jsonl:PATH``, ``tensorboard:FOLDER``, ``wandb:PROJECT``, ``log`` or ``log:LOGGER`` names.

    Args:
        text: one of these.
        resume_at: as for :class:`JSONLines`.

    Raises:
        ValueError: anything else.
        ImportError: without the extra "log", for TensorBoard and Weights & Biases.
    """
    kind, _, where = text.partition(":")
    if kind == "log":
        return Log(where) if where else Log()
    if kind == "jsonl" and where:
        return JSONLines(where, resume_at)
    if kind == "tensorboard" and where:
        return TensorBoard(where)
    if kind == "wandb" and where:
        return WandB(where)
    raise ValueError(f"{text!r} is no sink; give jsonl:PATH, tensorboard:FOLDER, wandb:PROJECT, log or log:LOGGER")
