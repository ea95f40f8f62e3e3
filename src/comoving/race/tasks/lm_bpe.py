"""A small LLaMA predicts the next token of a byte-level BPE vocabulary.

With 4,096 tokens the embedding and the head have 57% of the parameters, as they have 56% in the LLaMA of 60 million
that low-rank methods are compared on (arXiv 2403.03507: 32,000 tokens, width 512); with bytes they have 8%.
"""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from comoving.race import bpe
from comoving.race.tasks import Batch
from comoving.race.tasks.lm import VALIDATION_WINDOWS, Document, TextTask, llama, read, split


class TokenTask(TextTask):
    """Windows of 128 tokens; a token of its own ends each document.

    Args:
        corpus: (name, bytes) pairs; at most 64 MiB of them are read.
        vocabulary: tokens, at least 257.

    Raises:
        ValueError: if there is too little text for a window to train on and one to validate on, or a small vocabulary.
    """

    def __init__(self, corpus: Iterable[Document], vocabulary: int) -> None:
        training, validation = split(corpus)
        super().__init__(*bpe.load(training, validation, vocabulary), "tokens")
        self.vocabulary = vocabulary
        # The end of a document counts as a byte, as it is one in the task on bytes.
        self.bytes = sum(len(bpe.decoded(document).encode()) + 1 for document in validation)

    def model(self) -> nn.Module:
        """Four layers of width 128, 1.85 million parameters at 4,096 tokens, head not tied."""
        return llama(self.vocabulary)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a token in nats."""
        return self.nats(model, batch)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over 96 windows spread evenly over the held-out text, and nats per token.

        The first is the second times the tokens of the held-out text over its bytes, by ln 2: comparable with what
        a model of bytes reaches on the same text.
        """
        total, count = 0.0, 0
        for batch in self.held_out_batches(VALIDATION_WINDOWS, next(model.parameters()).device):
            total += self.nats(model, batch).item() * len(batch[0])
            count += len(batch[0])
        nats = total / count
        return {"value": nats / math.log(2) * len(self.held_out) / self.bytes, "loss": nats}


def load(text: str = "", vocabulary: int = 4096) -> TokenTask:
    """The task on the corpus that ``text`` names ("" = CPython's standard library).

    Raises:
        ValueError: if nothing there can be read as text, or a vocabulary below 257.
        ImportError: ``tokenizers`` is not installed.
    """
    return read(text, lambda corpus: TokenTask(corpus, vocabulary))
