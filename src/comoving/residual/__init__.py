"""Residuals: what becomes of the part of the gradient that lies outside the frame."""

from .base import Cores, Holding, Inside, Passage, Residual, Update
from .channel import Channel
from .details import Details
from .discard import Discard
from .feedback import Feedback
from .fira import Fira
from .folded import Folded
from .momentum_buffer import MomentumBuffer
from .raw import Raw
from .sign import Sign
from .sparse import Sparse
from .subset_norm import SubsetNorm

__all__ = [
    "Channel",
    "Cores",
    "Details",
    "Discard",
    "Feedback",
    "Fira",
    "Folded",
    "Holding",
    "Inside",
    "MomentumBuffer",
    "Passage",
    "Raw",
    "Residual",
    "Sign",
    "Sparse",
    "SubsetNorm",
    "Update",
]
