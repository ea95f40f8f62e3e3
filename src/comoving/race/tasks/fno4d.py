"""A Fourier neural operator in space and time learns how a field separates into phases (Allen-Cahn, three dimensions).

Its spectral weights have order 6: two of channels, three of space, one of time.
"""

import hashlib

import torch
from torch import Tensor, nn

from comoving.race import allen_cahn
from comoving.race.extras import require
from comoving.race.tasks import Batch
from comoving.race.tasks.fno import relative_l2

RESOLUTION, FRAMES = 12, 8
TRAINING, TEST = 256, 48
# Small noise grows into both phases, an interface is a fifth of the cube wide, and who predicts that
# nothing happens is wrong by 81%. AdamW leaves 8% after 200 steps and is not done then; the solver's own error is 0.1%.
EPS, FINAL, AMPLITUDE, TAU, ALPHA = 0.05, 6.0, 0.2, 9.0, 3.0
EVALUATION_BATCH = 8


class AllenCahnTask:
    """Data of :mod:`comoving.race.allen_cahn`.

    The input is (samples, 2, n, n, n, frames): the initial field in units of its deviation, the same at all times, and
    the time, scaled to (0, 1]. The output is the field at these times, (samples, 1, n, n, n, frames); it lies between
    the phases -1 and 1 and is not scaled. No coordinates of space: the map commutes with translations, and so does
    the model.
    """

    def __init__(self) -> None:
        def fields(samples: int, seed: int) -> tuple[Tensor, Tensor]:
            spec = allen_cahn.AllenCahnData(samples, RESOLUTION, FRAMES, seed, FINAL, EPS, AMPLITUDE, TAU, ALPHA)
            start, future = (torch.from_numpy(x) for x in allen_cahn.load(spec))
            return start, future.unsqueeze(1)

        self.training = fields(TRAINING, 0)
        self.test = fields(TEST, 1)

    def fingerprint(self) -> str:
        """Digest of all four arrays."""
        digest = hashlib.sha256()
        for x in (*self.training, *self.test):
            digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def model(self) -> nn.Module:
        """Two layers of 12 channels; spectral weights (12, 12, 8, 8, 8, 5) complex64.

        Channels and space are long enough to be compressed by default (8 entries), time stays whole.
        neuraloperator's FNO takes any number of dimensions: its skips and channel MLPs see them flattened.
        """
        fno = require("neuralop.models", "pde").FNO
        return fno(
            n_modes=(8, 8, 8, 8),
            in_channels=2,
            out_channels=1,
            hidden_channels=12,
            n_layers=2,
            positional_embedding=None,
        )

    def inputs(self, start: Tensor) -> Tensor:
        """What the model is given, (samples, 2, n, n, n, frames), from initial fields (samples, n, n, n)."""
        shape = (*start.shape, FRAMES)
        time = torch.arange(1, FRAMES + 1, device=start.device, dtype=start.dtype) / FRAMES
        return torch.stack([(start / AMPLITUDE).unsqueeze(-1).expand(shape), time.expand(shape)], dim=1)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Inputs and futures, drawn with replacement."""
        rows = torch.randint(TRAINING, (size,), generator=generator)
        return self.inputs(self.training[0][rows]), self.training[1][rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean relative L2 error over space and time."""
        return relative_l2(model(batch[0]), batch[1]).mean()

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean relative L2 error over the test set; metric and loss are the same number here."""
        weight = next(model.parameters())
        errors = [
            relative_l2(model(self.inputs(u.to(weight.device, weight.dtype))), v.to(weight.device, weight.dtype))
            for u, v in zip(*(x.split(EVALUATION_BATCH) for x in self.test), strict=True)
        ]
        value = torch.cat(errors).mean().item()
        return {"value": value, "loss": value}


def load(text: str = "") -> AllenCahnTask:
    """The task; ``text`` is not used."""
    return AllenCahnTask()
