"""Residuals: what becomes of the part of the gradient that lies outside the frame."""

from .base import Inside, Passage, Residual, Update
from .discard import Discard
from .feedback import Feedback
from .momentum import Momentum

__all__ = ["Discard", "Feedback", "Inside", "Momentum", "Passage", "Residual", "Update"]
