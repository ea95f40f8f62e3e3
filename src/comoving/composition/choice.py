"""One way to optimize the parameters of a role: what it is made of, at which rate, and what it costs in quality."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..frames import Modes
from ..parts import part
from ..validate import check_float

WHOLE: dict[str, Any] = {"rank": 1.0, "select": "all", "view": "tensor", "frame": Modes()}
"""The options of what is stepped in the whole frame, whatever its shape."""


@dataclass(frozen=True)
class Choice:
    """A composition for the parameters of one role.

    Args:
        name: in words.
        options: hyper-parameters of :class:`comoving.LowRankOptimizer`; a parameter is stepped in the whole frame
            unless they have a rank.
        rate: factor of the learning rate, > 0.
        width: rate is multiplied by the model's width to this power; see :func:`width_of`.
        loss: what it costs to give it to all parameters of the role: the excess of the validation over that of the
            role's best choice, as a share of that. Measured; see ``benchmarks/study.py table``.
    """

    name: str
    options: Mapping[str, Any]
    rate: float = 1.0
    width: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        check_float("rate", self.rate, 0.0, open_low=True)
        check_float("width", self.width, -1.0, 1.0)
        check_float("loss", self.loss, 0.0)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "Choice":
        """From plain data, parts as text.

        Raises:
            ValueError, TypeError: unknown fields, parts, or values outside their intervals.
        """
        given: dict[str, Any] = {**data}
        given["options"] = {role: part(role, value) for role, value in given.get("options", {}).items()}
        return cls(**given)

    def rate_for(self, shape: tuple[int, ...]) -> float:
        """The factor of the learning rate of a parameter of this shape."""
        return self.rate * width_of(shape) ** self.width

    def group(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The options of a group of parameters of this shape, or of others of the same rate."""
        return {**WHOLE, **self.options, "rate": self.rate_for(shape)}


def width_of(shape: tuple[int, ...]) -> int:
    """How many features a parameter writes or reads: the last mode, as tables, heads, norms and biases have it."""
    return max(1, shape[-1] if prod(shape) > 0 and shape else 1)
