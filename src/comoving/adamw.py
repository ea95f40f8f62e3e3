"""The default optimizer."""

from collections.abc import Iterable
from typing import Any, Literal

from .codecs import Codec, Full, Int8
from .finders import Finder, Power
from .frames.base import Rank
from .optimizer import LowRankOptimizer
from .residual import Feedback, Residual
from .transport import Rotate, Transport


class AdamW(LowRankOptimizer):
    """AdamW in a moving subspace, at AdamW's learning rate: :class:`comoving.LowRankOptimizer` with measured defaults.

    ``comoving.AdamW(model.named_parameters(), lr=...)`` in place of ``torch.optim.AdamW(model.parameters(), lr=...)``.
    For the best result at a number of bytes use :class:`comoving.Optimizer`, which is not bound to Adam.

    Args:
        params: as for :class:`comoving.LowRankOptimizer`.
        lr: AdamW's learning rate, as long as ``scale`` is "match".
        rank: share of the entries kept in the core, or as for :class:`comoving.LowRankOptimizer`.
        betas, eps, weight_decay: as in torch's AdamW.
        finder, transport, residual, codec, refresh_every, scale: the measured defaults.
        moments: a codec; "auto" is 8 bits for projected parameters, unless a budget chooses.
        bases: a codec of frames, plain unless it is given.
        **options: any other hyper-parameter of :class:`comoving.LowRankOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: Rank = 0.25,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        finder: Finder = Power(inertia=0.9, exact_up_to=32),  # noqa: B008  (frozen)
        transport: Transport = Rotate(),  # noqa: B008
        residual: Residual = Feedback(),  # noqa: B008
        codec: Codec | Literal["auto"] = Int8(),  # noqa: B008
        moments: Codec | Literal["auto"] = "auto",
        bases: Codec = Full(),  # noqa: B008
        refresh_every: int = 4,
        scale: float | str = "match",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, rank, betas=betas, eps=eps, weight_decay=weight_decay, finder=finder, transport=transport,
            residual=residual, codec=codec, moments=moments, bases=bases, refresh_every=refresh_every, scale=scale,
            **options,
        )  # fmt: skip
