"""The data and the models of the laboratory: pictures for a ViT, bytes for a LLaMA."""

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from comoving.lab.config import Config
from comoving.race.extras import require
from comoving.race.settings import SettingsError
from comoving.race.tasks import Batch, lm, vit

PIECE = 250
"""Pictures, or windows of bytes, that are looked at together in an evaluation."""
WINDOWS = 96
FASHION_VALIDATION = 1000
SHIFT = 1 / 8
"""Augmentation shifts a picture by at most this share of its side."""


class LabTask(Protocol):
    """Data in three parts and a model for them. Nothing here draws from the global RNG but :meth:`model`."""

    def fingerprint(self) -> str:
        """Digest of the data."""
        ...

    def model(self) -> nn.Module:
        """A fresh model in float32 on the CPU, initialized from the global RNG."""
        ...

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Training samples drawn with ``generator``."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss, a real scalar."""
        ...

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """``{"value": the metric, "loss": ...}`` on "validation" (for curves and rates) or "test" (for the end)."""
        ...


def load(config: Config) -> LabTask:
    """The task of a configuration.

    Raises:
        SettingsError: data that are not there or cannot be read, with what to install.
    """
    try:
        return Bytes(config) if config.task == "bytes" else Pictures(config, *SOURCES.get(config.source, hub)(config))
    except ImportError as error:
        raise SettingsError(str(error)) from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{config.name}: cannot read {config.source or 'the text'}: {error}") from error


Parts = tuple[Batch, Batch, Batch, int]
"""Training, validation and test, each pictures (samples, channels, n, n) in uint8 and labels; number of classes."""


