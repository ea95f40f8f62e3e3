"""How much a process sends."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Traffic:
    """What this process has put into sums and the like: how often, and how many bytes.

    A ring sends each of them 2 (N - 1)/N times.
    """

    calls: int = 0
    bytes: int = 0

    def note(self, x: Tensor) -> None:
        """One tensor more."""
        self.add(x.numel() * x.element_size())

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.calls += 1
        self.bytes += count
