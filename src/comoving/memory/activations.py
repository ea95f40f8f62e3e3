"""Activations that a backward pass needs: estimates by formula, never measured."""

from dataclasses import dataclass
from typing import Protocol


class Activations(Protocol):
    """An estimate for one kind of model."""

    formula: str
    """In words and symbols, for the reader of a plan."""

    def estimate(self, batch: int, sequence: int | None, itemsize: int, checkpointing: bool) -> int:
        """Bytes for a batch.

        Raises:
            ValueError: what the estimate needs is missing.
        """
        ...


@dataclass(frozen=True)
class Transformer:
    """A transformer with fused attention, whose scores are not kept.

    Each token keeps in each layer  6 h + 2 k + c i  numbers: the inputs of two norms, their outputs, queries, the
    output of attention; keys and values of width k; and c of the MLP's width i (4 with a gate, else 2). The head keeps
    v logits, and once more in float32 for the loss. With checkpointing a layer keeps its input, h, and one layer at a
    time the rest.

    Args:
        hidden, kv_width, intermediate, layers: h, k, i and the number of layers.
        gated: whether the MLP has a gate.
        outputs: v, the size of the vocabulary or the number of classes.
        tokens: of a sample where the model fixes them (images); None where the sequence does.
    """

    hidden: int
    kv_width: int
    intermediate: int
    layers: int
    gated: bool
    outputs: int
    tokens: int | None = None

    formula = "tokens x (layers x (6 hidden + 2 kv + c intermediate) + head), c = 4 with a gate, else 2"

    def estimate(self, batch: int, sequence: int | None, itemsize: int, checkpointing: bool) -> int:
        """Bytes for a batch of sequences."""
        if self.tokens is None and sequence is None:
            raise ValueError("activations of a language model need sequence, the tokens of a sample, beside batch")
        tokens = batch * (self.tokens or sequence or 0)
        layer = 6 * self.hidden + 2 * self.kv_width + (4 if self.gated else 2) * self.intermediate
        kept = self.layers * self.hidden + layer if checkpointing else self.layers * layer
        rows = batch if self.tokens is not None else tokens
        return tokens * kept * itemsize + rows * self.outputs * (itemsize + 4)


@dataclass(frozen=True)
class Operator:
    """A Fourier neural operator.

    Each point of space keeps in each layer 3 c numbers (the layer's input, and the sums before and after the
    nonlinearity); each layer keeps c complex64 spectra of as many frequencies as its weight has; lifting and projection
    keep 2 c numbers each.

    Args:
        channels: c.
        layers: Fourier layers.
        frequencies: of one weight.
        points: of space, 0 where unknown.
    """

    channels: int
    layers: int
    frequencies: int
    points: int

    formula = "batch x (points x channels x (3 layers + 4) + layers x channels x frequencies complex)"

    def estimate(self, batch: int, sequence: int | None, itemsize: int, checkpointing: bool) -> int:
        """Bytes for a batch of functions at these points."""
        if not self.points:
            raise ValueError("activations of an FNO need resolution=64x64, say, in its settings, beside batch")
        layers = 1 if checkpointing else self.layers
        kept = self.layers if checkpointing else 0
        per_point = self.channels * (3 * layers + kept + 4)
        return batch * (self.points * per_point * itemsize + layers * self.channels * self.frequencies * 8)
