"""A random walk on the Grassmann manifold."""

from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from torch import Tensor

from ..codecs import Spec
from ..draws import gaussian
from ..frames import ModeFrame
from ..frames.base import Ranks
from ..validate import check_choice, check_float, check_int
from .base import DRAWS, Memory, check_start, counted, drawing
from .geodesic import leading_plane, tangent, turned
from .operand import Operand
from .power import Power


@dataclass(frozen=True)
class RandomWalk:
    """U_n <- U_n V cos(theta) V^H + W sin(theta) V^H, theta = rate S (GrassWalk, arXiv 2510.01878), mode by mode.

    W S V^H = (I - U_n U_n^H) X is the singular value decomposition of a random tangent, X with Gaussian entries of
    variance 1/d_n: a step along the geodesic by angles of about ``rate``, or less where r_n is near d_n. The gradient
    is looked at for the first frame alone, which its singular vectors make, or three power iterations.

    Each refresh draws anew: the seed, the mode and a count of the refreshes, which is in the state, determine what.
    Parameters that are refreshed as often draw the same.

    Args:
        rate: the length of a step, > 0; angles are cut at pi/2.
        start: where the first frame comes from, "exact" or "random"; see :class:`Power`.
        seed: of the draws, >= 0.
    """

    fills = (ModeFrame,)
    batched = True
    alone = False
    joint = True
    ahead = 0

    rate: float = 0.1
    start: Literal["random", "exact"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("rate", self.rate, 0.0, open_low=True)
        check_choice("start", self.start, ("random", "exact"))
        check_int("seed", self.seed, 0)

    @property
    def inertia(self) -> float:
        """0: no momentum is looked at."""
        return 0.0

    def schema(self, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> dict[str, Spec]:
        """The number of refreshes so far, "draws"."""
        return {DRAWS: drawing}

    def observe(self, gradient: Tensor, memory: Memory, rows: int = 0) -> None:
        """Nothing to note."""

    def find(self, operand: Operand, start: ModeFrame, warm: bool, memory: Memory) -> ModeFrame:
        """One random step from ``start``."""
        check_start(self, start)
        count = counted(memory)
        if not warm:
            return Power(start=self.start).find(operand, start, False, memory)
        return ModeFrame(tuple(None if u is None else self._stepped(u, count, n) for n, u in enumerate(start.factors)))

    def _stepped(self, frame: Tensor, count: int, mode: int) -> Tensor:
        d, r = frame.shape[-2:]
        x = gaussian((d, r), frame, self.seed, count, mode) * d**-0.5
        u, sigma, v = leading_plane(tangent(frame, x.expand_as(frame)), min(r, d - r))
        return turned(frame, u, v, (self.rate * sigma).clamp_max(pi / 2))
