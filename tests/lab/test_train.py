"""One run: the baseline is plain AdamW, arms do what they say, and an interrupted run goes on bit for bit."""

import json
import math
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import comoving
from comoving.directions import targets
from comoving.lab import config as configs
from comoving.lab import tasks
from comoving.lab.studies import STUDIES, Arm, branch
from comoving.lab.train import LabRun, Trial, stored, train
from comoving.race.runner import rate_factor

CONFIG = configs.configure(
    configs.load("vit-tiny-digits"),
    {"hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 24, "steps": 24, "batch": 8, "evaluations": 4,
     "ranks": (2,), "spec_every": 4, "spec_topk": 4, "extract_at": 0.5, "samples": 100, "stable": 0.2},
)  # fmt: skip
TASK = tasks.load(CONFIG)
ARMS = {arm.name: arm for study in STUDIES.values() for arm in study.arms(CONFIG)} | {
    "frozen-r2-half": branch("frozen", 2, "half"),
    "zero-r2-half": branch("zero", 2, "half"),
    "momentum": Arm("momentum", "treatment", "extract", "", rank=2, source="momentum", factor=5.0),
}


def run_of(name, seed=0, rate=4e-3, **changes):
    return LabRun(configs.configure(CONFIG, changes), ARMS[name], rate, seed, "cpu", "data")


@cache
def whole(name):
    """The record of a run of this arm from beginning to end; made once, and only looked at."""
    return train(run_of(name), TASK)


