"""``comoving plan`` on the command line."""

import json
from pathlib import Path

import pytest

from comoving.cli import main

pytest.importorskip("typer")

FNO = "fno:modes=8x8,channels=16,layers=2,resolution=16x16"
OURS = ["--recipe", "comoving-adamw"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    return int(ended.value.code or 0)


def test_a_table_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", FNO, "--recipe", "tucker-adam", "--rank", "0.1", "--batch", "8", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "gradients", "moments", "feedback", "peak", "an estimate", "refresh"):
        assert word in shown
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["peak_bytes"] == sum(record["parts"].values())
    assert record["state_bytes"] == sum(record["state"].values())
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_json_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", FNO, "--recipe", "adamw", "--moments", "int8", "--fsdp", "2", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["fsdp"], record["options"], record["activations"]) == (2, {"moments": "int8"}, None)


def test_fit_says_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", FNO, "--fit", "1KB", "--codec", "int8", "--layerwise", *OURS, "--out", str(tmp_path)) == 0
    assert "nothing fits into 1.00 KB" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "plan.json").read_text())["best"]["layerwise"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", FNO, "--fit", "24Go"], "unknown unit 'Go'"),
        (["--model", FNO, "--fit", "24GB", "--rank", "4"], "--fit looks for the rank"),
        (["--model", FNO, "--ddp", "2", "--fsdp", "2"], "choose one"),
        (["--model", FNO, "--compress"], "give ddp"),
        (["--model", FNO, "--ddp", "2", "--wire", "int8"], "add --compress"),
        (["--model", FNO, "--ddp", "2", "--compress", "--wire", "int4"], "compress must be one of"),
        (["--model", "llama-9b"], "unknown model"),
        (["--model", FNO, "--recipe", "adam"], "unknown recipe"),
        (["--model", FNO, "--dtype", "fp8"], "dtype must be one of"),
        (["--model", FNO, "--device", "tpu"], "device must be"),
        (["--model", FNO, "--codec", "int7", *OURS], "codec must be one of"),
        (["--model", FNO, "--budget", "3/2"], "share of AdamW's"),
        (["--model", FNO, "--codec", "int8"], "'comoving' chooses codec itself"),
        (["--model", FNO, "--rank", "many"], "rank is 'many'"),
        (["--model", "llama-60m", "--batch", "2"], "need sequence"),
        (["--model", "no_such_module:make"], "cannot be imported"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_fit_tries_budgets_of_the_default(capsys):
    assert run("--model", FNO, "--fit", "1KB") == 0
    out = capsys.readouterr().out
    assert "the best" in out and "budget 1/8" in out and "budget 0" in out and "nothing fits into" in out
    assert run("--model", FNO, "--budget", "0") == 0
    assert "state" in capsys.readouterr().out
