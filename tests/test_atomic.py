"""A step that raises leaves each parameter as it was or as it should be, and the next one goes on where it stopped."""

import copy

import pytest
import torch
from torch import nn

import comoving
from comoving import LowRankOptimizer
from comoving.cadence import Growing
from comoving.codecs import Full, Int8
from comoving.finders import BlockSelection, Exact, IncrementalSVD, Power, StreamingTucker
from comoving.frames import Blocks, SparseModes
from comoving.precondition import Factored, Kronecker
from comoving.ranks import Tolerance
from comoving.residual import Discard, Feedback, MomentumBuffer, Sparse
from comoving.rules import SOAP, Adam, Shampoo
from comoving.transport import Carry, Keep, Reset
from comoving.weights import quantize
from comoving.weights.deferring import DeferringLinear

PLACES = [
    ("finder", "find"), ("finder", "observe"), ("precondition", "apply"), ("transport", "move"), ("transport", "age"),
    ("rule", "absorb"), ("rule", "direction"), ("residual", "restore"), ("residual", "keep"), ("residual", "write"),
    ("codec", "encode"), ("moments", "encode"), ("bases", "encode"),
]  # fmt: skip


class Planted(Exception):
    """Raised on purpose."""


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(randn((10, 14), 0))
        self.tensor = nn.Parameter(randn((6, 7, 8), 1))
        self.brief = nn.Parameter(randn((12, 9), 2).bfloat16())
        self.bias = nn.Parameter(randn((5,), 3))


def give(model, t):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(p.shape, 10 * t + i, torch.float32 if not p.is_complex() else p.dtype).to(p.dtype)


def picture(model, optimizer):
    """Name -> weights and every slot of the state, copied."""
    found = {}
    for name, p in model.named_parameters():
        slots = optimizer.state.get(p, {})
        found[name] = {"weights": p.detach().clone()} | {
            n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in slots.items()
        }
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[n].dtype and torch.equal(x, b[n]) if isinstance(x, torch.Tensor) else x == b[n]
        for n, x in a.items()
    )


def counted(monkeypatch, optimizer, role, method, at=None):
    """Count the calls of a part's method, or raise at one of them, before it does its work."""
    calls = [0]
    for kind in {type(group[role]) for group in optimizer.param_groups}:
        original = getattr(kind, method)

        def called(self, *args, original=original):
            calls[0] += 1
            if calls[0] == at:
                raise Planted
            return original(self, *args)

        monkeypatch.setattr(kind, method, called)
    return calls


def check(monkeypatch, build, warm):
    """At every place, its first call and its last one: nothing is half done, and a retry makes up for it bitwise."""
    model, optimizer = build()
    for t in range(warm):
        give(model, t)
        optimizer.step()
    raised = 0
    in_place = any(group["rule"].total for group in optimizer.param_groups)
    cannot_fail = (
        {("rule", "direction"), ("residual", "write")} if in_place else set()
    )  # after what a rule did in place
    reference, stepped = copy.deepcopy((model, optimizer))
    give(reference, warm)
    with monkeypatch.context() as patch:
        calls = {place: counted(patch, stepped, *place) for place in PLACES if place not in cannot_fail}
        stepped.step()
    before, after = picture(model, optimizer), picture(reference, stepped)
    for (role, method), (count,) in calls.items():
        for at in sorted({1, count}) if count else []:
            tried, again = copy.deepcopy((model, optimizer))
            give(tried, warm)
            with monkeypatch.context() as patch:
                counted(patch, again, role, method, at)
                with pytest.raises(Planted):
                    again.step()
            now = picture(tried, again)
            for name, found in now.items():
                assert equal(found, before[name]) or equal(found, after[name]), (role, method, at, name)
            assert not all(equal(found, after[name]) for name, found in now.items())
            again.step()
            assert all(equal(found, after[name]) for name, found in picture(tried, again).items()), (role, method, at)
            raised += 1
    return raised


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("recipe", [name for name in comoving.recipes() if name != "adamw"])
def test_a_step_that_raises_is_made_up_for(monkeypatch, recipe, warm):
    """With one parameter due for a refresh and others not."""
    options = {} if comoving.recipes()[recipe].full_rank else {"refresh_every": 2}

    def build():
        model = Model()
        return model, comoving.build(recipe, model, 1e-2, **options)

    assert check(monkeypatch, build, warm) >= 1


