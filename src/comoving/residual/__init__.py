"""Residuals: what becomes of the part of the gradient that lies outside the frame."""

from .base import Cores, Holding, Inside, Passage, Residual, Update
from .channel import Channel
from .discard import Discard
from .feedback import Feedback
from .fira import Fira
from .momentum_buffer import MomentumBuffer
from .raw import Raw
from .sign import Sign
from .sparse import Sparse

__all__ = [
    "Channel",
    "Cores",
    "Discard",
    "Feedback",
    "Fira",
    "Holding",
    "Inside",
    "MomentumBuffer",
    "Passage",
    "Raw",
    "Residual",
    "Sign",
    "Sparse",
    "Update",
]
