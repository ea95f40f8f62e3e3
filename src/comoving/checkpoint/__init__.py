"""Checkpoints: files that a crash cannot break, what is in them, and what an optimizer makes of them."""

from .convert import admit, owned
from .copies import WIRE, averaged, copies_in, kept_apart, without_wire
from .describe import describe, describe_group
from .idle import with_idle, without_idle
from .load import check_form, load_groups, match_parameters, unheard
from .save import save

__all__ = [
    "WIRE",
    "admit",
    "averaged",
    "check_form",
    "copies_in",
    "describe",
    "describe_group",
    "kept_apart",
    "load_groups",
    "match_parameters",
    "owned",
    "save",
    "unheard",
    "with_idle",
    "without_idle",
    "without_wire",
]
