"""Update rules: what turns core coordinates into a direction."""

from .adam import Adam
from .base import Rule
from .shampoo import Shampoo
from .soap import SOAP

__all__ = ["SOAP", "Adam", "Rule", "Shampoo"]
