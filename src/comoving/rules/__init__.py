"""Update rules: what turns core coordinates into a direction."""

from .adafactor import Adafactor
from .adam import Adam
from .adams import AdamS
from .base import Rule
from .columns import Columns
from .lion import Lion
from .low_rank import LowRankAdam, LowRankMuon
from .momentum import Momentum
from .muon import Muon
from .normalized import Normalized
from .normuon import NorMuon
from .scheduled import Scheduled
from .shampoo import Shampoo
from .soap import SOAP
from .swan import SWAN

__all__ = [
    "SOAP",
    "SWAN",
    "AdamS",
    "Adafactor",
    "Adam",
    "Columns",
    "Lion",
    "Momentum",
    "Muon",
    "Normalized",
    "NorMuon",
    "LowRankAdam",
    "LowRankMuon",
    "Momentum",
    "Muon",
    "Rule",
    "Scheduled",
    "Shampoo",
]
