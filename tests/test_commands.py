"""What the commands say where they cannot write: one line, with the path and what to do, and status 2."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comoving import cli
from comoving.bench import command as bench
from comoving.files import write_json
from comoving.lab.campaign import Campaign
from comoving.race.sweep import Race
from lab import synthetic

COMMANDS = {
    "race": ["race", "--task", "vit", "--optimizers", "torch-adamw", "--steps", "2"],
    "plan": ["plan", "--model", "fno:modes=4x4,channels=8,layers=1", "--recipe", "adamw", "--dtype", "float32"],
    "bench": ["bench", "subspace", "--quick"],
    "lab run": ["lab", "run", "3", "--config", "vit-tiny-digits", "--seeds", "1", "--jobs", "1"],
}


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """Nothing is trained or measured."""
    monkeypatch.setenv("COMOVING_DIGITS", "1")
    monkeypatch.setattr(Race, "run", lambda race: race.entries)
    monkeypatch.setattr(Campaign, "run_all", lambda campaign, runs, command: None)
    monkeypatch.setattr(bench, "measure", lambda settings, command, say: {})


def said(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert ended.value.code == cli.BAD_INPUT, error
    assert "Traceback" not in error
    return [line for line in error.splitlines() if line.startswith("comoving: ")]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("below", ["", "a/b"], ids=["itself", "above it"])
def test_out_that_is_a_file(name, below, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    out = file / below
    (line,) = said([*COMMANDS[name], "--out", out], capsys)
    assert line == (f"comoving: {out}: Not a directory; there is a file where a folder is needed: choose another place")
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_out_that_is_read_only(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    (line,) = said([*COMMANDS[name], "--out", tmp_path / "new"], capsys)
    assert line == f"comoving: {tmp_path / 'new'}: Permission denied; choose a place that may be written to"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_out_on_a_full_disk(name, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (line,) = said([*COMMANDS[name], "--out", tmp_path], capsys)
    path, _, rest = line.removeprefix("comoving: ").partition(": ")
    assert Path(path).parent == tmp_path and Path(path).suffix == ".json"
    assert rest == "No space left on device; free some space, or choose another place"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_made(code, tmp_path, capsys, monkeypatch):
    def refused(path, *rest, **options):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    (line,) = said([*COMMANDS["plan"], "--out", tmp_path / "new"], capsys)
    assert line.startswith(f"comoving: {tmp_path / 'new'}: {os.strerror(code)}; ")


def test_a_report_that_cannot_be_read_or_written(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results-e4-x.json"
    write_json(file, synthetic.against(seeds=1))
    (line,) = said(["lab", "report", file], capsys)
    assert line.startswith(f"comoving: {file}: Not a directory; give the folder that comoving lab run had as --out")
    file.write_text("[]")
    (line,) = said(["lab", "report", tmp_path], capsys)
    assert line.startswith(f"comoving: {file} has another shape than expected") and "or remove it" in line
    file.unlink()
    file.mkdir()
    (line,) = said(["lab", "report", tmp_path], capsys)
    assert line.startswith(f"comoving: {file}: Is a directory; ")
    file.rmdir()
    write_json(file, synthetic.against(seeds=1))
    monkeypatch.setattr(os, "access", lambda path, how: how == os.R_OK)
    (line,) = said(["lab", "report", tmp_path], capsys)
    assert line.startswith(f"comoving: {tmp_path}: Permission denied") and os.listdir(tmp_path) == [file.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk():
    script = "from comoving.cli import main; main(['recipes', '--json'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == cli.BAD_INPUT
    assert done.stderr == (
        "comoving: standard output: No space left on device; free some space, or send it elsewhere\n"
    )


def test_results_have_the_permissions_of_any_file(tmp_path, capsys):
    (tmp_path / "plain").touch()
    with pytest.raises(SystemExit) as ended:
        cli.main([*COMMANDS["race"], "--out", str(tmp_path / "out")])
    assert ended.value.code == 1  # nobody finished
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode} and (tmp_path / "out" / "results.json").exists()
