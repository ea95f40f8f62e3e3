"""Sinks, read back; the options of a command line; and both callbacks against a plain loop."""

import argparse
import json
import logging
import struct
import warnings

import pytest
import torch
import wandb
from torch import nn

from comoving.directions import (
    JSONLines,
    Log,
    SpectralMonitor,
    TensorBoard,
    WandB,
    add_arguments,
    from_arguments,
    lightning_callback,
    parse_sink,
    trainer_callback,
)
from directions.watched import Kept, Net, backward, sample


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_go_on_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "new" / "spec.jsonl"
    sink = JSONLines(path)
    for step in (1, 101, 201):
        sink.write(step, {"spec/a/sigma_max": step / 2, "spec/a/p": float("nan")})
    sink.close()
    assert lines(path)[1] == {"step": 101, "spec/a/sigma_max": 50.5, "spec/a/p": None}
    with path.open("a") as file:
        file.write('{"step": 301, "spec/a/si')  # a crash in the middle of a line
    sink = parse_sink(f"jsonl:{path}", resume_at=150)
    sink.write(201, {"x": 1.0})
    sink.close()
    assert [row["step"] for row in lines(path)] == [1, 101, 201] and lines(path)[2] == {"step": 201, "x": 1.0}
    for other in (b"a picture\n", b"\x89PNG\n"):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=f"{path} holds .*no reading.*: move it away"):
            JSONLines(path)
        assert path.read_bytes() == other


def test_the_log(caplog):
    with caplog.at_level(logging.INFO, "comoving.directions"):
        Log().write(7, {"spec/a/sigma_max": 2.0, "spec/a/sv1": 2.0, "spec/a/grad/cos_u1": 1.0, "spec/a/grad/p": 0.25})
    assert caplog.messages == ["update 7 spec/a sigma_max=2", "update 7 spec/a/grad p=0.25"]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    sink = TensorBoard(tmp_path)
    sink.write(1, {"spec/a/sigma_max": 1.5})
    sink.write(101, {"spec/a/sigma_max": 2.5})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("spec/a/sigma_max")] == [(1, 1.5), (101, 2.5)]


