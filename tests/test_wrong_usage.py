"""Usages that are nearly right: each is accepted, or answered by a sentence that says what to do."""

import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import comoving
from comoving import AdamW, LowRankOptimizer, build, param_groups
from comoving.cadence import Cadence, Growing
from comoving.finders import BlockSelection, Exact, Power
from comoving.parts import part
from comoving.precondition import Plain, Precondition
from comoving.rules import Adam, Momentum, Rule
from comoving.transport import Carry, Keep, Rotate, Transport


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 10))


def matrix():
    return nn.Parameter(torch.ones(12, 16))


def used_up():
    generator = net().parameters()
    list(generator)
    return build("galore", generator)


def float8():
    return nn.ParameterDict({"w": nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn))})


ANSWERED = {
    "the model first": (lambda: build(net(), "galore"), TypeError, r"recipe comes first.*build\('galore', model\)"),
    "no recipe": (lambda: build(None, net()), TypeError, "recipe comes first.*NoneType"),
    "a rate for a model": (lambda: build("galore", 1e-3, net()), TypeError, r"takes parameters.*float 0\.001"),
    "a state dict": (lambda: build("galore", net().state_dict()), TypeError, r"a mapping: pass its \.items\(\)"),
    "a dict of parameters": (lambda: LowRankOptimizer(dict(net().named_parameters())), TypeError, r"\.items\(\)"),
    "a module": (lambda: AdamW(net()), TypeError, r"the module Sequential: pass model\.named_parameters\(\)"),
    "text for parameters": (lambda: LowRankOptimizer("weights"), TypeError, "takes parameters.*'weights'"),
    "None for parameters": (lambda: LowRankOptimizer(None), TypeError, "takes parameters.*None"),
    "names alone": (lambda: LowRankOptimizer(["weight"]), TypeError, "takes parameters.*'weight'"),
    "pairs the wrong way": (lambda: LowRankOptimizer([(matrix(), "w")]), TypeError, "pairs, got tuple"),
    "no parameters": (lambda: build("galore", []), ValueError, "no parameters were given"),
    "a generator used up": (used_up, ValueError, "can be used only once"),
    "a model without any": (lambda: build("galore", nn.ReLU()), ValueError, "ReLU has no trainable parameters"),
    "a choice without a model": (lambda: build("galore", [matrix()], dense=["*"]), TypeError, "dense.*pass the model"),
    "groups of parameters": (lambda: param_groups(net().parameters()), TypeError, "takes a module, got generator"),
    "a group without any": (lambda: LowRankOptimizer([{"lr": 0.1}]), TypeError, "under 'params', got {'lr': 0.1}"),
    "galor": (lambda: build("galor", net()), ValueError, r"unknown recipe 'galor' \(did you mean 'galore'\?\); known"),
    "GaLore": (lambda: build("GaLore", net()), ValueError, "did you mean 'galore'"),
    "a keyword of build": (
        lambda: build("galore", net(), refresh_evry=3), TypeError, r"refresh_evry'\] \(did you mean 'refresh_every'\?\)"
    ),
    "rnk": (lambda: build("galore", net(), rnk=4), TypeError, r"\['rnk'\] \(did you mean 'rank'\?\)"),
    "no keyword at all": (lambda: build("galore", net(), xyz=3), TypeError, r"\['xyz'\]; known are .*weight_decay"),
    "a keyword": (lambda: AdamW([matrix()], weight_dekay=0.1), TypeError, "did you mean 'weight_decay'.*known are ams"),
    "a keyword of the engine": (lambda: LowRankOptimizer([matrix()], beta=0.1), TypeError, "did you mean 'betas'"),
    "a keyword of a group": (lambda: LowRankOptimizer([{"params": matrix(), "rnk": 4}]), TypeError, "mean 'rank'"),
    "True for a rank": (lambda: build("galore", net(), rank=True), TypeError, "rank.*True"),
    "several ranks": (lambda: build("galore", net(), rank=np.array([4])), TypeError, r"rank.*array\(\[4\]\)"),
    "numpy's rank of 0": (lambda: build("galore", net(), rank=np.int64(0)), ValueError, "rank.*>= 1, got 0"),
    "numpy's NaN": (lambda: build("galore", net(), np.float64("nan")), ValueError, r"lr.*\[0, inf\).*nan"),
    "a tensor for a rate": (lambda: build("galore", net(), torch.tensor(1e-3)), TypeError, "lr must be a float"),
    "text for a rate": (lambda: build("galore", net(), "1e-3"), TypeError, "lr must be a number, got '1e-3'"),
    "text for betas": (lambda: build("galore", net(), betas="ab"), TypeError, r"betas\[0\].*'a'"),
    "no budget": (lambda: build("galore", net(), budget="lots"), ValueError, "'lots'.*GB.*'25%'"),
    "a budget without a unit": (lambda: build("galore", net(), budget=2.0), ValueError, r"share.*\(0, 1\].*2\.0"),
    "a layout that is none": (lambda: part("frame", "blocks(inner=3)"), TypeError, "inner must be a layout.*got 3"),
    "a finder that is none": (
        lambda: part("finder", "block_selection(inner=3)"), ValueError, "inner must be a finder.*got 3"
    ),
    "stars in text": (
        lambda: part("transport", "rotate(**{'a': 1})"), ValueError, r"as rotate\(field=value\).*fields are statistics"
    ),
    "values without a name": (lambda: part("transport", "rotate('carry')"), ValueError, r"as rotate\(field=value\)"),
    "a part within text": (
        lambda: part("frame", "blocks(inner=modes())"), ValueError, r"text in quotes.*inner='power'.*mode, inner, got"
    ),
    "an open bracket": (
        lambda: part("transport", "keep("), ValueError, r"keep\(field=value\).*it has none, got 'keep\('"
    ),
    "a field": (
        lambda: part("transport", "rotate(statistic='carry')"), TypeError,
        r"rotate has no field 'statistic' \(did you mean 'statistics'\?\); its fields are statistics",
    ),
    "a field of none": (lambda: part("transport", "keep(x=1)"), TypeError, "keep has no field 'x'; it has none"),
    "rotat": (lambda: part("transport", "rotat"), ValueError, r"one of keep, .*'rotat' \(did you mean 'rotate'\?\)"),
    "a field of a dict": (
        lambda: part("transport", {"part": "Rotate", "statistic": "keep"}), TypeError, "did you mean 'statistics'"
    ),
    "a dict without a part": (lambda: part("transport", {"statistics": "keep"}), ValueError, "{'part': name, field"),
    "a part of another role": (lambda: build("galore", net(), transport=Exact()), TypeError, "transport must be a"),
    "a class": (lambda: build("galore", net(), transport=Rotate), TypeError, "transport must be a.*class"),
    "a name for the engine": (lambda: LowRankOptimizer([matrix()], rule="adam"), TypeError, "rule must be a rule part"),
    "int9": (lambda: build("galore", net(), codec="int9"), ValueError, "did you mean 'int8'"),
    "lefty": (lambda: build("galore", net(), side="lefty"), ValueError, "side must be.*did you mean 'left'"),
    "matrx": (lambda: build("galore", net(), view="matrx"), ValueError, "view must be.*did you mean 'matrix'"),
    "skp": (lambda: build("galore", net(), on_nonfinite="skp"), ValueError, "did you mean 'skip'"),
    "half a step": (lambda: build("galore", net(), refresh_every=2.5), TypeError, "refresh_every must be an int"),
    "float8": (lambda: build("galore", float8()), ValueError, "w: torch.float8_e4m3fn has too few bits.*quantize"),
    "integers": (lambda: LowRankOptimizer([torch.zeros(4, 4, dtype=torch.int32)]), ValueError, "int32"),
}  # fmt: skip


