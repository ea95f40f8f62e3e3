"""The tool finds what it is for, repeats what it found, and draws everything there is."""

import warnings
from collections import Counter

import pytest
import torch

from comoving import LowRankOptimizer
from comoving.fuzz import Case, Parameter, draw, examine
from comoving.fuzz.__main__ import main
from comoving.fuzz.run import run
from comoving.parts import PARTS
from comoving.recipes import recipes
from comoving.residual import Discard
from comoving.rules import Adam

CASE = Case(
    0, 0, "galore", {"refresh_every": 3, "on_nonfinite": "skip"},
    (Parameter("weight", (12, 9), torch.float32, structure="zero-lines"), Parameter("bias", (9,), torch.float32)),
    steps=8, resume=4, bad=6,
)  # fmt: skip


def wrapped(monkeypatch, owner, name, after=None, before=None):
    """Plant something before or after a method."""
    original = getattr(owner, name)

    def planted(self, *args, **kwargs):
        if before is not None:
            before(self)
        result = original(self, *args, **kwargs)
        return result if after is None else after(self, result)

    monkeypatch.setattr(owner, name, planted)


def first_gradient(optimizer):
    return optimizer.param_groups[0]["params"][0].grad


def test_nothing_planted_passes():
    outcome = examine(CASE)
    assert (outcome.kind, outcome.detail, outcome.trace) == ("passed", "", "")
    assert 0 < outcome.share <= 1


def raising(*_):
    raise RuntimeError("planted")


def perturbed(optimizer, result):
    for state in optimizer.state.values():
        if "moment.first" in state:
            state["moment.first"].mul_(1 + 1e-6)
    return result


def moved(optimizer, result):
    if not first_gradient(optimizer).isfinite().all():
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(1e-3)
    return result


FAULTS = {
    "raised": lambda m: wrapped(m, Adam, "direction", after=raising),
    "warned": lambda m: wrapped(m, Adam, "direction", before=lambda _: warnings.warn("planted", stacklevel=1)),
    "nonfinite": lambda m: wrapped(m, Adam, "direction", after=lambda _, d: d / 0),
    "step": lambda m: wrapped(m, Adam, "direction", after=lambda _, d: d * 8),
    "resume": lambda m: wrapped(m, LowRankOptimizer, "load_state_dict", after=perturbed),
    "gradient": lambda m: wrapped(m, LowRankOptimizer, "step", before=lambda o: first_gradient(o).mul_(2)),
    "random": lambda m: wrapped(m, LowRankOptimizer, "step", before=lambda _: torch.rand(1)),
    "skip": lambda m: wrapped(m, LowRankOptimizer, "step", after=moved),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_planted_fault_is_found_by_its_name(kind, monkeypatch):
    FAULTS[kind](monkeypatch)
    with torch.random.fork_rng():
        outcome = examine(CASE)
    assert outcome.kind == kind, outcome
    assert outcome.failed
    assert "step" in outcome.detail


def test_state_that_is_not_finite_is_found(monkeypatch):
    original = Adam.absorb

    def absorb(self, z, state, clock):
        original(self, z, state, clock)
        state["moment.second"].view(-1)[0] = torch.inf  # a direction of 0

    monkeypatch.setattr(Adam, "absorb", absorb)
    assert examine(CASE).kind == "nonfinite"


def test_what_construction_refuses_is_no_failure():
    outcome = examine(Case(0, 0, "adamw", {"residual": Discard()}, CASE.parameters))
    assert (outcome.kind, outcome.failed) == ("refused", False)
    assert "would have nothing to act on" in outcome.detail


def test_a_case_is_a_function_of_its_two_integers():
    for index in range(20):
        one, same = draw(3, index), draw(3, index)
        assert one == same
        for xs, ys in zip(one.gradients(), same.gradients(), strict=True):
            assert all(map(torch.equal, xs, ys))
        pairs = zip(one.model().parameters(), same.model().parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    assert len({str(draw(seed, index)) for seed in (0, 1) for index in range(20)}) == 40


def test_everything_is_drawn_in_the_end():
    """Every recipe, every part but the plainest of a role, and every kind of event."""
    cases = [draw(0, index) for index in range(4000)]
    parts = {role: Counter(type(case.options.get(role)) for case in cases) for role in PARTS}
    left_out = {
        (role, kind.__name__)
        for role, kinds in PARTS.items()
        for kind in kinds.values()
        if not parts[role][kind] and kind.__name__ not in {"Full", "Fixed", "Plain", "Every"}
    }
    # Refused: always, and wherever parts are composed, in frames that are not whole.
    elsewhere = {(role, "InWeights") for role in ("codec", "moments", "bases")}
    assert left_out == {("bases", "RankOne"), ("bases", "TopDirections"), ("rule", "SWAN"), *elsewhere}
    assert {case.recipe for case in cases} == {None, *recipes()}
    assert {p.dtype for case in cases for p in case.parameters} >= {torch.float16, torch.complex128, torch.bfloat16}
    assert {len(p.shape) for case in cases for p in case.parameters} == {1, 2, 3, 4, 5}
    assert min(d for case in cases for p in case.parameters for d in p.shape) == 1
    for event in ("resume", "bad", "heads", "experts", "absorbed"):
        assert len({getattr(case, event) for case in cases}) > 1


def test_chosen_recipes_alone_are_drawn():
    cases = [draw(0, index, ("fira", "soap")) for index in range(40)]
    assert {case.recipe for case in cases} == {"fira", "soap"}
    assert cases[0].command == "python -m comoving.fuzz --seed 0 --case 0 --recipes fira,soap"
    with pytest.raises(ValueError, match="unknown recipe 'firra'"):
        draw(0, 0, ("firra",))


def test_the_command_repeats_a_failure(capsys, monkeypatch):
    with monkeypatch.context() as context:
        FAULTS["nonfinite"](context)
        assert main(["--cases", "6", "--seed", "2", "--recipes", "galore"]) == 1
        lines = capsys.readouterr().out.splitlines()
        failures = [line for line in lines if line.startswith("nonfinite: ")]
        assert failures
        command = failures[0].split(" | ")[1]
        assert command.startswith("python -m comoving.fuzz ")
        assert main(command.split()[3:]) == 1
        assert capsys.readouterr().out.splitlines()[0] == failures[0]
    assert main(command.split()[3:]) == 0
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--cases", "0"], "--cases must be >= 1, got 0"),
        (["--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--recipes", "firra"], "unknown recipe 'firra'"),
    ],
)
def test_command_lines_that_make_no_sense(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_processes_make_no_difference(monkeypatch):
    monkeypatch.setattr("comoving.fuzz.run._CHUNK", 3)
    alone = [(o.kind, o.share) for o in run(5, range(8))]
    assert len(set(alone)) > 3
    assert [(o.kind, o.share) for o in run(5, range(8), jobs=2)] == alone


@pytest.mark.parametrize("start", range(0, 150, 25))
def test_a_small_fixed_run(start):
    """Of every 150 cases more than half are run, and none fails."""
    outcomes = list(run(20, range(start, start + 25)))
    assert not [str(outcome) for outcome in outcomes if outcome.failed]
    assert sum(outcome.kind == "passed" for outcome in outcomes) > 12