def records(data):
    """Of a file in LevelDB's log format: in blocks of 32 KiB pieces of (crc, length, kind) that make up records."""
    whole, at = b"", 7  # after W&B's own header
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def history(folder):
    """The rows of the offline run in this folder."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.history.item:
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    return rows


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def test_wandb_without_login_is_offline_and_loses_nothing(tmp_path, no_login):
    with pytest.warns(UserWarning, match="Weights & Biases is not reached .* wandb sync .*offline-run-") as caught:
        sink = WandB("test", tmp_path / "runs")
    assert len(caught) == 1
    sink.run.log({"loss": 1.0})
    sink.write(1, {"spec/a/sigma_max": 1.5})
    sink.write(101, {"spec/a/sigma_max": 2.5})
    sink.close()
    wandb.teardown()  # the service writes the file out
    rows = [row for row in history(tmp_path / "runs") if "spec/update" in row]
    assert [(row["spec/update"], row["spec/a/sigma_max"]) for row in rows] == [(1, 1.5), (101, 2.5)]


def test_unknown_sinks():
    for text in ("jsonl:", "jsonl", "csv:a", "tensorboard", ""):
        with pytest.raises(ValueError, match="is no sink; give jsonl:PATH"):
            parse_sink(text)
    with pytest.raises(ValueError, match="mode = 'on'"):
        WandB(mode="on")


def test_options(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    assert from_arguments(parser.parse_args([]), model, optimizer) is None
    with pytest.raises(ValueError, match="need --spec-monitor"):
        from_arguments(parser.parse_args(["--log-wandb"]), model, optimizer)
    words = "--spec-monitor --spec-every 2 --spec-topk 3 --spec-targets mlp.fc1 --spec-out log --spec-out"
    monitor = from_arguments(parser.parse_args([*words.split(), f"jsonl:{tmp_path}/s"]), model, optimizer)
    assert monitor.k == 3 and list(monitor.modules) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    for step in range(3):
        backward(model, step)
        optimizer.step()
    monitor.close()
    rows = lines(tmp_path / "s")
    assert [row["step"] for row in rows] == [1, 3] and "spec/blocks.1.mlp.fc1/grad/sv3" in rows[1]
    defaults = parser.parse_args(["--spec-monitor"])
    assert (defaults.spec_every, defaults.spec_topk, defaults.wandb_project) == (100, 8, "comoving")


# ------------------------------------------------------------------------------------------------------- callbacks

OPTIONS = {"targets": "mlp.fc1,attn.qkv", "every": 2, "k": 3}


def plain_loop(updates, clip=None):
    model, kept = Net(), Kept()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    SpectralMonitor(model, sinks=[kept], **OPTIONS).attach(optimizer)
    for step in range(updates):
        backward(model, step)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return kept.rows


def same(rows, wanted, prefix=""):
    assert list(rows) == list(wanted)
    for step, row in wanted.items():
        renamed = {name.replace("spec/", f"spec/{prefix}", 1): value for name, value in row.items()}
        assert {name: rows[step][name] for name in renamed} == pytest.approx(renamed, abs=1e-4)


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers, about this machine
        return function(*args, **options)


def test_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning  # noqa: PLC0415
        from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    class Rows(CSVLogger):
        def __init__(self, folder):
            super().__init__(folder)
            self.rows = {}

        def log_metrics(self, metrics, step=None):
            if any("sigma_max" in name for name in metrics):
                self.rows[step] = dict(metrics)

    def fit(epochs, checkpoint=None):
        logger, callback = Rows(tmp_path), lightning_callback(**OPTIONS)
        trainer = lightning.Trainer(
            max_epochs=epochs, logger=logger, callbacks=[callback], default_root_dir=tmp_path, accelerator="cpu",
            gradient_clip_val=0.05, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        data = torch.utils.data.DataLoader([sample(step) for step in range(4)], batch_size=None)
        trainer.fit(Module(), data, ckpt_path=checkpoint)
        return trainer, logger.rows, callback

    trainer, rows, callback = quietly(fit, 1)
    wanted = plain_loop(4, clip=0.05)
    same(rows, wanted, "net.")
    assert callback.monitor.updates == 4
    path = tmp_path / "at.ckpt"
    quietly(trainer.save_checkpoint, path)
    _, rows, callback = quietly(fit, 2, path)
    assert list(rows) == [5, 7] and callback.monitor.updates == 8
    assert "spec/net.blocks.0.mlp.fc1/cos_u_max" in rows[5]  # compared with the reading before the checkpoint


def test_the_hugging_face_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def train(steps, **resume):
        data = [{"x": x, "labels": y} for step in range(4) for x, y in zip(*sample(step), strict=True)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True,
            lr_scheduler_type="constant", max_grad_norm=0.05, weight_decay=0.01, report_to=[], save_steps=3,
            disable_tqdm=True, logging_steps=1000, train_sampling_strategy="sequential", optim="adamw_torch",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(Classifier(), arguments, train_dataset=data)
        callback = trainer_callback(trainer, **OPTIONS)
        trainer.add_callback(callback)
        trainer.train(**resume)
        rows = [row for row in trainer.state.log_history if any("sigma_max" in name for name in row)]
        return {row["step"]: row for row in rows}, callback

    rows, callback = quietly(train, 4)
    same(rows, plain_loop(4, clip=0.05), "net.")
    assert callback.monitor.updates == 4
    resumed, callback = quietly(train, 5, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert list(resumed) == [1, 3, 5] and callback.monitor.updates == 5
    assert "spec/net.blocks.0.mlp.fc1/cos_u_max" in resumed[5]
    with pytest.raises(ValueError, match="give the trainer"):
        trainer_callback(every=3)