@pytest.mark.parametrize("usage", ANSWERED)
def test_it_is_answered(usage):
    call, error, says = ANSWERED[usage]
    with pytest.raises(error, match=says):
        call()


def stepped(optimizer, model):
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


ACCEPTED = {
    "parameters": lambda model: build("galore", model.parameters(), 1e-2, 4),
    "a list": lambda model: build("galore", [*model.parameters()], 1e-2, 4),
    "names": lambda model: build("galore", model.named_parameters(), 1e-2, 4),
    "groups": lambda model: build("galore", [{"params": m.parameters(), "rank": 4} for m in model], 1e-2),
    "groups of the module": lambda model: build("galore", param_groups(model, rank=4), 1e-2),
    "numpy's numbers": lambda model: build("galore", model, np.float64(1e-2), np.int64(4), refresh_every=np.int32(200)),
    "arrays": lambda model: build("galore", model, np.array(1e-2), np.array(4), eps=np.float64(1e-8)),
    "numpy's in parts": lambda model: build("galore", model, 1e-2, 4, transport=Carry(), finder=Exact(np.float64(0))),
    "numpy's in groups": lambda model: LowRankOptimizer(
        [{"params": m.parameters(), "lr": np.float32(1e-2), "rank": np.int8(4), "betas": (np.float16(0.9), 0.999)}
         for m in model]
    ),
    "one pattern": lambda model: build("galore", model, 1e-2, 4, dense="1.*"),
    "lists": lambda model: build("galore", model, 1e-2, 4, betas=[0.9, 0.999]),
}  # fmt: skip


