"""``comoving lab`` as a user types it."""

import json

import pytest

from comoving import cli
from comoving.lab import campaign, pictures
from comoving.lab import config as configs
from comoving.lab.studies import find

SMALL = """
title = "a very small ViT on digits"
task = "images"
source = "digits"
hidden_size = 16
layers = 1
heads = 2
intermediate_size = 16
steps = 10
batch = 4
rate = 1e-3
rates = [1.0]
evaluations = 2
ranks = [2]
spec_topk = 2
spec_every = 5
"""


def comoving(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["lab", *map(str, arguments)])
    return ended.value.code


def test_list_names_studies_and_configurations(capsys):
    assert comoving("list") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*configs.names(), "3b", "e4", "ViT-S on CIFAR-100"))


def test_run_report_and_sinks(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    out = tmp_path / "runs"
    options = ["--seeds", 1, "--out", out, "--spec-every", 4, "--jobs", 1]
    sinks = ["--spec-monitor", "--log-tensorboard", "--log-wandb", "--wandb-project", "tests"]
    config = configs.configure(configs.load(str(file)), {"spec_every": 4})
    run = campaign.Campaign(find("3"), config, 1, out, None).setting(find("3").arms(config)[0], 1e-3, 0)
    checkpoint = campaign.file_of(run, out).with_suffix(".pt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"half a checkpoint")
    assert comoving("run", "3", "--config", file, *options, *sinks) == 0
    said = capsys.readouterr()
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("comoving.")]
    assert logged == [f"{checkpoint} is damaged (File is not a zip file); the run begins anew"]
    assert (
        "1 seed: not enough evidence for any verdict, 3 are needed" in said.err
        and "[1/1] B0 lr 0.001 seed 0" in said.err
    )
    assert "not enough evidence" in said.out and str(out / "report.html") in said.out.replace("\n", "")
    results = json.loads((out / "results-3-small.json").read_text())
    assert results["command"].startswith("comoving lab run 3 --config") and results["config"]["spec_every"] == 4
    lines = [json.loads(line) for file in (out / "spectra").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 9]
    assert list((out / "tensorboard").rglob("events*")) and list((out / "wandb").rglob("*.wandb"))
    (out / "report.html").unlink()
    assert comoving("report", out) == 0
    page = (out / "report.html").read_text()
    assert "not enough evidence" in page and "data:image/png;base64," in page
    capsys.readouterr()
    monkeypatch.setattr(pictures, "everything", lambda results: [])  # they would be those that there are
    assert comoving("run", "3", "--config", file, *options) == 0
    assert "1 of 1 runs were finished earlier and are used again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "e5", "--config", "vit-tiny-digits"], "unknown study 'e5'; known: 1, 2, 12, 3, 3b, e4"),
        (["run", "e4", "--config", "nothing"], "no configuration 'nothing'; known: "),
        (["run", "e4", "--config", "vit-tiny-digits", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["run", "e4", "--config", "vit-tiny-digits", "--steps", "0"], "steps is 0"),
        (
            ["run", "e4", "--config", "vit-tiny-digits", "--spec-targets", "attn.query"],
            "'attn.query' matches no module",
        ),
        (["run", "e4", "--config", "vit-tiny-digits", "--spec-topk", "65"], "spec_topk is 65"),
        (["report", "/nowhere"], "holds no results"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comoving(*arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.startswith("comoving: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))
