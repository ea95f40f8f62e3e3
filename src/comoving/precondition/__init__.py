"""Preconditioners: what is done to a gradient in the full space, before it is projected."""

from .base import Precondition
from .kronecker import Kronecker
from .plain import Plain

__all__ = ["Kronecker", "Plain", "Precondition"]
