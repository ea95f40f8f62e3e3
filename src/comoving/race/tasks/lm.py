"""A small LLaMA predicts the next byte, of CPython's standard library or of any text."""

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from comoving.race.extras import require
from comoving.race.tasks import Batch

CONTEXT = 128
LARGEST = 64 * 2**20
HELD_OUT_OF = 20
VALIDATION_WINDOWS = 96
EVALUATION_BATCH = 16
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".json", ".jsonl", ".html", ".xml", ".csv", ".tex", ".rs"}
DATASET_MARKS = ("dataset_dict.json", "state.json")

Document = tuple[str, bytes]
Tokens = np.ndarray[Any, np.dtype[Any]]
"""Numbers of tokens (or bytes), in one dimension."""
Made = TypeVar("Made")


def held_out(name: str) -> bool:
    """Whether the document ``name`` validates: one in twenty, by its hash, whatever else is there."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_OF == 0


def standard_library() -> Iterator[Document]:
    """The .py files of the running CPython's standard library, in order, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            yield relative.as_posix(), path.read_bytes()


def folder(root: Path) -> Iterator[Document]:
    """The text files below ``root``, in order."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in TEXT_SUFFIXES and path.is_file() and not any(p.startswith(".") for p in relative.parts):
            yield relative.as_posix(), path.read_bytes()


def pieces(text: bytes) -> Iterator[Document]:
    """One long text in pieces of 4 KiB, so that a part of it can be held out."""
    for i in range(0, len(text), 4096):
        yield str(i), text[i : i + 4096]


def opened(name: str) -> Any:
    """A Hugging Face data set, with its parts where it has any."""
    datasets = require("datasets", "hf")
    return datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)


def dataset(name: str) -> Iterator[Document]:
    """A Hugging Face data set: a folder made by ``save_to_disk``, or a name ``load_dataset`` knows.

    Its training split is read, from the column "text", else from the first column of strings.

    Raises:
        ValueError: if it has no column of strings.
    """
    found = opened(name)
    if hasattr(found, "keys"):
        found = found["train"] if "train" in found else found[next(iter(found))]
    columns = [
        c for c, feature in found.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise ValueError(f"data set {name!r} has no column of text; its columns are {list(found.features)}")
    column = "text" if "text" in columns else columns[0]
    for i, row in enumerate(found):
        yield str(i), row[column].encode()


def documents(text: str) -> Iterable[Document]:
    """Documents of the corpus that ``--text`` names."""
    if not text:
        return standard_library()
    path = Path(text).expanduser()
    if path.is_file():
        return pieces(path.read_bytes())
    if path.is_dir() and not any((path / mark).exists() for mark in DATASET_MARKS):
        return folder(path)
    return dataset(str(path) if path.is_dir() else text)


def split(corpus: Iterable[Document]) -> tuple[list[bytes], list[bytes]]:
    """The documents that train and those that validate; at most 64 MiB of them are read."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for name, content in corpus:
        parts[held_out(name)].append(content)
        total += len(content) + 1
        if total > LARGEST:
            break
    return parts


def llama(vocabulary: int) -> nn.Module:
    """A fresh LLaMA of four layers of width 128, head not tied; 0.80 million parameters and 256 for each token."""
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


class TextTask:
    """Windows of 128 tokens at random places of one sequence; a model predicts each token from those before it.

    Args:
        training, held_out: token numbers, each in one dimension.
        unit: what a token is, for errors.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on.
    """

    def __init__(self, training: Tokens, held_out: Tokens, unit: str) -> None:
        for role, part in (("training", training), ("validation", held_out)):
            if len(part) <= CONTEXT:
                raise ValueError(f"no text found for {role}: {len(part)} {unit}, {CONTEXT + 1} are needed")
        self.training, self.held_out = training, held_out

    def fingerprint(self) -> str:
        """Digest of both parts."""
        return hashlib.sha256(self.training.tobytes() + b"|" + self.held_out.tobytes()).hexdigest()

    def windows(self, part: Tokens, starts: Tensor) -> Batch:
        """Inputs and the tokens that follow them, both (windows, 128) int64."""
        rows = torch.from_numpy(part[starts.numpy()[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Windows at random places of the training text."""
        return self.windows(self.training, torch.randint(len(self.training) - CONTEXT, (size,), generator=generator))

    def nats(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a token."""
        logits: Tensor = model(input_ids=batch[0]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    def held_out_batches(self, windows: int, device: torch.device) -> Iterator[Batch]:
        """At most so many windows, spread evenly over the held-out text, 16 at a time."""
        count = min(windows, len(self.held_out) // (CONTEXT + 1))
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 1, count).long()
        for part in starts.split(EVALUATION_BATCH):
            inputs, following = self.windows(self.held_out, part)
            yield inputs.to(device), following.to(device)


class ByteTask(TextTask):
    """Windows of 128 bytes; a zero byte ends each document.

    Args:
        corpus: (name, bytes) pairs; at most 64 MiB of them are read.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on.
    """

    def __init__(self, corpus: Iterable[Document]) -> None:
        parts = split(corpus)
        training, validation = (np.frombuffer(b"".join(x + b"\0" for x in part), np.uint8) for part in parts)
        super().__init__(training, validation, "bytes")

    def model(self) -> nn.Module:
        """Four layers of width 128, 0.87 million parameters, head not tied."""
        return llama(256)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in bits per byte."""
        return self.nats(model, batch) / math.log(2)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over 96 windows spread evenly over the held-out text; metric and loss are the same number."""
        total, count = 0.0, 0
        for batch in self.held_out_batches(VALIDATION_WINDOWS, next(model.parameters()).device):
            total += self.loss(model, batch).item() * len(batch[0])
            count += len(batch[0])
        return {"value": total / count, "loss": total / count}


def load(text: str = "") -> ByteTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text.
    """
    return read(text, ByteTask)


def read(text: str, made: Callable[[Iterable[Document]], Made]) -> Made:
    """What ``made`` makes of the documents of the corpus that ``text`` names.

    Raises:
        ValueError: if nothing there can be read as text.
    """
    try:
        return made(documents(text))
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:  # the data set library raises its own kinds for a name it cannot find
        raise ValueError(f"cannot read text from {text!r}: {str(error).splitlines()[0]}") from error
