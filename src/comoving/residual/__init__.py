"""Residuals: what becomes of the part of the gradient that lies outside the frame."""

from .base import Passage, Residual
from .discard import Discard
from .feedback import Feedback

__all__ = ["Discard", "Feedback", "Passage", "Residual"]
