"""Update rules: what turns core coordinates into a direction."""

from .adafactor import Adafactor
from .adam import Adam
from .base import Rule
from .columns import Columns
from .lion import Lion
from .momentum import Momentum
from .muon import Muon
from .normuon import NorMuon
from .scheduled import Scheduled
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "SOAP",
    "Adafactor",
    "Adam",
    "Columns",
    "Lion",
    "Momentum",
    "Muon",
    "NorMuon",
    "Rule",
    "Scheduled",
    "Shampoo",
]
