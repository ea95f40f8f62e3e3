"""A small LLaMA predicts the next byte, of CPython's standard library or of any text."""

import hashlib
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from comoving.race.extras import require
from comoving.race.tasks import Batch

CONTEXT = 128
LARGEST = 64 * 2**20
HELD_OUT_OF = 20
EVALUATION_BATCH = 16
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".json", ".jsonl", ".html", ".xml", ".csv", ".tex", ".rs"}
DATASET_MARKS = ("dataset_dict.json", "state.json")

Document = tuple[str, bytes]
T = TypeVar("T")


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


class Windows:
    """Windows of 128 symbols of a text, of which a model predicts the next.

    ``training`` and ``held_out`` are the symbols of both parts, one after the other; ``looks`` windows validate.
    """

    looks = 96

    training: NDArray[Any]
    held_out: NDArray[Any]

    def fingerprint(self) -> str:
        """Digest of both parts."""
        return hashlib.sha256(self.training.tobytes() + b"|" + self.held_out.tobytes()).hexdigest()

    def windows(self, part: NDArray[Any], starts: Tensor) -> Batch:
        """Inputs and what follows them, both (windows, 128) int64."""
        rows = torch.from_numpy(part[starts.numpy()[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Windows at random places of the training text."""
        return self.windows(self.training, torch.randint(len(self.training) - CONTEXT, (size,), generator=generator))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """In bits per byte."""
        raise NotImplementedError

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over windows spread evenly over the held-out text; metric and loss are the same number."""
        count = min(self.looks, len(self.held_out) // (CONTEXT + 1))
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 1, count).long()
        device = next(model.parameters()).device
        total = 0.0
        for part in starts.split(EVALUATION_BATCH):
            inputs, following = (x.to(device) for x in self.windows(self.held_out, part))
            total += self.loss(model, (inputs, following)).item() * len(part)
        return {"value": total / count, "loss": total / count}


class ByteTask(Windows):
    """Windows of 128 bytes; a zero byte ends each document.

    Args:
        corpus: (name, bytes) pairs; at most 64 MiB of them are read.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on.
    """

    def __init__(self, corpus: Iterable[Document]) -> None:
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        total = 0
        for name, content in corpus:
            parts[held_out(name)].append(content + b"\0")
            total += len(content) + 1
            if total > LARGEST:
                break
        training, validation = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
        for role, part in (("training", training), ("validation", validation)):
            if len(part) <= CONTEXT:
                raise ValueError(f"no text found for {role}: {len(part)} bytes, {CONTEXT + 1} are needed")
        self.training, self.held_out = training, validation

    def model(self) -> nn.Module:
        """Four layers of width 128, 0.87 million parameters, head not tied."""
        transformers = require("transformers", "hf")
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return transformers.LlamaForCausalLM(config)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in bits per byte."""
        logits: Tensor = model(input_ids=batch[0]).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten()) / math.log(2)


def load(text: str = "") -> ByteTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text.
    """
    return loaded(text, ByteTask)


def loaded(text: str, make: Callable[[Iterable[Document]], T]) -> T:
    """A task that is made of the corpus that ``text`` names.

    Raises:
        ValueError: if nothing there can be read as text.
    """
    try:
        return make(documents(text))
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:  # the data set library raises its own kinds for a name it cannot find
        raise ValueError(f"cannot read text from {text!r}: {str(error).splitlines()[0]}") from error