def digits(config: Config) -> Parts:
    """scikit-learn's 1797 digits: of every four, two train, one validates, one tests."""
    data = require("sklearn.datasets", "hf").load_digits()
    pictures = torch.from_numpy((data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    place = torch.arange(len(labels)) % 4
    training, validation, test = (torch.isin(place, torch.tensor(chosen)) for chosen in ([0, 1], [2], [3]))
    return (
        (pictures[training], labels[training]),
        (pictures[validation], labels[validation]),
        (pictures[test], labels[test]),
        10,
    )


def fashion(config: Config) -> Parts:
    """Fashion-MNIST of Debian's package: the last 1000 training pictures validate, all 10,000 test pictures test."""
    folder = vit.find_fashion()
    if folder is None:
        raise SettingsError(f"{config.name}: Fashion-MNIST is missing: apt-get install dataset-fashion-mnist")

    def part(name: str) -> Batch:
        pictures = torch.from_numpy(vit.read_idx(folder / f"{name}-images-idx3-ubyte.gz").copy()).unsqueeze(1)
        return pictures, torch.from_numpy(vit.read_idx(folder / f"{name}-labels-idx1-ubyte.gz").astype(np.int64))

    pictures, labels = part("train")
    split = len(labels) - FASHION_VALIDATION
    return (pictures[:split], labels[:split]), (pictures[split:], labels[split:]), part("t10k"), 10


def hub(config: Config) -> Parts:
    """A data set of pictures of Hugging Face, or a folder made by ``save_to_disk``; one in twenty validates.

    Its columns are found by their types: the first of pictures, and the first of class labels (CIFAR-100's fine ones).
    """
    datasets = require("datasets", "hf")
    try:
        found = lm.opened(config.source)
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:  # the library raises its own kinds for a name it cannot find, or without a network
        raise ValueError(str(error).splitlines()[0]) from error
    parts = list(found) if hasattr(found, "keys") else []
    if "train" not in parts or "test" not in parts:
        raise ValueError(f"it needs the parts train and test, and has {', '.join(parts) or 'no parts'}")
    features = found["train"].features
    pictures = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if pictures is None or not labels:
        raise ValueError(f"it needs a column of pictures and one of class labels; its columns are {list(features)}")
    label = "fine_label" if "fine_label" in labels else labels[0]
    side = min(config.image_size, *found["train"][0][pictures].size)

    def part(name: str) -> Batch:
        rows = found[name].select_columns([pictures, label])
        arrays = [np.asarray(row[pictures].convert("RGB").resize((side, side))) for row in rows]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), torch.tensor(rows[label][:])

    x, y = part("train")
    apart = torch.arange(len(y)) % 20 == 19
    return (x[~apart], y[~apart]), (x[apart], y[apart]), part("test"), features[label].num_classes


SOURCES = {"digits": digits, "fashion": fashion}


class Pictures:
    """Pictures kept as they are stored; standardized, resized and augmented when they are used."""

    def __init__(
        self,
        config: Config,
        training: Batch,
        validation: Batch,
        test: Batch,
        classes: int,
    ) -> None:
        self.config, self.classes = config, classes
        if config.samples:
            chosen = torch.randperm(len(training[1]), generator=torch.Generator().manual_seed(0))[: config.samples]
            training = training[0][chosen], training[1][chosen]
        self.parts = {"training": training, "validation": validation, "test": test}
        x = training[0].float()
        self.mean, self.deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)

    def fingerprint(self) -> str:
        """Digest of pictures and labels."""
        digest = hashlib.sha256()
        for part in self.parts.values():
            for x in part:
                digest.update(x.numpy().tobytes())
        return digest.hexdigest()

    def model(self) -> nn.Module:
        """A ViT of transformers."""
        transformers, config = require("transformers", "hf"), self.config
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=config.image_size,
                patch_size=config.patch_size,
                num_channels=self.parts["training"][0].shape[1],
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=self.classes,
            )
        )

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Pictures and labels, drawn with replacement."""
        x, labels = self.parts["training"]
        rows = torch.randint(len(labels), (size,), generator=generator)
        x = self.prepared(x[rows])
        return (self.augmented(x, generator) if self.config.augment else x), labels[rows]

    def prepared(self, x: Tensor) -> Tensor:
        """Mean 0, deviation 1 in every channel, at the model's size."""
        x = (x.float() - self.mean) / self.deviation
        size = self.config.image_size
        return x if x.shape[-1] == size else nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)

    @staticmethod
    def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
        """Every picture flipped or not, and shifted by up to an eighth of its side."""
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        side = x.shape[-1]
        reach = max(1, round(SHIFT * side))
        padded = nn.functional.pad(x, [reach] * 4)
        down, right = torch.randint(2 * reach + 1, (2, len(x)), generator=generator)
        rows = down[:, None, None, None] + torch.arange(side)[None, None, :, None]
        columns = right[:, None, None, None] + torch.arange(side)[None, None, None, :]
        samples = torch.arange(len(x))[:, None, None, None]
        channels = torch.arange(x.shape[1])[None, :, None, None]
        return padded[samples, channels, rows, columns]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return nn.functional.cross_entropy(model(pixel_values=batch[0]).logits.float(), batch[1])

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Accuracy in percent and cross-entropy in nats."""
        device = next(model.parameters()).device
        x, labels = self.parts[part]
        right, loss = 0, 0.0
        for pictures, expected in zip(x.split(PIECE), labels.split(PIECE), strict=True):
            logits = model(pixel_values=self.prepared(pictures).to(device)).logits.float().cpu()
            loss += nn.functional.cross_entropy(logits, expected, reduction="sum").item()
            right += int((logits.argmax(1) == expected).sum())
        return {"value": 100 * right / len(labels), "loss": loss / len(labels)}


class Bytes:
    """Windows of 128 bytes of the race's text; of the held-out windows every other one validates, the rest test."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.text = lm.load(config.source)
        starts = torch.linspace(0, len(self.text.held_out) - lm.CONTEXT - 1, 2 * WINDOWS).long()
        self.starts = {"validation": starts[0::2], "test": starts[1::2]}

    def fingerprint(self) -> str:
        """Digest of the text."""
        return self.text.fingerprint()

    def model(self) -> nn.Module:
        """A LLaMA of transformers, its head not tied."""
        transformers, config = require("transformers", "hf"), self.config
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=256,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=lm.CONTEXT,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Windows at random places of the training text."""
        return self.text.batch(size, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in bits per byte."""
        return self.text.loss(model, batch)

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Bits per byte; metric and loss are one number."""
        device, total = next(model.parameters()).device, 0.0
        starts = self.starts[part]
        for piece in starts.split(lm.EVALUATION_BATCH):
            inputs, following = (x.to(device) for x in self.text.windows(self.text.held_out, piece))
            total += self.text.loss(model, (inputs, following)).item() * len(piece)
        value = total / len(starts)
        return {"value": value if math.isfinite(value) else math.nan, "loss": value}
