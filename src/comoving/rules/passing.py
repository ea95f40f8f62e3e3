"""What a rule hands from ``absorb`` to ``direction`` beside its slots."""

from torch import Tensor

_NAME = "rule.passing"


def hand_over(state: dict[str, Tensor], x: Tensor) -> None:
    """Put x where :func:`taken` finds it, in the same step; it is no slot, and never outlives a step."""
    state[_NAME] = x


def taken(state: dict[str, Tensor]) -> Tensor:
    """Take it out of the state again."""
    return state.pop(_NAME)
