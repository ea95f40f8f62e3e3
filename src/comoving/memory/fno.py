"""Fourier neural operators from their settings, as light module trees without data."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn


class SpectralWeight(nn.Module):
    """The complex weight (channels, channels, modes...) of one Fourier layer, real inputs' half spectrum."""

    def __init__(self, channels: int, modes: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        kept = (*modes[:-1], modes[-1] // 2 + 1)
        self.weight = nn.Parameter(torch.empty(channels, channels, *kept, dtype=torch.complex64, device=device))
        self.bias = nn.Parameter(torch.empty(channels, *(1 for _ in modes), device=device))


@dataclass(frozen=True)
class FNO:
    """The sizes of a Fourier neural operator (arXiv 2010.08895) with real input.

    Args:
        modes: kept frequencies of each dimension of space; of the last one half are stored, modes // 2 + 1.
        channels: width.
        layers: Fourier layers, each with a linear skip connection.
        inputs, outputs: channels of the data.
        resolution: points in each dimension of space, for activations; () where unknown.
    """

    modes: tuple[int, ...]
    channels: int
    layers: int
    inputs: int = 1
    outputs: int = 1
    resolution: tuple[int, ...] = ()

    @property
    def points(self) -> int:
        """Points of space, 0 where unknown."""
        return prod(self.resolution) if self.resolution else 0

    def build(self, dtype: torch.dtype) -> nn.Module:
        """A module tree on the meta device; spectral weights are complex64 whatever the dtype of the rest."""
        options: dict[str, Any] = {"device": torch.device("meta"), "dtype": dtype}
        wide = 2 * self.channels
        spectral = [SpectralWeight(self.channels, self.modes, torch.device("meta")) for _ in range(self.layers)]
        skips = [nn.Linear(self.channels, self.channels, bias=False, **options) for _ in range(self.layers)]
        parts: dict[str, nn.Module] = {
            "lifting": nn.ModuleList(
                [nn.Linear(self.inputs, wide, **options), nn.Linear(wide, self.channels, **options)]
            ),
            "convs": nn.ModuleList(spectral),
            "fno_skips": nn.ModuleList(skips),
            "projection": nn.ModuleList(
                [nn.Linear(self.channels, wide, **options), nn.Linear(wide, self.outputs, **options)]
            ),
        }
        return nn.ModuleDict(parts)


_SYNTAX = "fno:modes=16x16,channels=64,layers=4[,inputs=1][,outputs=1][,resolution=64x64]"


def parse_fno(text: str) -> FNO:
    """Settings from text: ``fno:modes=16x16,channels=64,layers=4,resolution=64x64``.

    Raises:
        ValueError: an unknown, missing or doubled setting, or a number that is not an integer >= 1.
    """
    known = {"modes", "channels", "layers", "inputs", "outputs", "resolution"}
    given: dict[str, tuple[int, ...]] = {}
    for entry in text.removeprefix("fno:").split(","):
        name, _, value = entry.strip().partition("=")
        if name not in known or name in given:
            raise ValueError(f"{entry.strip()!r} in {text!r} is no setting of an FNO, or a second one: {_SYNTAX}")
        parts = value.split("x")
        if not all(part.isdecimal() and int(part) >= 1 for part in parts):
            raise ValueError(f"{name} in {text!r} must be integers >= 1 joined by x, got {value!r}")
        given[name] = tuple(map(int, parts))
    missing = [name for name in ("modes", "channels", "layers") if name not in given]
    if missing:
        raise ValueError(f"{text!r} lacks {', '.join(missing)}: {_SYNTAX}")
    single = {name: value for name, value in given.items() if name not in {"modes", "resolution"}}
    if any(len(value) != 1 for value in single.values()):
        raise ValueError(f"channels, layers, inputs and outputs in {text!r} are single integers")
    resolution = given.get("resolution", ())
    if resolution and len(resolution) != len(given["modes"]):
        counts = f"{len(resolution)} and {len(given['modes'])}"
        raise ValueError(f"resolution and modes in {text!r} must have as many dimensions, got {counts}")
    return FNO(given["modes"], resolution=resolution, **{name: value[0] for name, value in single.items()})
