"""A Fourier neural operator learns the map from a coefficient field to the pressure of Darcy flow."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from comoving.race import darcy
from comoving.race.extras import require
from comoving.race.tasks import Batch

RESOLUTION = 32
TRAINING, TEST = 1000, 128
# The customary field (tau 3, values 3 and 12) is learned to 3% in 400 steps by anybody. A shorter correlation length
# and a higher contrast leave 9%, and so tell optimizers apart.
TAU, ALPHA, LOW, HIGH = 9.0, 2.0, 1.0, 20.0
EVALUATION_BATCH = 32


def relative_l2(prediction: Tensor, truth: Tensor) -> Tensor:
    """Per-sample ||prediction - truth|| / ||truth||, shape (samples,)."""
    return (prediction - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


class DarcyTask:
    """Data of :mod:`comoving.race.darcy`; fields are (samples, 1, n, n) float32, normalized inside :meth:`predict`."""

    def __init__(self) -> None:
        def fields(samples: int, seed: int) -> tuple[Tensor, Tensor]:
            a, u = darcy.load(darcy.DarcyData(samples, RESOLUTION, seed, TAU, ALPHA, LOW, HIGH))
            return tuple(torch.from_numpy(x.astype(np.float32)).unsqueeze(1) for x in (a, u))  # pyright: ignore[reportReturnType]

        self.training = fields(TRAINING, 0)
        self.test = fields(TEST, 1)
        (self.a_mean, self.a_deviation), (self.u_mean, self.u_deviation) = (
            (x.mean().item(), x.std().item()) for x in self.training
        )

    def fingerprint(self) -> str:
        """Digest of all four arrays."""
        digest = hashlib.sha256()
        for x in (*self.training, *self.test):
            digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def model(self) -> nn.Module:
        """Four layers of 24 channels; spectral weights (24, 24, 16, 9) complex64."""
        fno = require("neuralop.models", "pde").FNO
        return fno(n_modes=(16, 16), in_channels=1, out_channels=1, hidden_channels=24, n_layers=4)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Coefficients and pressures, drawn with replacement."""
        rows = torch.randint(TRAINING, (size,), generator=generator)
        return self.training[0][rows], self.training[1][rows]

    def predict(self, model: nn.Module, a: Tensor) -> Tensor:
        """Pressure in physical units."""
        return model((a - self.a_mean) / self.a_deviation) * self.u_deviation + self.u_mean

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean relative L2 error in physical units."""
        return relative_l2(self.predict(model, batch[0]), batch[1]).mean()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean relative L2 error over the test set; metric and loss are the same number here."""
        weight = next(model.parameters())
        errors = [
            relative_l2(self.predict(model, a.to(weight.device, weight.dtype)), u.to(weight.device, weight.dtype))
            for a, u in zip(*(x.split(EVALUATION_BATCH) for x in self.test), strict=True)
        ]
        value = torch.cat(errors).mean().item()
        return {"value": value, "loss": value}


def load(text: str = "") -> DarcyTask:
    """The task; ``text`` is not used."""
    return DarcyTask()
