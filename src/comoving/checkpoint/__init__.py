"""Checkpoints: files that a crash cannot break, what is in them, and what an optimizer makes of them."""

from .convert import admit, owned
from .describe import describe, describe_group
from .load import check_form, load_groups, match_parameters, unheard
from .save import save

__all__ = [
    "admit",
    "check_form",
    "describe",
    "describe_group",
    "load_groups",
    "match_parameters",
    "owned",
    "save",
    "unheard",
]
