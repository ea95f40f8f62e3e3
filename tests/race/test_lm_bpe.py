"""The language model on tokens."""

import math

import pytest
import torch

from comoving.race import cache
from comoving.race.tasks import TASKS
from comoving.race.tasks.lm_bpe import TokenTask, pieces, tokens_of

pytest.importorskip("tokenizers")

WORDS = [f"word{i} = {i * i % 97}\n" for i in range(300)]
TEXT = "".join(WORDS * 12)


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    return TokenTask([(str(i), TEXT[i * 500 : (i + 1) * 500].encode()) for i in range(100)], 300)


def test_tokens_spell_the_text():
    tokenizers = pytest.importorskip("tokenizers")
    assert "".join(pieces(TEXT)) == TEXT
    training, validation = tokens_of((TEXT.encode(), b"word7 = 49\n"), 300)
    assert training.max() < 300 and len(training) < len(TEXT) / 1.8
    assert len(validation) < len("word7 = 49\n")
    assert tokenizers.__version__


def test_losses_are_in_bits_per_byte(task):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(()))

    class Output:
        logits = torch.zeros(2, 128, 300)

    batch = task.batch(2, torch.Generator().manual_seed(0))
    assert batch[0].shape == (2, 128) and torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    uniform = task.loss(lambda input_ids: Output, batch)
    assert uniform.item() == pytest.approx(math.log2(300) / task.bytes_per_token)
    assert 1.5 < task.bytes_per_token < 8


def test_tokens_are_made_once(task, monkeypatch):
    monkeypatch.setattr("comoving.race.tasks.lm_bpe.tokens_of", None)
    again = TokenTask([(str(i), TEXT[i * 500 : (i + 1) * 500].encode()) for i in range(100)], 300)
    assert again.fingerprint() == task.fingerprint()
    assert len(list(cache.folder().glob("bpe-*"))) == 1


def test_tables_are_as_large_a_share_as_in_real_models(task):
    pytest.importorskip("transformers")
    task.vocabulary = 4096
    model = task.model()
    tables = sum(p.numel() for n, p in model.named_parameters() if "embed" in n or "head" in n)
    assert 0.4 < tables / sum(p.numel() for p in model.parameters()) < 0.7
    sizes = {name: info.batch * info.per_sample for name, info in TASKS.items() if name.startswith("lm-bpe")}
    assert sizes == {"lm-bpe": 4096, "lm-bpe-32k": 32_768}


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="vocabulary must be in"):
        TokenTask([], 256)
    with pytest.raises(ValueError, match="no text found"):
        TokenTask([("a", b"")], 300)