@pytest.mark.parametrize("usage", ACCEPTED)
def test_it_is_accepted(usage):
    """It steps, and what it saves is plain data, which loads without trust."""
    model = net()
    optimizer = ACCEPTED[usage](model)
    stepped(optimizer, model)
    assert optimizer.sites[model[0].weight].ranks in {(4, None), (None, 4)}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = net()
    again.load_state_dict(model.state_dict())
    resumed = ACCEPTED[usage](again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(x, y) for x, y in zip(stepped(optimizer, model), stepped(resumed, again), strict=True))


def test_numbers_of_numpy_mean_the_same():
    plain, numpys = net(), net()
    one = build("tucker-adam", plain, 1e-2, 4, refresh_every=2, weight_decay=0.1, budget=10_000, seed=3)
    two = build(
        "tucker-adam", numpys, np.float64(1e-2), np.int16(4), refresh_every=np.uint8(2), weight_decay=np.array(0.1),
        budget=np.int64(10_000), seed=np.int64(3),
    )  # fmt: skip
    for _ in range(3):
        pairs = zip(stepped(one, plain), stepped(two, numpys), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


def test_parts_may_be_plain_data():
    finder = part("finder", {"part": "BlockSelection", "inner": {"part": "power", "inertia": 0.5}})
    assert finder == BlockSelection(Power(inertia=0.5))
    assert part("transport", comoving.checkpoint.describe(Rotate(statistics="keep"))) == Rotate(statistics="keep")


# ------------------------------------------------------------------------------------------------- after construction


def trained(**options):
    model = net()
    optimizer = build("tucker-adam", model, 1e-2, 4, **options)
    stepped(optimizer, model)
    return model, optimizer


def picture(model, optimizer):
    return copy.deepcopy([*model.parameters(), {n: s for n, s in enumerate(optimizer.state.values())}])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True)) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(b[-1][i][n])) for i, s in a[-1].items() for n, x in s.items()
    )


