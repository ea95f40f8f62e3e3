"""Moments that are kept in the weights: what :class:`comoving.codecs.InWeights` asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import state as slots
from .codecs import InWeights, Spec
from .codecs.base import as_real
from .codecs.mantissa import Mantissa
from .rules import Lion, Muon
from .sites import Site

WIDEST = 12
"""Bits of each weight at most: 11 of its mantissa are left, more than float16 has."""


@dataclass(frozen=True)
class Embedded:
    """How the moments of a parameter lie in its weights.

    Args:
        site: of the parameter.
        group: its hyper-parameters, with the codec that makes the codes.
        specs: what is stored, by name.
        mantissa: where its bytes are.
    """

    site: Site
    group: Mapping[str, Any]
    specs: Mapping[str, Spec]
    mantissa: Mantissa

    @classmethod
    def of(cls, site: Site, group: Mapping[str, Any]) -> "Embedded | None":
        """That of a parameter, by its hyper-parameters as they hold for it; None where it has none there."""
        codec = group["moments"]
        if not isinstance(codec, InWeights):
            return None
        own = {**group, "moments": codec.codec}
        specs = slots.moments(site, own)
        if not specs:
            return None
        entries = prod(site.view.shape) * (2 if site.view.dtype.is_complex else 1)
        return cls(site, own, specs, Mantissa(max(1, entries), sum(map(slots.spec_bytes, specs.values()))))

    def take(self, weights: Tensor, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights without what is kept in them, as a tensor of its own, and the moments, decoded.

        Args:
            weights: (*rows, d_1, ..., d_N).
            rows: how many leading dimensions count rows.
        """
        numbers, kept = self.mantissa.take(self._flat(weights, rows))
        sizes = [slots.spec_bytes(spec) for spec in self.specs.values()]
        stored = {
            name: own.clone(memory_format=torch.contiguous_format)
            .view(spec.dtype)
            .view(*weights.shape[:rows], *spec.shape)
            for (name, spec), own in zip(self.specs.items(), kept.split(sizes, -1), strict=True)
        }
        return self._shaped(numbers, weights), slots.decoded(self.site, self.group, stored, rows=rows)

    def put(self, weights: Tensor, moments: Mapping[str, Tensor], step: int | Tensor, rows: int) -> Tensor:
        """The weights with the moments in them, rounded by random bits that follow from the step."""
        stored = slots.encoded(self.site, self.group, moments, None, rows)
        kept = [stored[name].contiguous().view(*weights.shape[:rows], -1).view(torch.uint8) for name in self.specs]
        return self._shaped(self.mantissa.put(self._flat(weights, rows), torch.cat(kept, -1), step), weights)

    def _flat(self, weights: Tensor, rows: int) -> Tensor:
        return as_real(weights).reshape(*weights.shape[:rows], -1)

    @staticmethod
    def _shaped(numbers: Tensor, like: Tensor) -> Tensor:
        shaped = numbers.view(as_real(like).shape)
        return torch.view_as_complex(shaped) if like.is_complex() else shaped


def trouble(site: Site, group: Mapping[str, Any]) -> str | None:
    """Why the moments of a parameter cannot be kept in its weights; None where they can, or are not to be."""
    if not isinstance(group["moments"], InWeights) or not site.ruled:
        return None
    if site.projected:
        return "and its moments belong to a frame, not to its entries: use rank=1.0"
    if site.view.stored_dtype not in (torch.float32, torch.complex64) or site.coded:
        return "and only float32 has bits to spare: keep the weights in float32, or the moments in the state"
    if not isinstance(group["rule"], _AGELESS):
        return (
            f"and {group['rule']} goes by the age of its averages, which is another one once they begin anew: use "
            f"muon(), normuon() or lion()"
        )
    embedded = Embedded.of(site, group)
    width = 0 if embedded is None else embedded.mantissa.width
    if width > WIDEST:
        count = prod(site.view.shape)
        return (
            f"and codes with their steps take {width} bits of each of its {count} weights, of which {WIDEST} are free"
        )
    return None


_AGELESS = (Muon, Lion)
"""Rules whose directions follow from their slots alone, all of which begin at zero."""
