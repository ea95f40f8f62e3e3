"""Byte-level byte-pair encoding: a vocabulary trained on some documents, and the documents in its tokens, cached.

The 256 bytes are tokens, so any text can be encoded; the others are made by merging the most frequent pair of
neighbours within words, over and over (Sennrich et al., arXiv 1508.07909; over bytes as in GPT-2). Token 0 ends
a document.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comoving.race import cache
from comoving.race.contenders import version
from comoving.race.extras import require

END = "<end>"
SMALLEST = 257


@dataclass(frozen=True)
class Vocabulary:
    """What fixes the tokens of two sets of documents completely.

    Args:
        size: tokens in all, at least 257: the end of a document and the bytes.
        training, held_out: digests of the documents; only those of ``training`` decide on the vocabulary.
        version: of the package ``tokenizers``.
    """

    size: int
    training: str
    held_out: str
    version: str

    def __post_init__(self) -> None:
        if self.size < SMALLEST:
            raise ValueError(f"the vocabulary has {self.size} tokens; it must have at least {SMALLEST}")


def digest(documents: Sequence[bytes]) -> str:
    """Of all documents, where one ends included."""
    total = hashlib.sha256()
    for document in documents:
        total.update(len(document).to_bytes(8, "big") + document)
    return total.hexdigest()


def decoded(document: bytes) -> str:
    """As text: bytes that are no UTF-8 become replacement characters."""
    return document.decode("utf-8", "replace")


def trained(documents: Sequence[bytes], size: int) -> Any:
    """A tokenizer of package ``tokenizers`` with ``size`` tokens, fewer if the documents have fewer pairs to merge."""
    tokenizers = require("tokenizers", "hf")
    level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = level(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=level.alphabet(), show_progress=False
    )
    made.train_from_iterator((decoded(document) for document in documents), trainer)
    return made


def encoded(tokenizer: Any, documents: Sequence[bytes]) -> NDArray[Any]:
    """Token numbers of all documents, token 0 after each, in the smallest type that holds them."""
    kind: Any = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = [tokenizer.token_to_id(END)]
    found = [np.asarray(tokenizer.encode(decoded(document)).ids + end, kind) for document in documents]
    return np.concatenate(found) if found else np.empty(0, kind)


def load(training: Sequence[bytes], held_out: Sequence[bytes], size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both sets of documents as token numbers of one vocabulary of ``size``, trained on the first; kept on disk.

    Raises:
        ValueError: a size below 257.
        ImportError: ``tokenizers`` is not installed.
        OSError: the cache cannot be read or written.
    """
    spec = Vocabulary(size, digest(training), digest(held_out), version("tokenizers"))

    def make() -> tuple[NDArray[Any], ...]:
        tokenizer = trained(training, size)
        return encoded(tokenizer, training), encoded(tokenizer, held_out)

    return cache.load(f"bpe-{size}", spec, Path(__file__), ("training", "held_out"), make)  # pyright: ignore[reportReturnType]