class InPlace(Exact):
    """A finder of the user's own that changes its memory in place."""

    batched = False

    def schema(self, shape, ranks, dtype):
        return {"seen": comoving.codecs.Spec(shape, dtype)}

    def observe(self, gradient, memory, rows=0):
        memory["seen"].add_(gradient)

    def find(self, operand, start, warm, memory):
        memory["seen"].mul_(0.5)
        return super().find(operand, start, warm, memory)


class Own(Adam):
    """A rule of the user's own that changes its slots in place."""

    replaces = timeless = total = False

    def absorb(self, z, state, clock):
        state["moment.first"].lerp_(z, 1 - clock.beta1)
        state["moment.second"].mul_(clock.beta2).addcmul_(z, z.conj(), value=1 - clock.beta2)


COMPOSED = {
    "full feedback": {"finder": Power(inertia=0.9), "residual": Feedback(), "codec": Full()},
    "eager feedback": {"residual": Feedback(lazy=False, decay=0.9, window=3, momentum=False), "codec": Int8()},
    "dion's buffer": {"residual": MomentumBuffer(), "codec": Full()},
    "sparse": {"residual": Sparse(first=False, choose="random", statistics="reset", rule=Own())},
    "carry": {"transport": Carry(), "rule": SOAP(every=2), "finder": StreamingTucker()},
    "reset": {"transport": Reset(), "rule": Shampoo(every=2), "finder": IncrementalSVD()},
    "factored": {"precondition": Factored(), "moments": Int8(rounding="stochastic"), "transport": Keep()},
    "kronecker": {"precondition": Kronecker(every=2), "bases": Int8(rounding="stochastic")},
    "own parts": {"finder": InPlace(), "rule": Own(), "residual": Feedback()},
    "whole, own": {"rank": 1.0, "rule": Own(), "precondition": Factored()},
    "adaptive": {"ranks": Tolerance(step=1), "transport": Carry(), "codec": Int8(), "residual": Feedback()},
    "sparse core": {"frame": SparseModes(), "finder": BlockSelection(), "cadence": Growing(base=2.0)},
    "rounded": {"rounding": "stochastic", "residual": Discard()},
}


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("case", COMPOSED)
def test_other_compositions(monkeypatch, case, warm):
    options = {"rank": 0.3, "refresh_every": 2, **COMPOSED[case]}

    def build():
        model = Model()
        return model, LowRankOptimizer(model.named_parameters(), 1e-2, select="shape", **options)

    assert check(monkeypatch, build, warm) >= 5


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("warm", [0, 3])
def test_under_both_policies_for_gradients_that_are_not_finite(monkeypatch, warm, policy):
    def build():
        model = Model()
        return model, comoving.build("tucker-adam", model, 1e-2, on_nonfinite=policy, refresh_every=2)

    assert check(monkeypatch, build, warm) >= 5


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        shape = (8, 4, 10) if transposed else (10, 4, 8)
        experts = randn(shape, 0)
        self.experts = nn.Parameter(experts.transpose(0, 2) if transposed else experts)
        self.more = nn.Parameter(randn((9, 2, 7), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_experts_that_were_stepped_are_not_stepped_again(monkeypatch, together, transposed, dtype):
    """Where weights are written one by one; where they are written at once, all or none."""

    def build():
        model = Experts(transposed).to(dtype)
        options = {"residual": Feedback(), "codec": Full(), "finder": Power(inertia=0.9), "refresh_every": 2}
        optimizer = LowRankOptimizer(model.named_parameters(), 1e-2, 3, frame=Blocks(1), select="shape", **options)
        optimizer.stacked_entries *= together
        return model, optimizer

    for warm in (0, 3):
        stacked = together and warm > 0
        model, optimizer = build()
        for t in range(warm):
            give(model, t)
            optimizer.step()
        reference, stepped = copy.deepcopy((model, optimizer))
        give(reference, warm)
        reference.experts.grad[:, 1] = 0
        stepped.step()
        after = picture(reference, stepped)
        for method in ("absorb", "direction"):
            for at in range(1, 2 if stacked else 4):
                tried, again = copy.deepcopy((model, optimizer))
                give(tried, warm)
                tried.experts.grad[:, 1] = 0
                with monkeypatch.context() as patch:
                    counted(patch, again, "rule", method, at)
                    with pytest.raises(Planted):
                        again.step()
                state = again.state.get(tried.experts, {})
                blocks = [name for name, x in state.items() if name.endswith(".tick") and x > warm]
                assert len(blocks) == (0 if dtype is torch.bfloat16 else at - 1)
                again.step()
                assert all(equal(found, after[name]) for name, found in picture(tried, again).items())
    give(model, 9)
    optimizer.step()  # other gradients: everything is stepped
    assert all(int(x) == 4 for name, x in optimizer.state[model.experts].items() if name.endswith(".step"))


def test_other_gradients_are_no_second_try(monkeypatch):
    model = Model()
    optimizer = comoving.build("tucker-adam", model, 1e-2, refresh_every=1)
    steps = [0] * 3

    def stepped():
        return [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in list(model.parameters())[:3]]

    for anew in ("new tensors", "written to"):
        give(model, 0)
        with monkeypatch.context() as patch, pytest.raises(Planted) as caught:
            counted(patch, optimizer, "finder", "find", 2)
            optimizer.step()
        assert "1 parameters had been stepped before this was raised" in caught.value.__notes__[0]
        steps = [steps[0] + 1, *steps[1:]]
        assert stepped() == steps
        if anew == "new tensors":
            give(model, 1)
        else:
            for p in model.parameters():
                p.grad.mul_(2.0)
        optimizer.step()
        steps = [n + 1 for n in steps]
        assert stepped() == steps
        optimizer.step()  # a step that did not fail is forgotten
        steps = [n + 1 for n in steps]
        assert stepped() == steps


@pytest.mark.parametrize("then", ["none", "sparse"])
def test_other_kinds_of_gradients_are_no_second_try(monkeypatch, then):
    """None for what was stepped, as after zero_grad() where the next batch does not reach it; or a sparse one."""
    model = Model()
    optimizer = comoving.build("tucker-adam", model, 1e-2)
    give(model, 0)
    with monkeypatch.context() as patch, pytest.raises(Planted):
        counted(patch, optimizer, "finder", "find", 2)
        optimizer.step()
    before = picture(model, optimizer)
    give(model, 1)
    model.wide.grad = None
    if then == "sparse":
        model.wide.grad = randn((10, 14), 1).to_sparse()
        with pytest.raises(RuntimeError, match="wide has a torch.sparse_coo gradient"):
            optimizer.step()
        assert all(equal(found, before[name]) for name, found in picture(model, optimizer).items())
        return
    optimizer.step()
    after = picture(model, optimizer)
    assert equal(after["wide"], before["wide"])
    assert all(int(optimizer.state[p]["step"]) == 1 for p in model.parameters())


@pytest.mark.parametrize("codec", [Full(), Int8()], ids=str)
@pytest.mark.parametrize("place", [p for p in PLACES if p[1] in {"find", "observe", "restore", "keep", "apply"}])
def test_absorbing_that_raises_takes_nothing_in(monkeypatch, place, codec):
    """A frame that cannot be found leaves the feedback as it was: tried again, the gradient counts once."""

    def build():
        p, parts = nn.Parameter(randn((10, 14), 0)), {"precondition": Factored(), "residual": Feedback()}
        return p, LowRankOptimizer([("p", p)], 1e-2, 3, codec=codec, finder=Power(inertia=0.9), **parts)

    (p, optimizer), (q, whole) = build(), build()
    for t in range(6):
        with monkeypatch.context() as patch:
            before = copy.deepcopy(dict(optimizer.state.get(p, {})))
            calls = counted(patch, optimizer, *place, 1)
            try:
                optimizer.absorb(p, randn(p.shape, t))
            except Planted:
                assert equal(optimizer.state.get(p, {}), before)
                optimizer.absorb(p, randn(p.shape, t))
            assert t % 2 or calls[0] == 2  # frames are found at the first of two gradients
        whole.absorb(q, randn(p.shape, t))
        assert equal(optimizer.state[p], whole.state[q])
        if t % 2:
            optimizer.apply(p)
            whole.apply(q)
    assert torch.equal(p, q)


def test_nothing_can_be_applied_that_was_not_absorbed():
    model = Model()
    optimizer = comoving.build("tucker-adam", model, 1e-2)
    for _ in range(2):
        before = picture(model, optimizer)
        with pytest.raises(RuntimeError, match=r"wide has no gradient to apply: call absorb\(\) first"):
            optimizer.apply(model.wide)
        with pytest.raises(RuntimeError, match=r"bias is stepped by torch's AdamW: only step\(\) serves it"):
            optimizer.apply(model.bias)
        assert all(equal(found, before[name]) for name, found in picture(model, optimizer).items())
        give(model, 0)
        optimizer.step()
    experts = nn.Parameter(randn((3, 10, 14), 0))
    optimizer = LowRankOptimizer([experts], 1e-2, 3, frame=Blocks())
    optimizer.absorb(experts, torch.zeros_like(experts))
    optimizer.apply(experts)  # no expert saw a token
    assert not optimizer.state[experts]


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("place", [("rule", "direction"), ("rule", "absorb"), ("residual", "write")], ids="/".join)
def test_a_window_that_raises_at_its_end_is_closed_by_another_step(monkeypatch, place, clip):
    """Gradients that were clipped by the norm of all are not clipped by that of those that are left."""

    def build():
        model = Model()
        optimizer = comoving.build("comoving-adamw", model, 1e-2)
        optimizer.step_in_backward(accumulate=2, clip=clip)
        return model, optimizer

    def backward(model, t):
        sum((p.float() * randn(p.shape, 10 * t + i)).sum() for i, p in enumerate(model.parameters())).backward()

    (model, optimizer), (twin, whole) = build(), build()
    for t in range(3):
        backward(model, t)
        backward(twin, t)
        whole.step()
        with monkeypatch.context() as patch:
            counted(patch, optimizer, *place, 2)
            with pytest.raises(Planted):
                optimizer.step()
        optimizer.step()
        mine, other = picture(model, optimizer), picture(twin, whole)
        assert all(equal(found, other[name]) for name, found in mine.items())
        assert optimizer.gradient_norm == whole.gradient_norm


@pytest.mark.parametrize("place", [("residual", "keep"), ("rule", "direction")], ids="/".join)
def test_a_gradient_set_by_hand_counts_once_however_often_its_step_is_tried(monkeypatch, place):
    (model, optimizer), (twin, whole) = pairs = [
        (m, comoving.build("comoving-adamw", m, 1e-2)) for m in (Model(), Model())
    ]
    for m, o in pairs:
        o.step_in_backward()
        give(m, 0)
    whole.step()
    with monkeypatch.context() as patch:
        counted(patch, optimizer, *place, 2)
        with pytest.raises(Planted):
            optimizer.step()
    optimizer.step()
    mine, other = picture(model, optimizer), picture(twin, whole)
    assert all(equal(found, other[name]) for name, found in mine.items())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_quantized_weights_are_merged_or_not(monkeypatch, at):
    """At a refresh, where codes are written several times."""
    model = nn.Sequential(nn.Linear(16, 12, bias=False))
    quantize(model, comoving.codecs.Int4(), compensate=2)
    optimizer, codes = comoving.build("loqt", model, 1e-2, refresh_every=2), model[0]
    original, merges = DeferringLinear.encode, []
    for t in range(6):
        optimizer.zero_grad()
        model(randn((8, 16), t)).square().sum().backward()
        before, calls = [x.clone() for x in codes.numbers()], []

        def encode(self, x, calls=calls):
            calls.append(0)
            if len(calls) == at:
                raise Planted
            return original(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(DeferringLinear, "encode", encode)
            try:
                optimizer.step()
            except Planted:
                merges.append(t)
                assert all(torch.equal(x, y) for x, y in zip(codes.numbers(), before, strict=True))
                optimizer.step()
        assert int(optimizer.state[next(iter(optimizer.state))]["tick"]) == t + 1
    assert len(merges) >= 2
