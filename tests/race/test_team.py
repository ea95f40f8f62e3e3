"""Several processes that train together: they end where one does, and one of them tells of it."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from torch import nn

from comoving.race import team, wrapping
from comoving.race.command import execute
from comoving.race.runner import train
from comoving.race.settings import SettingsError
from comoving.race.table import columns, remarks
from comoving.race.tasks import TaskInfo
from distributed.processes import Failed, run
from race.small import Small, settings

SEVERAL = {"ddp": {"wrapping": "ddp", "ranks": 2}, "fsdp": {"wrapping": "fsdp", "ranks": 2}}


class Listed(nn.Module):
    """Two hidden blocks in a list, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Blocks(Small):
    """Small, with a list of blocks."""

    def model(self):
        self.made = Listed()
        return self.made


def weights(model):
    """What all processes have together."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def trained(made):
    """The record of a run, and the weights after it."""
    task = Blocks()
    return train(made, task), weights(task.made)


def _trained(rank, made):
    return trained(made)


@pytest.mark.parametrize("contender", ["torch-adamw", "adamw", "comoving-adamw:side=right"])
@pytest.mark.parametrize("how", SEVERAL)
def test_two_processes_train_as_one_does(tmp_path, how, contender):
    alone, expected = trained(settings(tmp_path, dtype="float64").run(contender, 1e-2, 0, ""))
    several = settings(tmp_path, dtype="float64", **SEVERAL[how]).run(contender, 1e-2, 0, "")
    for record, found in run(2, _trained, several):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.tensor(record["losses"]), torch.tensor(alone["losses"]), rtol=0, atol=1e-9)
        assert record["final"] == pytest.approx(alone["final"], abs=1e-9)
        assert (record["wrapping"], record["ranks"], record["compressed"]) == (how, 2, False)
        share = 1 if how == "ddp" else 2
        assert record["parameters"] == alone["parameters"] / share
        assert record["parameters_projected"] == alone["parameters_projected"] / share
        assert record["sent"] == (alone["parameters"] if how == "ddp" else None)
        if "comoving-adamw" not in contender:
            assert record["state_projected"] == pytest.approx(alone["state_projected"] / share, abs=16)


class Hook:
    """Stands in for what compress() returns."""

    bytes = 1200


def _raced(rank, made, compress):
    """Exit status, and what was said on each stream."""
    import comoving.distributed  # noqa: PLC0415

    TaskInfo.load = lambda self, **options: Blocks()  # in this process alone
    if compress is not None:
        comoving.distributed.compress = compress
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = execute(made, "torchrun ...")
    return status, output.getvalue(), errors.getvalue()


def _hooked(model, optimizer):
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    return Hook()


def _refuses(model, optimizer):
    raise ValueError("cannot be compressed")


def test_the_first_process_writes_the_same_report_and_the_others_are_silent(tmp_path):
    changes = {"optimizers": ("torch-adamw", "comoving-adamw"), "rates": (1e-2, 2e-2), "seeds": 1}
    (first, second) = run(2, _raced, settings(tmp_path / "two", **changes, **SEVERAL["ddp"]), None)
    assert second == (0, "", "") and first[0] == 0
    assert "torch-adamw" in first[1] and "report:" in first[2]
    one = execute_alone(settings(tmp_path / "one", **changes))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert len(two["runs"]) == len(one["runs"]) > 4  # extended alike
    for a, b in zip(one["runs"], two["runs"], strict=True):
        assert (a["contender"], a["rate"]) == (b["contender"], b["rate"])
        assert a["final"] == pytest.approx(b["final"], rel=1e-3)
    assert set(two["summary"][0]) == {*one["summary"][0], "compressed", "sent"}
    assert "trained by 2 processes" in (tmp_path / "two" / "report.html").read_text()
    (again, _) = run(2, _raced, settings(tmp_path / "two", **changes, **SEVERAL["ddp"]), None)
    assert "4 of 4 runs were finished earlier" in again[2]


def execute_alone(made):
    from comoving.race.sweep import Race, results  # noqa: PLC0415

    race = Race(made, runner=lambda run, file, progress: train(run, Blocks()), data="small")
    race.run()
    return results(race, "")


def test_compression_is_for_optimizers_that_project(tmp_path):
    made = settings(tmp_path, optimizers=("adamw", "comoving-adamw"), compress=True, **SEVERAL["ddp"])
    run(2, _raced, made, _hooked)
    found = json.loads((tmp_path / "results.json").read_text())
    sent = {line["contender"]: (line["compressed"], line["sent"]) for line in found["summary"]}
    assert sent == {"adamw": (False, 4 * (2 * (16 * 16 + 16) + 8 * 16 + 8)), "comoving-adamw": (True, 100)}
    (line,) = [line for line in remarks(found) if "uncompressed" in line]
    assert line.startswith("adamw: ")
    (column,) = [column for column in columns(found) if column.heading == "sent"]
    assert {column.show(line) for line in found["summary"]} == {"100 B", "2.66 KiB"}


def test_what_cannot_be_compressed_is_refused_with_the_reason(tmp_path):
    made = settings(tmp_path, optimizers=("adamw", "comoving-adamw"), compress=True, **SEVERAL["ddp"])
    (first, _) = run(2, _raced, made, _refuses)
    assert first[0] == 0 and "refused: cannot be compressed" in first[2]


def _broken(rank, made, ranks):
    """Training that fails in some processes."""

    class Broken(Blocks):
        def loss(self, model, batch):
            if rank in ranks and len(self.batches) == 3:
                raise ZeroDivisionError("broken")
            return super().loss(model, batch)

    team.GRACE = team.timedelta(seconds=1)
    TaskInfo.load = lambda self, **options: Broken()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return execute(made, "")


def test_what_all_processes_fail_of_is_a_failed_run(tmp_path):
    assert run(2, _broken, settings(tmp_path, **SEVERAL["ddp"]), [0, 1]) == [1, 1]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["summary"][0]["problems"] == ["failed at 0.01: ZeroDivisionError: broken"]
    (log,) = (tmp_path / "runs").glob("*.log")
    assert "Traceback" in log.read_text()


def test_what_one_process_fails_of_ends_it(tmp_path):
    with pytest.raises(Failed, match="ZeroDivisionError: broken"):
        run(2, _broken, settings(tmp_path, **SEVERAL["ddp"]), [1])


def _other_data(rank, made):
    class Own(Blocks):
        def fingerprint(self):
            return f"data {rank}"

    TaskInfo.load = lambda self, **options: Own()
    with pytest.raises(SettingsError, match="process 1 has other data than process 0: data 1 instead of data 0"):
        execute(made, "")


def test_other_data_are_seen(tmp_path):
    run(2, _other_data, settings(tmp_path, **SEVERAL["ddp"]))


def _complex(rank):
    model = nn.Linear(4, 4, dtype=torch.complex64)
    with pytest.raises(wrapping.Refused, match="such as that of weight: race with --ddp"):
        wrapping.Sharded("cpu").sharded(model)


def test_complex_weights_are_not_sharded():
    run(1, _complex)


TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def test_what_torchrun_has_started_is_read_from_its_environment():
    assert team.launched(True, False, [], TWO) == {"wrapping": "ddp", "ranks": 2}
    assert team.launched(False, True, [], TWO) == {"wrapping": "fsdp", "ranks": 2}
    assert team.launched(False, False, [], {}) == {"wrapping": "", "ranks": 1}
    asked = ["race", "--task", "lm", "--lr", "1e-3, 2e-3", "--ddp"]
    with pytest.raises(SettingsError, match="type torchrun --nproc_per_node 2 -m comoving.race --task lm --lr '1e-3, "):
        team.launched(True, False, asked, {})
    with pytest.raises(SettingsError, match="torchrun has started 2 processes: add --ddp or --fsdp"):
        team.launched(False, False, asked, TWO)
    with pytest.raises(SettingsError, match="choose one"):
        team.launched(True, True, asked, TWO)
    assert team.typed(asked, {}) == "comoving race --task lm --lr '1e-3, 2e-3' --ddp"
    assert team.typed(asked[:3], TWO) == "torchrun --nproc_per_node 2 -m comoving.race --task lm"
    assert team.typed(["race"], TWO | {"WORLD_SIZE": "8"}).startswith("torchrun --nnodes 4 --nproc_per_node 2 -m")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"wrapping": "dp"}, "unknown wrapping 'dp'; known: ddp, fsdp"),
        ({"jobs": 2}, "jobs is 2; with --ddp"),
        ({"ranks": 3}, "a batch of 8 samples cannot be split evenly over 3 processes: give --batch 9"),
        ({"wrapping": "fsdp", "compress": True}, "--compress sends less of what --ddp sends"),
        ({"wrapping": "", "compress": True}, "--compress sends less"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, changes, word):
    with pytest.raises(SettingsError, match=word):
        settings(tmp_path, **(SEVERAL["ddp"] | changes))


def test_torchrun(tmp_path):
    options = ["--task", "lm", "--optimizers", "adamw,comoving-adamw", "--steps", "2", "--validations", "1"]
    options += ["--text", str(text(tmp_path)), "--out", str(tmp_path / "out"), "--ddp"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*command, "-m", "comoving.race", *options], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("LLaMA on bytes") == ended.stderr.count("[2/2]") == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["command"] == shlex.join(["torchrun", "--nproc_per_node", "2", "-m", "comoving.race", *options])
    assert [line["status"] for line in found["summary"]] == ["finished"] * 2
    assert found["settings"]["ranks"] == 2 and (tmp_path / "out" / "report.html").exists()


def text(folder):
    """A corpus that is read at once."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(20000)))
    return path
