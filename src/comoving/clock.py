"""Where a parameter's averages stand: what bias correction and bounds follow from."""

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

TINY = 1e-15
"""The least weight of an average; its square is still a normal float32."""


@dataclass(frozen=True)
class Clock:
    """Where the averages stand: the decay rates and the number t of finished steps, a 0-dimensional tensor.

    A reading, not a running clock: make a new one when t has moved. ``tick`` is the number of finished steps too, but
    known to the host, and no change of frame sets it back. ``rows`` is the number of leading dimensions, 0 or 1, that
    count the rows of a batch in z and in every slot; all rows share the clock. Where a step is ``recorded``, to be
    replayed at other counts, the host does not read t, even if it could.
    """

    t: Tensor
    beta1: float
    beta2: float
    tick: int = 0
    rows: int = 0
    recorded: bool = False

    @property
    def weight1(self) -> float | Tensor:
        """c1 = 1 - b1^t."""
        return self.weight(self.beta1)

    @property
    def weight2(self) -> float | Tensor:
        """c2 = 1 - b2^t."""
        return self.weight(self.beta2)

    def weight(self, decay: float) -> float | Tensor:
        """1 - decay^t, float64: 1 - 0.999 in float32 is off by 5e-5. Positive also before the first step.

        A number where the count is on the host, which it is unless ``on_nonfinite="skip"`` keeps it beside parameters
        that are elsewhere; else, and while it is traced, a 0-dimensional tensor on the count's device.
        """
        if not self._on_host:
            return (1 - decay ** self.t.double()).clamp_min(TINY)
        # numpy() refuses tensors of devices, so that this waits for none.
        return max(1 - decay ** float(self.t.numpy()), TINY)

    @property
    def _on_host(self) -> bool:
        return self.t.device.type == "cpu" and not self.recorded and not torch.compiler.is_compiling()

    @property
    def ratio(self) -> Tensor:
        """K = (1 - b1)^2 / (1 - b2) (1 + rho + ... + rho^(t-1)), rho = b1^2 / b2: Adam's bound on |m|^2 / v, float64.

        By Cauchy-Schwarz over the two averages, for any t gradients; inf for b2 = 0.
        """
        return torch.as_tensor(self._ratio(self.t.double()))

    def _ratio(self, t: Any) -> Any:
        """K for t, a number or a tensor."""
        b1, b2 = self.beta1, self.beta2
        rho = b1 * b1 / b2 if b2 else inf if b1 else 0.0
        terms = t if rho == 1 else inf + 0 * t if rho == inf else (1 - rho**t) / (1 - rho)
        return terms * ((1 - b1) ** 2 / (1 - b2))

    @property
    def limit(self) -> float | Tensor:
        """sqrt(K c2) / c1, which no entry of Adam's direction exceeds; a number where the count is on the host."""
        t = float(self.t.numpy()) if self._on_host else self.t.double()
        return (self._ratio(t) * self.weight2) ** 0.5 / self.weight1
