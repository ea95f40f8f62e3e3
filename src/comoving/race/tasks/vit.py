"""A vision transformer on small pictures: scikit-learn's digits, or Fashion-MNIST from Debian's package."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comoving.race.extras import require
from comoving.race.tasks import Batch

FASHION = Path("/usr/share/datasets/fashion-mnist")
VALIDATION = 2000
EVALUATION_BATCH = 250
IDX_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an idx file (gzipped where it ends in .gz) of unsigned bytes: two zeros, type, dimensions, sizes, data.

    Raises:
        ValueError: if the file is not gzip or idx, holds another type, or is cut short.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}): install its package again") from error
    if len(raw) < 4 or raw[:3] != bytes((0, 0, IDX_UNSIGNED_BYTE)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4))
    if len(raw) - start != int(np.prod(shape)):
        raise ValueError(f"{path} holds {len(raw) - start} bytes of data; its header promises {shape}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def find_fashion() -> Path | None:
    """The folder of Debian's ``dataset-fashion-mnist``, if it is installed."""
    return next(
        (f for f in (FASHION, FASHION.with_name("fashion_mnist")) if (f / "train-images-idx3-ubyte.gz").exists()), None
    )


class ImageTask:
    """Pictures (samples, 1, n, n) in float32 with mean 0 and deviation 1, labels in int64.

    Args:
        pictures, labels: for training.
        held_pictures, held_labels: for validation.
        patch: side of a patch; it must divide n.
    """

    def __init__(
        self, pictures: Tensor, labels: Tensor, held_pictures: Tensor, held_labels: Tensor, patch: int
    ) -> None:
        mean, deviation = pictures.mean(), pictures.std()
        self.training = ((pictures - mean) / deviation, labels)
        self.held_out = ((held_pictures - mean) / deviation, held_labels)
        self.patch = patch

    def fingerprint(self) -> str:
        """Digest of pictures and labels."""
        digest = hashlib.sha256()
        for x in (*self.training, *self.held_out):
            digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def model(self) -> nn.Module:
        """Four layers of width 96; 16 patches."""
        transformers = require("transformers", "hf")
        config = transformers.ViTConfig(
            image_size=self.training[0].shape[-1],
            patch_size=self.patch,
            num_channels=1,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=10,
        )
        return transformers.ViTForImageClassification(config)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Pictures and labels, drawn with replacement."""
        rows = torch.randint(len(self.training[0]), (size,), generator=generator)
        return self.training[0][rows], self.training[1][rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return nn.functional.cross_entropy(model(pixel_values=batch[0]).logits.float(), batch[1])

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Error in percent and cross-entropy in nats."""
        weight = next(model.parameters())
        wrong, loss = 0, 0.0
        for pictures, labels in zip(*(x.split(EVALUATION_BATCH) for x in self.held_out), strict=True):
            logits = model(pixel_values=pictures.to(weight.device, weight.dtype)).logits.float().cpu()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            wrong += int((logits.argmax(1) != labels).sum())
        samples = len(self.held_out[0])
        return {"value": 100 * wrong / samples, "loss": loss / samples}


def fashion(folder: Path) -> ImageTask:
    """Fashion-MNIST: 60000 pictures of 28 x 28; the first 2000 test pictures validate."""

    def pictures(part: str) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
        return torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255, torch.from_numpy(labels.astype(np.int64))

    held_images, held_labels = pictures("t10k")
    return ImageTask(*pictures("train"), held_images[:VALIDATION], held_labels[:VALIDATION], patch=7)


def digits() -> ImageTask:
    """scikit-learn's digits: 1797 pictures of 8 x 8; every fourth one validates."""
    data = require("sklearn.datasets", "hf").load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 16
    labels = torch.from_numpy(data.target.astype(np.int64))
    apart = torch.arange(len(labels)) % 4 == 3
    return ImageTask(images[~apart], labels[~apart], images[apart], labels[apart], patch=2)


def load(text: str = "") -> ImageTask:
    """Fashion-MNIST where it is installed and ``COMOVING_DIGITS`` is not set, else the digits; ``text`` is not used."""
    folder = None if os.environ.get("COMOVING_DIGITS") else find_fashion()
    return digits() if folder is None else fashion(folder)
