"""Preconditioners: what is done to a gradient in the full space, before it is projected."""

from .base import Precondition
from .factored import Factored
from .kronecker import Kronecker
from .plain import Plain

__all__ = ["Factored", "Kronecker", "Plain", "Precondition"]