def plain_adamw(run, factor=1.0):
    """The baseline without the laboratory: final weights, losses, and the model."""
    torch.manual_seed(run.seed)
    model = TASK.model()
    chosen = [module.weight for module in targets(model, CONFIG.targets).values()]
    rest = [p for p in model.parameters() if not any(p is q for q in chosen)]
    optimizer = torch.optim.AdamW([{"params": chosen}, {"params": rest}], weight_decay=CONFIG.weight_decay)
    batches, losses = torch.Generator().manual_seed(run.seed), []
    for step in range(CONFIG.steps):
        now = rate_factor(step, CONFIG.steps, round(CONFIG.warmup * CONFIG.steps))
        for group, times in zip(optimizer.param_groups, (factor if step >= CONFIG.split else 1.0, 1.0), strict=True):
            group["lr"] = run.rate * now * times
        loss = TASK.loss(model, TASK.batch(CONFIG.batch, batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_the_baseline_is_plain_adamw():
    run = run_of("B0", seed=3)
    record = train(run, TASK)
    model, losses = plain_adamw(run)
    assert record["losses"] == losses and record["status"] == "finished"
    with torch.no_grad():
        model.eval()
        assert record["final"] == TASK.evaluate(model, "test")["value"]
        assert record["curve"][-1]["value"] == TASK.evaluate(model, "validation")["value"]
    assert [point["step"] for point in record["curve"]] == [0, 6, 12, 18, 24]


def test_b1_raises_the_rate_of_the_target_layers_at_the_split():
    run = run_of("B1")
    plain = plain_adamw(run)[1]
    assert whole("B1")["losses"] == plain_adamw(run, factor=ARMS["B1"].factor)[1]
    assert whole("B1")["losses"] != plain and whole("B1")["losses"][: CONFIG.split] == plain[: CONFIG.split]


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_trains_and_leaves_plain_weights(name):
    rng = torch.get_rng_state()
    trial = Trial(run_of(name), TASK, ())
    trial.train(lambda step, loss: None, None)
    record = json.loads(json.dumps(trial.record()))
    assert record["status"] == "finished", record
    assert all(math.isfinite(loss) for loss in record["losses"]) and math.isfinite(record["final"])
    plain = TASK.model()
    assert list(trial.model.state_dict()) == list(plain.state_dict())
    assert all(type(a) is type(b) for a, b in zip(trial.model.modules(), plain.modules(), strict=True))
    branches = ARMS[name].action == "branches"
    assert bool(record["energy"]) is bool(record["alignment"]) is not branches
    assert all(0 <= value <= 1 + 1e-5 for _, value in record["energy"] + record["alignment"])
    assert {
        len(values) for key, values in record["spectra"].items() if key.endswith("sigma_max") and key.count("/") == 2
    } == {6}
    torch.set_rng_state(rng)


def test_until_the_split_arms_do_not_differ():
    alike = [whole(name)["losses"] for name in ("B0", "E4-r2", "3B-r2", "B2-r2", "B3-r2")]
    split = CONFIG.split
    assert all(losses[: split + 1] == alike[0][: split + 1] for losses in alike)
    later = {tuple(losses[split + 1 :]) for losses in alike}
    assert len(later) == len(alike)


def test_frozen_and_zero_backbones():
    for kind in ("frozen", "zero"):
        trial = Trial(run_of(f"{kind}-r2-half"), TASK, ())
        torch.manual_seed(0)
        initial = {name: module.weight for name, module in targets(TASK.model(), CONFIG.targets).items()}
        trial.train(lambda step, loss: None, None)
        trial.record()
        ranks = []
        for name, module in trial.layers.items():
            base = initial[name].detach() if kind == "frozen" else torch.zeros_like(module.weight)
            ranks.append(int(torch.linalg.matrix_rank((module.weight.detach() - base).double(), atol=1e-5)))
        assert ranks == [2] * 6 + [0] * 6


@pytest.mark.parametrize("kind", ["frozen", "zero"])
def test_branches_in_half_of_the_blocks_still_let_the_input_through(kind):
    trial = Trial(run_of(f"{kind}-r2-half"), TASK, ())
    with torch.no_grad():
        outputs = trial.model(pixel_values=TASK.prepared(TASK.parts["test"][0][:8])).logits
    assert float(outputs.std(0).max()) > 0
    with_branches = {name for name, m in trial.layers.items() if nn.utils.parametrize.is_parametrized(m)}
    assert with_branches == {name for name in trial.layers if ".layers.0." in name}


def test_b3_moves_the_core_alone():
    trial = Trial(run_of("B3-r2"), TASK, ())
    while trial.step < CONFIG.split + 1:
        trial.update()
    before = {name: module.weight.detach().clone() for name, module in trial.layers.items()}
    while trial.step < CONFIG.steps:
        trial.update()
    for name, module in trial.layers.items():
        change = (module.weight.detach() - before[name]).double()
        u, v = (x.double() for x in trial.intervention.used[name])
        inside = u @ (u.T @ change @ v) @ v.T
        assert change.norm() > 1e-4 and (change - inside).norm() < 1e-5 * before[name].norm()


@pytest.mark.parametrize("name", ["B0", "B1", "frozen-r2", "3B-r2", "B2-r2", "E4-r2", "B3-r2"])
def test_resumed_is_bitwise_the_whole_run(name, tmp_path):
    """From before the split and from after it."""
    trial = Trial(run_of(name), TASK, ())
    trial.evaluate()
    for stop in (9, 17):
        while trial.step < stop:
            trial.update()
            if trial.step in {6, 12, 18}:
                trial.evaluate()
        torch.save(trial.state(), tmp_path / "run.pt")
        resumed = train(run_of(name), TASK, checkpoint=tmp_path / "run.pt")
        assert not (tmp_path / "run.pt").exists()
        timeless = {"seconds", "curve"}
        assert {k: v for k, v in resumed.items() if k not in timeless} == {
            k: v for k, v in whole(name).items() if k not in timeless
        }
        for a, b in zip(resumed["curve"], whole(name)["curve"], strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("comoving.")]


def turned(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


DAMAGES = {
    **{f"cut at {share}": lambda path, s=share: os.truncate(path, int(s * path.stat().st_size))
       for share in (0, 0.0001, 0.01, 0.5, 0.99)},
    "last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte": turned,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_bytes(b"garbage\n" * 99),
    "pickle": lambda path: path.write_bytes(b"\x80\x02]q\x00."),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "a part": lambda path: torch.save({"step": 3, "model": {}}, path),
    "code": lambda path: torch.save(os.truncate, path),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_run_begins_anew(damage, tmp_path, caplog):
    path = tmp_path / "run.pt"
    trial = Trial(run_of("B0"), TASK, ())
    trial.evaluate()
    trial.update()
    comoving.save(path, trial.state())
    assert stored(path)["step"] == 1 and not ours(caplog)
    DAMAGES[damage](path)
    assert stored(path) is None and not path.exists()
    (said,) = ours(caplog)
    assert said.startswith(f"{path} is damaged (") and said.endswith("); the run begins anew") and "\n" not in said


@pytest.mark.parametrize("error", [MemoryError("full"), torch.AcceleratorError("lost"), OSError(5, "I/O")], ids=str)
def test_a_machine_that_fails_is_no_damage(error, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    comoving.save(path, Trial(run_of("B0"), TASK, ()).state())

    def failing(*args, **options):
        raise error

    owner, name = (Path, "read_bytes") if isinstance(error, OSError) else (torch, "load")
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(type(error)):
        stored(path)
    assert path.exists()


def test_a_run_with_a_damaged_checkpoint_is_the_whole_run(tmp_path, caplog):
    (tmp_path / "run.pt").write_bytes(b"garbage")
    again = train(run_of("B0"), TASK, checkpoint=tmp_path / "run.pt")
    assert again["losses"] == whole("B0")["losses"] and not (tmp_path / "run.pt").exists()
    assert len(ours(caplog)) == 1


def test_a_folder_in_place_of_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(IsADirectoryError, match="remove the folder"):
        train(run_of("B0"), TASK, checkpoint=tmp_path)


@pytest.mark.parametrize(("at", "phase"), [(3, "before the split"), (15, "after the split")])
def test_numbers_that_are_not_finite_end_a_run_with_words(at, phase, monkeypatch):
    usual, calls = TASK.loss, []

    def loss(model, batch):
        calls.append(None)
        return usual(model, batch) * (math.nan if len(calls) == at + 1 else 1.0)

    monkeypatch.setattr(TASK, "loss", loss)
    record = train(run_of("E4-r2"), TASK)
    assert record["status"] == "diverged" and record["final"] is None
    assert record["error"] == f"training loss became nan at step {at + 1} ({phase})"
    assert len(record["losses"]) == at + 1 and record["curve"]


def test_a_gradient_that_is_not_finite(monkeypatch):
    trial = Trial(run_of("B0"), TASK, ())
    while trial.step < 8:
        trial.update()
    usual = TASK.loss

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * math.nan

    monkeypatch.setattr(TASK, "loss", lambda model, batch: Bad.apply(usual(model, batch)))
    trial.update()
    assert trial.error == "the energy of the gradient became nan at step 9 (before the split)"


def test_weights_that_are_not_finite_at_the_split(monkeypatch):
    trial = Trial(run_of("E4-r2"), TASK, ())
    while trial.step < CONFIG.split:
        trial.update()
    with torch.no_grad():
        next(iter(trial.layers.values())).weight[0, 0] = math.inf
    trial.update()
    assert trial.error is not None and next(iter(trial.layers)) in trial.error
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in trial.layers.values())


def test_settings_survive_json():
    run = run_of("E4-r2")
    assert LabRun.of(json.loads(json.dumps(run.plain()))) == run
