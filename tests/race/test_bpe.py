"""Byte-pair encoding: nothing of the text is lost, the vocabulary is of the training text, and made once."""

import numpy as np
import pytest
import torch

from comoving.race import bpe, cache
from comoving.race.tasks import lm, lm_bpe

WORDS = b"def return import class self None True for while yield "
TRAINING = [WORDS * (i + 1) + b"\n\tname_%d = (%d)\r\n" % (i, i) for i in range(30)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))


def test_text_comes_back_and_bytes_that_are_none_are_marked():
    tokenizer = bpe.trained(TRAINING, 300)
    assert 257 < tokenizer.get_vocab_size() <= 300
    texts = [b"", b" a  b\n\n\tc", "na\u00efve \u6f22\u5b57 \U0001f642".encode(), bytes(range(128)), b"\xff\xfe"]
    tokens = bpe.encoded(tokenizer, texts)
    assert tokens.dtype == np.uint16 and (tokens == 0).sum() == len(texts)
    found, start = [], 0
    for end in np.flatnonzero(tokens == 0):
        found.append(tokenizer.decode(tokens[start:end].tolist()).encode())
        start = end + 1
    assert found == [*texts[:-1], "\ufffd\ufffd".encode()]


def test_frequent_words_become_one_token():
    tokenizer = bpe.trained(TRAINING, 300)
    assert len(tokenizer.encode(" return").ids) == 1
    assert len(tokenizer.encode(" qzxv").ids) == 5


def test_made_once_for_each_text_and_size(monkeypatch):
    made = []
    inner = bpe.trained
    monkeypatch.setattr(bpe, "trained", lambda documents, size: made.append(size) or inner(documents, size))
    first, again = (bpe.load(TRAINING, [b"other text"], 280) for _ in range(2))
    assert made == [280]
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, again, strict=True))
    bpe.load(TRAINING, [b"other text"], 281)
    bpe.load(TRAINING[1:], [b"other text"], 280)
    bpe.load([TRAINING[0] + TRAINING[1], *TRAINING[2:]], [b"other text"], 280)
    bpe.load(TRAINING, [b"another text"], 280)
    assert made == [280, 281, 280, 280, 280]
    assert len(list(cache.folder().glob("bpe-*.npz"))) == 5
    with pytest.raises(ValueError, match="256 tokens; it must have at least 257"):
        bpe.load(TRAINING, [], 256)


class Uniform(torch.nn.Module):
    """Every one of ``size`` tokens is as likely."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.size = size

    def forward(self, input_ids):
        out = type("Output", (), {})()
        out.logits = self.weight.expand(*input_ids.shape, self.size)
        return out


def test_the_metric_is_bits_per_byte_of_the_held_out_text():
    corpus = [(str(i), WORDS * 40 + bytes([65 + i % 50]) * 99) for i in range(60)]
    task = lm_bpe.TokenTask(corpus, 300)
    held_out = [content for name, content in corpus if lm.held_out(name)]
    assert task.bytes == sum(map(len, held_out)) + len(held_out)
    found = task.validate(Uniform(300))
    assert found["loss"] == pytest.approx(np.log(300), rel=1e-5)
    assert found["value"] == pytest.approx(np.log2(300) * len(task.held_out) / task.bytes, rel=1e-5)
    inputs, following = task.batch(3, torch.Generator().manual_seed(1))
    assert inputs.shape == (3, 128) and (inputs[:, 1:] == following[:, :-1]).all() and inputs.max() < 300


def test_half_of_the_parameters_are_of_embedding_and_head():
    with torch.device("meta"):
        model = lm.llama(4096)
    own = sum(p.numel() for p in (model.get_input_embeddings().weight, model.get_output_embeddings().weight))
    assert own / sum(p.numel() for p in model.parameters()) == pytest.approx(0.566, abs=1e-3)
