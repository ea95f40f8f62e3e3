"""Update rules: what turns core coordinates into a direction."""

from .adafactor import Adafactor
from .adam import Adam
from .base import Rule
from .columns import Columns
from .lion import Lion
from .low_rank import LowRankAdam, LowRankMuon
from .momentum import Momentum
from .muon import Muon
from .scheduled import Scheduled
from .shampoo import Shampoo
from .soap import SOAP

__all__ = [
    "SOAP",
    "Adafactor",
    "Adam",
    "Columns",
    "Lion",
    "LowRankAdam",
    "LowRankMuon",
    "Momentum",
    "Muon",
    "Rule",
    "Scheduled",
    "Shampoo",
]