@pytest.mark.parametrize("cast", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_a_model_that_was_cast_after_construction_is_noticed_before_anything_changes(cast):
    model, optimizer = trained()
    cast(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = picture(model, optimizer)
    calls = [optimizer.step, lambda: optimizer.absorb(model[0].weight, model[0].weight.grad)]
    for call in calls:
        with pytest.raises(ValueError, match=r"0.weight is torch.\w+ .*was torch.float32 .*call model.to\(dtype\)"):
            call()
        assert same(picture(model, optimizer), before)
    model.float()
    model.zero_grad()
    stepped(optimizer, model)


def test_what_is_edited_is_checked():
    model, optimizer = trained()
    before = picture(model, optimizer)
    for key, value, error in (
        ("lr", "fast", TypeError), ("lr", torch.tensor(0.1), TypeError), ("lr", -1.0, ValueError),
        ("betas", (0.9, 1.5), ValueError), ("scale", "x", ValueError), ("refresh_every", 0, ValueError),
    ):  # fmt: skip
        kept, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
        with pytest.raises(error, match=key.removesuffix("s")):
            optimizer.step()
        optimizer.param_groups[0][key] = kept
        assert same(picture(model, optimizer), before)
    optimizer.step()


def test_gradients_and_parameters_of_others():
    model, optimizer = trained()
    p = model[0].weight
    for gradient in (torch.ones(3), torch.ones(12, 20, dtype=torch.float64), torch.ones(12, 20).to_sparse()):
        with pytest.raises(ValueError, match=r"gradient of 0.weight must be dense, torch.float32 and of shape"):
            optimizer.absorb(p, gradient)
    for call in (lambda: optimizer.absorb(matrix(), torch.ones(12, 16)), lambda: optimizer.apply(matrix())):
        with pytest.raises(ValueError, match=r"a parameter of shape \(12, 16\) is none of this optimizer's"):
            call()


@pytest.mark.parametrize("given", [{}, {"0.weight": 1}, {"state": {}}, 3, None], ids=str)
def test_what_is_no_optimizers_state(given):
    _, optimizer = trained()
    with pytest.raises(ValueError, match="has 'state' and 'param_groups', got"):
        optimizer.load_state_dict(given)


def test_the_coupled_decay_of_torchs_adam_is_not_taken_for_ours():
    model = net()
    saved = {}
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        for decay in (0.0, 0.1):
            other = kind(model.parameters(), weight_decay=decay)
            stepped(other, model)
            saved[kind, decay] = other.state_dict()
    refused = saved.pop((torch.optim.Adam, 0.1))
    optimizer = LowRankOptimizer(model.parameters(), 1e-2, 4)
    with pytest.raises(ValueError, match=r"torch.optim.Adam with weight_decay=0.1.*adds to the gradient.*decoupled"):
        optimizer.load_state_dict(refused)
    for (_, decay), state in saved.items():
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["weight_decay"] == decay
    refused["param_groups"][0]["decoupled_weight_decay"] = True
    optimizer.load_state_dict(refused)


def test_what_may_be_edited_is_saved_and_loaded():
    model, optimizer = trained(refresh_every=4)
    edited = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.3, "refresh_every": 2, "scale": 0.7}
    before = {key: optimizer.param_groups[0][key] for key in edited}
    assert all(before[key] != value for key, value in edited.items())
    optimizer.param_groups[0] |= edited
    stepped(optimizer, model)
    twin = net()
    twin.load_state_dict(model.state_dict())
    resumed = build("tucker-adam", twin, 1e-2, 4, refresh_every=4)
    resumed.load_state_dict(optimizer.state_dict())
    assert {key: resumed.param_groups[0][key] for key in edited} == edited
    for _ in range(4):
        assert all(torch.equal(x, y) for x, y in zip(stepped(optimizer, model), stepped(resumed, twin), strict=True))


def traits(protocol):
    """What a role's protocol asks for beside methods and the momentum's name: true or false."""
    properties = [name for name, member in vars(protocol).items() if isinstance(member, property)]
    return [*protocol.__annotations__, *(name for name in properties if name != "momentum")]


ROLES = {
    "rule": (Rule, Momentum()), "transport": (Transport, Keep()), "precondition": (Precondition, Plain()),
    "cadence": (Cadence, Growing()),
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "trait"), [(role, trait) for role, (protocol, _) in ROLES.items() for trait in traits(protocol)]
)
def test_a_part_that_states_a_trait_too_few_is_refused_by_its_name(role, trait):
    """A part of the user's own needs no base class; with all of its traits it is stepped."""
    protocol, known = ROLES[role]
    methods = [name for name, member in vars(protocol).items() if callable(member) and not name.startswith("_")]
    own = SimpleNamespace(**{name: getattr(known, name) for name in (*methods, *traits(protocol))})
    if role == "rule":
        own.momentum = known.momentum
    p = matrix()
    optimizer = LowRankOptimizer([p], rank=3, refresh_every=1, **{role: own})
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    delattr(own, trait)
    with pytest.raises(TypeError, match=rf"{role} namespace\(.*\) states no '{trait}'"):
        LowRankOptimizer([matrix()], rank=3, **{role: own})


class Renamed(Adam):
    """Adam whose slots have names of its own."""

    momentum = "own.first"

    def slots(self, shape):
        first, second = super().slots(shape)
        return replace(first, name="own.first"), replace(second, name="own.second", mean="own.first")

    def absorb(self, z, state, clock):
        inner = {"moment.first": state["own.first"], "moment.second": state["own.second"]}
        super().absorb(z, inner, clock)
        state["own.first"], state["own.second"] = inner["moment.first"], inner["moment.second"]

    def direction(self, state, clock, eps):
        inner = {"moment.first": state["own.first"], "moment.second": state["own.second"]}
        if "own.second.mass" in state:
            inner["moment.second.mass"] = state["own.second.mass"]
        return super().direction(inner, clock, eps)


@pytest.mark.parametrize("transport", [Rotate(), Carry()], ids=str)
@pytest.mark.parametrize("rule", [Renamed(), Adam(), Momentum()], ids=lambda r: type(r).__name__)
def test_compiled_steps_have_the_rules_own_slots_whatever_their_names(rule, transport):
    weights = []
    for compiled in (False, True):
        p = matrix()
        optimizer = LowRankOptimizer([p], 1e-2, 4, rule=rule, transport=transport)
        if compiled:
            optimizer.compile(backend="eager")
        for t in range(4):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights)
