"""neuraloperator's own example of low-rank optimizers: a small FNO on its small Darcy data, 15 epochs.

The example is ``examples/training/plot_tensorgrad_fno_darcy.py`` of its repository: 1000 fields of 16 x 16, batches of
128, AdamW at 1e-2 with weight decay 1e-4 and a cosine to zero, the relative H1 error of normalized pressures as the
loss. Its figures are the least errors of an epoch on test fields of 32 x 32. Ours differs: the rate falls at every step
instead of every epoch, the loss is the mean over a batch instead of the sum, the figure is that of the last epoch, and
the data are those of an older version, with 50 test fields. What is printed there (AdamW .1603 in L2) is near to, but
not the same as, what AdamW reaches here (.191): compare contenders, not their figures with ours.

The data came with versions of neuraloperator up to 0.3.0; newer ones fetch them from Zenodo. :func:`load` says what it
looks for.
"""

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comoving.race import cache
from comoving.race.extras import require
from comoving.race.tasks import Batch

WHEEL = "neuraloperator-0.3.0-py3-none-any.whl"
INSIDE = "neuralop/datasets/data"
FILES = ("darcy_train_16.pt", "darcy_test_16.pt", "darcy_test_32.pt")
Fields = dict[str, Tensor]


def places() -> list[Path]:
    """Where the data may be: a wheel, or a folder with the three files."""
    given = os.environ.get("COMOVING_DARCY")
    if given:
        return [Path(given).expanduser()]
    return [cache.folder() / WHEEL, Path.home() / ".cache" / "neuraloperator" / "darcy"]


def contents(place: Path) -> list[bytes] | None:
    """The bytes of the three files at ``place``; None if they are not there."""
    if place.is_dir():
        files = [place / name for name in FILES]
        return [file.read_bytes() for file in files] if all(file.exists() for file in files) else None
    if not place.is_file():
        return None
    try:
        with zipfile.ZipFile(place) as wheel:
            return [wheel.read(f"{INSIDE}/{name}") for name in FILES]
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{place} has no Darcy data: {error}") from error


def fields(raw: bytes) -> Batch:
    """Coefficients and pressures in float32, (samples, 1, n, n)."""
    found: Fields = torch.load(io.BytesIO(raw), weights_only=True)
    return found["x"].float().unsqueeze(1), found["y"].float().unsqueeze(1)


class DocsTask:
    """Fields are (samples, 1, n, n) float32; the pressure is normalized by one mean and deviation for training.

    Args:
        training: coefficients and pressures.
        coarse, fine: those for tests, as finely resolved as the ones for training, and finer.
    """

    def __init__(self, training: Batch, coarse: Batch, fine: Batch) -> None:
        self.training, self.coarse, self.fine = training, coarse, fine
        self.mean, self.deviation = training[1].mean().item(), training[1].std().item()
        losses = require("neuralop.losses", "pde")
        self.h1: Any = losses.H1Loss(d=2, reduction="mean")
        self.l2: Any = losses.LpLoss(d=2, p=2, reduction="mean")
        self.source: torch.Generator | None = None
        self.left = torch.empty(0, dtype=torch.int64)

    def fingerprint(self) -> str:
        """Digest of all six arrays."""
        digest = hashlib.sha256()
        for x in (*self.training, *self.coarse, *self.fine):
            digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def model(self) -> nn.Module:
        """Four layers of 24 channels; spectral weights (24, 24, 8, 5) complex64."""
        fno = require("neuralop.models", "pde").FNO
        return fno(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=24, projection_channel_ratio=2)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """The next ``size`` fields of an epoch, fewer at its end; a new generator begins with a new epoch."""
        if generator is not self.source or not len(self.left):
            self.source = generator
            self.left = torch.randperm(len(self.training[0]), generator=generator)
        rows, self.left = self.left[:size], self.left[size:]
        return self.training[0][rows], self.training[1][rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean relative H1 error of the normalized pressure."""
        return self.h1(model(batch[0]), (batch[1] - self.mean) / self.deviation)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean relative L2 error on the finer fields, H1 error there as ``h1`` and on the coarse ones as the loss."""
        weight = next(model.parameters())

        def errors(part: Batch, *losses: Any) -> list[float]:
            a, u = (x.to(weight.device, weight.dtype) for x in part)
            prediction = model(a) * self.deviation + self.mean
            return [loss(prediction, u).item() for loss in losses]

        l2, h1 = errors(self.fine, self.l2, self.h1)
        return {"value": l2, "loss": errors(self.coarse, self.h1)[0], "h1": h1}


def load(text: str = "") -> DocsTask:
    """The task; ``text`` is not used.

    The data are looked for at ``$COMOVING_DARCY``, else as the wheel of neuraloperator 0.3.0 in the cache, else where
    neuraloperator keeps what it has fetched.

    Raises:
        ValueError: they are nowhere; the message has the command that brings them.
    """
    for place in places():
        found = contents(place)
        if found is not None:
            return DocsTask(*(fields(raw) for raw in found))
    raise ValueError(
        f"the Darcy data of neuraloperator's example are not at {' or '.join(str(p) for p in places())}: "
        f"pip download --no-deps --dest {cache.folder()} neuraloperator==0.3.0"
    )
