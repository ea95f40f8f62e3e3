"""Which store a parameter has."""

from torch import Tensor

from ..sites import Site
from ..weights import codes_of
from .base import Store
from .coded import Coded
from .plain import Plain
from .rounded import Rounded


def store_of(p: Tensor, site: Site) -> Store:
    """The store of a parameter, for one step."""
    codes = codes_of(p) if site.coded else None
    if codes is not None:
        return Coded(codes, site.view)
    return Rounded(p, site.view) if site.rounded else Plain(p, site.view)
