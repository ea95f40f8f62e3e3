"""One run: same start, same batches, honest figures, no trace in the global RNG."""

import math
from dataclasses import replace

import pytest
import torch

from comoving.race import runner
from comoving.race.runner import rate_factor, spikes, train, validation_steps
from race.small import Small, settings


def run_of(tmp_path, contender="torch-adamw", seed=0, **changes):
    return settings(tmp_path, **changes).run(contender, 1e-2, seed, "")


def test_same_initialization_and_batches_for_every_contender(tmp_path):
    task = Small()
    records = [train(run_of(tmp_path, name), task) for name in ("torch-adamw", "torch-muon")]
    assert [r["status"] for r in records] == ["finished"] * 2
    first, second = task.initial
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(task.batches[:12], task.batches[12:], strict=True))
    assert records[0]["losses"][0] == records[1]["losses"][0]
    assert records[0]["losses"][-1] != records[1]["losses"][-1]


def test_seeds_differ_and_repeat(tmp_path):
    zero, one, again = (train(run_of(tmp_path, seed=s), Small())["losses"] for s in (0, 1, 0))
    assert zero == again and zero != one


def test_global_rng_is_left_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(run_of(tmp_path), Small())
    assert torch.equal(before, torch.get_rng_state())


def test_record(tmp_path):
    told = []
    record = train(run_of(tmp_path), Small(), lambda step, loss: told.append(step))
    assert told == list(range(1, 13))
    assert [p["step"] for p in record["validation"]] == [4, 8, 12]
    assert record["final"] == record["validation"][-1]["value"] < record["validation"][0]["value"]
    assert len(record["losses"]) == 12
    weights = 16 * 24 + 24 * 8
    assert record["parameters_projected"] == 4 * weights
    assert record["state_projected"] == 2 * 4 * weights + 2 * 4  # two moments, and a step count for each of two tensors
    assert record["state"] > record["state_projected"]
    assert record["worst_step_ratio"] >= 1 and record["peak_memory"] > 2**20
    assert record["refresh_share"] is None
    assert 0 < record["optimizer_seconds"] < record["step_seconds"]


def test_parts_of_a_batch_train_as_the_whole(tmp_path, monkeypatch):
    whole = train(run_of(tmp_path, dtype="float64"), Small())
    monkeypatch.setitem(runner.TASKS, "vit", replace(runner.TASKS["vit"], forward=3))
    sizes = []

    class Counted(Small):
        def loss(self, model, batch):
            sizes.append(len(batch[0]))
            return super().loss(model, batch)

    parts = train(run_of(tmp_path, dtype="float64"), Counted())
    assert sizes[:6] == [3, 3, 2] * 2
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-9)


def test_refreshes_are_timed_where_the_optimizer_says_so(tmp_path, monkeypatch):
    class Refreshing(torch.optim.SGD):
        def refresh_scope(self):
            raise AssertionError("replaced by the runner")

        def step(self, closure=None):
            with self.refresh_scope():
                torch.randn(200, 200).matrix_exp()
            return super().step(closure)

    monkeypatch.setattr(
        runner.Contender, "build", lambda self, model, lr, rank, weight_decay: Refreshing(model.parameters(), lr)
    )
    share = train(run_of(tmp_path), Small())["refresh_share"]
    assert 0.5 < share <= 1


def test_divergence_is_reported(tmp_path):
    class Poisoned(Small):
        def loss(self, model, batch):
            return super().loss(model, batch) * (math.nan if len(self.batches) == 5 else 1)

    record = train(run_of(tmp_path), Poisoned())
    assert record["status"] == "diverged" and "step 5" in record["error"] and record["final"] is None


def test_our_own_contender_is_counted_on_the_weights_it_projects(tmp_path):
    import comoving  # noqa: PLC0415

    records = {name: train(run_of(tmp_path, name), Small()) for name in ("comoving-adamw", "adamw", "torch-adamw")}
    with torch.random.fork_rng():
        model = Small().model()
        optimizer = comoving.build("comoving-adamw", model, lr=1e-2, rank=4)
        task = Small()
        task.loss(model, task.batch(8, torch.Generator())).backward()
        optimizer.step()
    assert records["comoving-adamw"]["state_projected"] == comoving.state_bytes(optimizer, projected=True)
    assert records["comoving-adamw"]["refresh_share"] is not None
    assert len({r["parameters_projected"] for r in records.values()}) == 1
    assert records["adamw"]["state_projected"] == records["torch-adamw"]["state_projected"]


def test_rate_kept_in_a_tensor_is_changed_in_place(tmp_path, monkeypatch):
    rates = []

    class Kept(torch.optim.AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"].item())
            return super().step(closure)

    monkeypatch.setattr(
        runner.Contender, "build", lambda self, model, lr, rank, decay: Kept(model.parameters(), torch.tensor(lr))
    )
    assert train(run_of(tmp_path), Small())["status"] == "finished"
    assert rates[0] > rates[-1] > 0


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(tmp_path, dtype):
    record = train(run_of(tmp_path, dtype=dtype), Small())
    assert record["status"] == "finished"
    assert record["parameters"] == (16 * 24 + 24 + 24 * 8 + 8) * (8 if dtype == "float64" else 2)


def test_schedule():
    factors = [rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert factors[-1] < 0.01 and all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert rate_factor(0, 1, 0) == 1


def test_spikes():
    calm = [1 + 0.01 * (i % 3) for i in range(60)]
    assert spikes(calm) == []
    calm[40] = 1.4
    assert spikes(calm) == [40]
    calm[40] = 1.2
    assert spikes(calm) == []
    noisy = [1 + 0.5 * (-1) ** i for i in range(60)]
    assert spikes(noisy) == []
    assert spikes([5.0] + [1.0] * 19) == []


def test_validation_steps():
    assert validation_steps(100, 4) == [25, 50, 75, 100]
    assert validation_steps(3, 16) == [1, 2, 3]
