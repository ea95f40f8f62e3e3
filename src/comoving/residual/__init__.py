"""Residuals: what becomes of the part of the gradient that lies outside the frame."""

from .base import Inside, Passage, Residual, Update
from .discard import Discard
from .feedback import Feedback

__all__ = ["Discard", "Feedback", "Inside", "Passage", "Residual", "Update"]
