"""A small LLaMA predicts the next of 4,096 tokens, so that its tables are as large a share as in real small models."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from comoving.race import cache
from comoving.race.extras import require
from comoving.race.tasks import Batch
from comoving.race.tasks.lm import CONTEXT, ByteTask, Document, Windows, loaded

VOCABULARY = 4096


@dataclass(frozen=True)
class Spec:
    """What the tokens follow from: the text, by its digest, and how many of them there are."""

    text: str
    vocabulary: int
    tokenizers: str


def tokens_of(texts: tuple[bytes, bytes], vocabulary: int) -> tuple[NDArray[np.uint16], ...]:
    """Training and validation text as tokens of a byte-level BPE that was trained on the first."""
    package = require("tokenizers", "hf")
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    training, validation = (text.decode("utf-8", errors="replace") for text in texts)
    tokenizer.train_from_iterator(pieces(training), trainer)
    return tuple(
        np.concatenate([np.array(tokenizer.encode(piece).ids, np.uint16) for piece in pieces(text)])
        for text in (training, validation)
    )


def pieces(text: str) -> list[str]:
    """A text in pieces of about 64 thousand characters that end with a line."""
    lines, found, size = text.splitlines(keepends=True), [list[str]()], 0
    for line in lines:
        if size > 65_536:
            found.append([])
            size = 0
        found[-1].append(line)
        size += len(line)
    return ["".join(part) for part in found]


class TokenTask(Windows):
    """Windows of 128 tokens of a byte-level BPE; losses are in bits per byte, so that vocabularies compare.

    Args:
        corpus: (name, bytes) pairs, shared out between training and validation as for
            :class:`comoving.race.tasks.lm.ByteTask`.
        vocabulary: tokens, 257 or more.

    Raises:
        ValueError: too little text, or a vocabulary that does not fit 16 bits.
    """

    def __init__(self, corpus: Iterable[Document], vocabulary: int = VOCABULARY) -> None:
        if not 257 <= vocabulary <= 65_536:
            raise ValueError(f"vocabulary must be in [257, 65536], got {vocabulary}")
        as_bytes = ByteTask(corpus)
        self.vocabulary, self._text = vocabulary, as_bytes.fingerprint()
        texts = as_bytes.training.tobytes(), as_bytes.held_out.tobytes()
        spec = Spec(self._text, vocabulary, require("tokenizers", "hf").__version__)
        names = ("training", "held_out")
        self.training, self.held_out = cache.load(
            "bpe", spec, Path(__file__), names, lambda: tokens_of(texts, vocabulary)
        )
        if min(len(self.training), len(self.held_out)) <= CONTEXT:
            raise ValueError(f"too little text: {len(self.held_out)} tokens to validate on, {CONTEXT + 1} are needed")
        self.bytes_per_token = len(texts[1]) / len(self.held_out)

    def model(self) -> nn.Module:
        """Four layers of width 128; 0.79 million parameters, and 1.05 million in embedding and head, not tied."""
        transformers = require("transformers", "hf")
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
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
        """Mean cross-entropy in bits per byte, at the validation text's bytes per token."""
        logits: Tensor = model(input_ids=batch[0]).logits
        nats = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())
        return nats / (math.log(2) * self.bytes_per_token)


def load(text: str = "") -> TokenTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text.
    """
    return loaded(text, TokenTask)
