"""Extraction: identity, the steps against a float64 reference, the optimizer's state, resuming, and what is refused."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import comoving
from comoving.directions import extract, prepare
from directions.networks import backward, batch, network, train

TARGETS = "attn.qkv,mlp.fc1"
RANK = 3

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "ours": lambda p: comoving.AdamW(p, lr=1e-2, rank=1.0),
    "ours, amsgrad": lambda p: comoving.AdamW(p, lr=1e-2, rank=1.0, amsgrad=True),
}
FIRST, SECOND = (
    ("exp_avg", "momentum_buffer", "moment.first"),
    ("exp_avg_sq", "max_exp_avg_sq", "moment.second", "moment.second.max"),
)


def warmed(optimizer="adamw", steps=4, **options):
    model = network(**options)
    built = OPTIMIZERS[optimizer](model.parameters())
    return train(model, built, steps), built


def output(model, number=77):
    with torch.no_grad():
        return model(batch(number, dtype=next(model.parameters()).dtype)[0])


def inside(x, u, v):
    return u.double().T @ x.detach().double() @ v.double()


SOURCES = ("weight", "change", "momentum", "random")


# ------------------------------------------------------------------------------------------------ what is not changed


@pytest.mark.parametrize(
    ("source", "optimizer"),
    [(s, o) for s in SOURCES for o in OPTIMIZERS if (s, o) != ("momentum", "plain sgd")],  # which has none
)
def test_extraction_and_folding_leave_everything_as_it_was(source, optimizer):
    first = network().state_dict()
    model, built = warmed(optimizer)
    before, weights = output(model), {n: p for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in weights.items()}
    moments = {n: copy.deepcopy(built.state.get(p, {})) for n, p in weights.items()}
    groups, stateful = len(built.param_groups), len(built.state)
    initial = first if source == "change" else None
    extraction = extract(model, TARGETS, built, rank=RANK, source=source, initial=initial)
    torch.testing.assert_close(output(model), before, atol=1e-5, rtol=0)
    assert len(built.param_groups) == groups + 1
    for name in extraction.layers:
        u, v = extraction.directions(name)
        assert extraction.rest(name) is weights[f"{name}.weight"]
        assert inside(extraction.rest(name), u, v).abs().max() < 1e-6
        assert u.shape[1] == v.shape[1] == RANK and extraction.core(name).shape == (RANK, RANK)
    extraction.fold()
    assert [n for n, _ in model.named_parameters()] == list(weights)
    assert len(built.param_groups) == groups and len(built.state) == stateful
    for name, p in model.named_parameters():
        assert p is weights[name] and p.requires_grad
        torch.testing.assert_close(p.detach(), values[name], atol=1e-6, rtol=0)
        for key, value in moments[name].items():
            if value is not None:
                torch.testing.assert_close(built.state[p][key], value, atol=1e-7, rtol=1e-5)
    assert type(model[0].mlp["fc1"]) is nn.Linear
    train(model, built, 2)  # no hooks, no lost groups
    with pytest.raises(RuntimeError, match="folded already"):
        extraction.fold()
    with pytest.raises(RuntimeError, match="folded already"):
        extraction.directions(extraction.layers[0])


def test_the_directions_are_those_of_the_source():
    first = network().state_dict()
    model, optimizer = warmed()
    name = "0.mlp.fc1"
    weight = model.get_submodule(name).weight
    sources = {
        "weight": weight.detach().clone(),
        "change": weight.detach() - first[f"{name}.weight"],
        "momentum": optimizer.state[weight]["exp_avg"].clone(),
    }
    for source, matrix in sources.items():
        extraction = extract(
            model, name, optimizer, rank=RANK, source=source, initial=first if source == "change" else None
        )
        u, v = extraction.directions(name)
        exact_u, _, exact_vh = torch.linalg.svd(matrix.double())
        for found, exact in ((u, exact_u[:, :RANK]), (v, exact_vh[:RANK].T)):
            torch.testing.assert_close(found.double() @ found.double().T, exact @ exact.T, atol=1e-4, rtol=0)
        extraction.fold()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)
        extraction = extract(model, name, optimizer, rank=RANK, source="random", seed=seed)
        drawn.append(extraction.directions(name)[0].clone())
        extraction.fold()
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad", "sgd", "ours", "ours, amsgrad"])
def test_the_state_is_carried(optimizer):
    model, built = warmed(optimizer)
    name = "1.attn.qkv"
    weight = model.get_submodule(name).weight
    old = copy.deepcopy(built.state[weight])
    extraction = extract(model, name, built, rank=RANK)
    u, v = (x.double() for x in extraction.directions(name))
    own, rest = built.state[extraction.core(name)], built.state[weight]
    assert own.keys() == rest.keys() == old.keys()
    for key, value in old.items():
        if key in FIRST:
            core = torch.einsum("ij,ia,jb->ab", value.double(), u, v)
            lifted = torch.einsum("ab,ia,jb->ij", core, u, v)
            torch.testing.assert_close(own[key].double(), core, atol=1e-8, rtol=1e-4)
            torch.testing.assert_close(rest[key].double(), value.double() - lifted, atol=1e-8, rtol=1e-4)
        elif key in SECOND:
            core = torch.einsum("ij,ia,jb->ab", value.double(), u**2, v**2)
            torch.testing.assert_close(own[key].double(), core, atol=1e-10, rtol=1e-4)
            assert torch.equal(rest[key], value) and (own[key] > 0).all()
        else:
            assert key == "step" and own[key] == rest[key] == value and own[key] is not rest[key]
    backward(model)
    built.step()
    if "step" in old:
        assert own["step"] == rest["step"] == old["step"] + 1


def test_groups_of_the_optimizer():
    model = network()
    layers = [p for n, p in model.named_parameters() if n.startswith("0.")]
    others = [p for n, p in model.named_parameters() if not n.startswith("0.")]
    optimizer = torch.optim.AdamW(
        [{"params": layers, "lr": 1e-3}, {"params": others, "lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.9)}]
    )
    extraction = extract(model, TARGETS, optimizer, rank=RANK, boost=7.0)
    assert [len(g["params"]) for g in optimizer.param_groups[2:]] == [2, 2]
    a, b = optimizer.param_groups[2:]
    assert a["params"][0] is extraction.core("0.attn.qkv") and b["params"][1] is extraction.core("1.mlp.fc1")
    assert (a["lr"], b["lr"]) == (pytest.approx(7e-3), pytest.approx(7e-2))
    assert (b["weight_decay"], b["betas"]) == (0.3, (0.8, 0.9)) and a["weight_decay"] == 1e-2
    assert "initial_lr" not in a
    extraction.fold()
    extract(model, TARGETS, optimizer, rank=RANK, weight_decay=0.0)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-2, 0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    "build",
    [
        lambda model: torch.optim.AdamW(model.named_parameters(), lr=1e-2),
        lambda model: comoving.AdamW(model.named_parameters(), lr=1e-2, rank=1.0),
        lambda model: comoving.build("adamw", model, lr=1e-2),
    ],
)
def test_names_of_parameters(build):
    model = network()
    optimizer = build(model)
    train(model, optimizer, 1)
    extraction = extract(model, "mlp.fc1", optimizer, rank=RANK)
    name = "0.mlp.fc1.parametrizations.weight.0.C"
    assert optimizer.param_groups[-1]["param_names"][0] == name
    assert dict(model.named_parameters())[name] is extraction.core("0.mlp.fc1")
    train(model, optimizer, 1)
    extraction.fold()
    train(model, optimizer, 1)


# ---------------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("source", ["weight", "random"])
def test_steps_of_adamw_against_a_reference(source):
    """R and C stepped by formulas, in float64, from gradients of the effective weight by finite algebra alone."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 5, bias=False).double()
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.8, 0.95), weight_decay=0.1)
    inputs = torch.randn(10, 9, 6, generator=generator, dtype=torch.float64)
    wanted = torch.randn(10, 9, 5, generator=generator, dtype=torch.float64)

    def gradient(weight, number):  # of mean (x W^T - y)^2
        x, y = inputs[number], wanted[number]
        return 2 / y.numel() * (x @ weight.T - y).T @ x

    def step(number):
        optimizer.zero_grad()
        (model(inputs[number]) - wanted[number]).square().mean().backward()
        optimizer.step()

    for number in range(4):
        step(number)
    weight = layer.weight.detach().clone()
    state = optimizer.state[layer.weight]
    m, v, t = state["exp_avg"].clone(), state["exp_avg_sq"].clone(), 4
    extraction = extract(model, "0", optimizer, rank=2, source=source, boost=5.0, weight_decay=0.05)
    left, right = (x.clone() for x in extraction.directions("0"))
    p, q = left @ left.T, right @ right.T
    core, rest = left.T @ weight @ right, weight - p @ weight @ q
    m_core, v_core = left.T @ m @ right, left.square().T @ v @ right.square()
    m_rest, v_rest = m - p @ m @ q, v
    for number in range(4, 10):
        g = gradient(rest + left @ core @ right.T, number)
        inner, outer = left.T @ g @ right, g - p @ g @ q
        t += 1
        m_core, v_core = 0.8 * m_core + 0.2 * inner, 0.95 * v_core + 0.05 * inner**2
        m_rest, v_rest = 0.8 * m_rest + 0.2 * outer, 0.95 * v_rest + 0.05 * outer**2
        c1, c2 = 1 - 0.8**t, 1 - 0.95**t
        core = core * (1 - 0.1 * 0.05) - 0.1 * (m_core / c1) / ((v_core / c2).sqrt() + 1e-8)
        rest = rest * (1 - 0.02 * 0.1) - 0.02 * (m_rest / c1) / ((v_rest / c2).sqrt() + 1e-8)
        rest = rest - p @ rest @ q
        step(number)
        torch.testing.assert_close(extraction.core("0").detach(), core, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(extraction.rest("0").detach(), rest, atol=1e-12, rtol=1e-10)
        energy = float(inner.square().sum() / g.square().sum())
        assert float(extraction.energy()["0"]) == pytest.approx(energy, rel=1e-10)
    extraction.fold()
    torch.testing.assert_close(layer.weight.detach(), rest + left @ core @ right.T, atol=1e-12, rtol=1e-10)
    folded = optimizer.state[layer.weight]
    torch.testing.assert_close(folded["exp_avg"], m_rest + left @ m_core @ right.T, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(folded["exp_avg_sq"], v_rest, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_rest_never_moves_inside_the_subspace(optimizer):
    model, built = warmed(optimizer)
    extraction = extract(model, TARGETS, built, rank=RANK)
    assert extraction.energy() == {}
    for number in range(6):
        before = {n: extraction.rest(n).detach().clone() for n in extraction.layers}
        cores = {n: extraction.core(n).detach().clone() for n in extraction.layers}
        train(model, built, 1, number)
        for name in extraction.layers:
            u, v = extraction.directions(name)
            moved = extraction.rest(name).detach() - before[name]
            assert moved.norm() > 1e-5 and inside(moved, u, v).abs().max() < 1e-6
            assert inside(extraction.rest(name), u, v).abs().max() < 1e-6
            assert not torch.equal(extraction.core(name), cores[name])
            assert 0 < float(extraction.energy()[name]) <= 1


def test_the_gradients_are_those_of_the_effective_weight():
    model, optimizer = warmed()
    twin = copy.deepcopy(model)
    extraction = extract(model, "mlp.fc1", optimizer, rank=RANK)
    backward(model)
    backward(twin)
    g = twin[0].mlp["fc1"].weight.grad
    u, v = extraction.directions("0.mlp.fc1")
    torch.testing.assert_close(extraction.core("0.mlp.fc1").grad, u.T @ g @ v, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(extraction.rest("0.mlp.fc1").grad, g, atol=1e-6, rtol=1e-4)
    optimizer.step()
    energy = (u.T @ g @ v).square().sum() / g.square().sum()
    torch.testing.assert_close(extraction.energy()["0.mlp.fc1"], energy, atol=1e-6, rtol=1e-4)


def test_a_closure_gives_the_same_steps():
    results = []
    for closed in (False, True):
        model, optimizer = warmed()
        extract(model, TARGETS, optimizer, rank=RANK)
        for number in range(3):
            if closed:
                optimizer.step(lambda model=model, number=number: backward(model, number))
            else:
                train(model, optimizer, 1, number)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "ours"])
def test_branches_only(optimizer):
    """Control B3."""
    model, built = warmed(optimizer)
    extraction = extract(model, TARGETS, built, rank=RANK)
    train(model, built, 1)
    extraction.freeze_rest()
    assert extraction.energy() == {}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, built, 3)
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == name.endswith("weight.original"), name
    trained = {n: model.get_submodule(n).weight.detach().clone() for n in extraction.layers}
    extraction.fold()
    for name in extraction.layers:
        weight = model.get_submodule(name).weight
        assert weight.requires_grad
        torch.testing.assert_close(weight.detach(), trained[name], atol=1e-6, rtol=0)


def test_half_precision_and_autocast():
    model, optimizer = warmed(dtype=torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    extraction = extract(model, TARGETS, optimizer, rank=RANK)
    assert extraction.core("0.attn.qkv").dtype == torch.float32
    assert optimizer.state[extraction.core("0.attn.qkv")]["exp_avg"].dtype == torch.float32
    assert model.get_submodule("0.attn.qkv").weight.dtype == torch.bfloat16
    train(model, optimizer, 1)
    extraction.fold()
    assert all(p.dtype == torch.bfloat16 and p.shape == before[n].shape for n, p in model.named_parameters())
    model, optimizer = warmed()
    weight = model[0].mlp["fc1"].weight.detach().clone()
    extract(model, TARGETS, optimizer, rank=RANK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model[0].mlp["fc1"].weight.detach(), weight, atol=1e-6, rtol=0)


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "amsgrad", "ours"])
def test_a_checkpoint_resumes_bitwise(optimizer, tmp_path):
    model, built = warmed(optimizer)
    scheduler = CosineAnnealingLR(built, 20)
    extraction = extract(model, TARGETS, built, rank=RANK, boost=4.0, scheduler=scheduler)
    train(model, built, 2, 10, scheduler)
    saved = {"model": model.state_dict(), "optimizer": built.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(model, built, 3, 20, scheduler)

    other = network(seed=9)
    again = OPTIMIZERS[optimizer](other.parameters())
    schedule = CosineAnnealingLR(again, 20)
    prepared = prepare(other, TARGETS, again, rank=RANK, boost=4.0, scheduler=schedule)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["scheduler"])
    train(other, again, 3, 20, schedule)
    state = model.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in other.state_dict().items())
    assert all(torch.equal(prepared.energy()[n], x) for n, x in extraction.energy().items())
    for one in (extraction, prepared):
        one.fold()
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in built.param_groups]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    train(other, again, 1, 30, schedule)


# --------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: CosineAnnealingLR(o, 30),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=40),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 3), CosineAnnealingLR(o, 30)], [3]),
    "lambda after linear": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 6), LambdaLR(o, lambda t: 0.9**t)], [6]),
}


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_schedulers_made_before(kind):
    """R keeps its schedule, C has boost times it, before and after the extraction is folded."""
    rates = []
    for extracting in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = SCHEDULERS[kind](optimizer)
        train(model, optimizer, 5, scheduler=scheduler)
        extraction = extract(model, TARGETS, optimizer, rank=RANK, scheduler=scheduler) if extracting else None
        own = []
        for number in range(6):
            train(model, optimizer, 1, number, scheduler)
            own.append(optimizer.param_groups[0]["lr"])
            if extracting:
                assert optimizer.param_groups[1]["lr"] == pytest.approx(5 * own[-1], rel=1e-9)
                assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
        if extraction is not None:
            extraction.fold()
        for _ in range(3):
            train(model, optimizer, 1, 0, scheduler)
            own.append(optimizer.param_groups[0]["lr"])
        assert len(scheduler.get_last_lr()) == 1
        rates.append(own)
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def not_told(build):
    model, optimizer = warmed()
    scheduler = build(optimizer)
    train(model, optimizer, 1)
    extract(model, TARGETS, optimizer, rank=RANK)
    return optimizer, scheduler


def test_schedulers_that_are_not_told():
    """As the documentation says of torch's."""
    _, scheduler = not_told(lambda o: LambdaLR(o, lambda t: 0.5**t))
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()
    optimizer, scheduler = not_told(lambda o: CosineAnnealingLR(o, 3))
    for _ in range(3):
        scheduler.step()
        first, own = (g["lr"] for g in optimizer.param_groups)
        assert own == pytest.approx(5 * first)
    with pytest.raises(ValueError, match="zip"):
        scheduler.step()


def test_plateaus():
    model, optimizer = warmed()
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[1e-3])
    extract(model, TARGETS, optimizer, rank=RANK, scheduler=scheduler)
    for _ in range(10):
        scheduler.step(1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(1e-3), pytest.approx(5e-3)]


def test_schedulers_that_cannot_be_extended():
    model, optimizer = warmed()
    unchanged(model, optimizer, "CyclicLR keeps .*max_lrs", scheduler=CyclicLR(optimizer, 1e-3, 1e-2))
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    unchanged(model, optimizer, "belongs to another optimizer", scheduler=LambdaLR(other, lambda t: 1.0))
    unchanged(model, optimizer, "must be a learning-rate scheduler", error=TypeError, scheduler=0.1)


# ------------------------------------------------------------------------------------------------------------ refusals


def unchanged(model, optimizer, message, patterns=TARGETS, error=ValueError, **options):
    before, slots = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    groups = len(optimizer.param_groups)
    with pytest.raises(error, match=message):
        extract(model, patterns, optimizer, **({"rank": RANK} | options))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(x, before[n]) or x.isnan().any() for n, x in after.items())
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks
    assert len(optimizer.param_groups) == groups
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, slots[key][name], equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"rank": 9}, r"rank must lie in \[1, 8\] for 0.attn.qkv of \(24, 8\), got 9", ValueError),
        ({"rank": 0}, "rank must be >= 1, got 0", ValueError),
        ({"rank": 1.5}, "rank must be an int", TypeError),
        ({"source": "gradient"}, "source must be one of 'weight', 'change', 'momentum', 'random'", ValueError),
        ({"boost": 0.0}, r"boost must lie in \(0, inf\), got 0.0", ValueError),
        ({"weight_decay": -1.0}, r"weight_decay must lie in \[0, inf\)", ValueError),
        ({"seed": -1}, "seed must be >= 0", ValueError),
        ({"source": "change"}, "initial is needed for source='change'", ValueError),
        ({"initial": {}}, "initial is needed for source='change' and only there, got source='weight'", ValueError),
        ({"source": "change", "initial": {}}, "initial holds neither 0.attn.qkv.weight nor 0.attn.qkv", ValueError),
        (
            {"source": "change", "initial": {"0.attn.qkv": torch.zeros(2, 2)}},
            r"initial has 0.attn.qkv of shape \(2, 2\), the model \(24, 8\)",
            ValueError,
        ),
        (
            {"source": "change", "initial": {"0.attn.qkv": torch.full((24, 8), torch.nan)}},
            "initial has a 0.attn.qkv that is not finite",
            ValueError,
        ),
        ({"patterns": "nothing"}, "matches no module", ValueError),
        ({"patterns": "norm"}, "no matrix", ValueError),
    ],
)
def test_bad_options(options, message, error):
    unchanged(*warmed(), message, error=error, **options)


def test_a_source_of_zeros():
    model, optimizer = warmed()
    initial = copy.deepcopy(model.state_dict())
    unchanged(model, optimizer, "0.attn.qkv are taken from is zero", source="change", initial=initial)
    model, optimizer = warmed(steps=0)
    unchanged(model, optimizer, "no momentum of 0.attn.qkv; take a step first", source="momentum")
    model, optimizer = warmed("plain sgd")
    unchanged(model, optimizer, "no momentum of 0.attn.qkv", source="momentum")


def test_what_is_not_finite():
    for where in ("weight", "exp_avg", "exp_avg_sq"):
        model, optimizer = warmed()
        last = model[1].mlp["fc1"].weight  # found after all others have been looked at
        with torch.no_grad():
            (last if where == "weight" else optimizer.state[last][where])[0, 0] = torch.nan
        unchanged(model, optimizer, rf"{where} of 1.mlp.fc1 is not finite")


def test_bad_layers():
    model, optimizer = warmed()
    extract(model, "mlp.fc1", optimizer, rank=RANK)
    unchanged(model, optimizer, "0.mlp.fc1 is parametrized already")
    model, optimizer = warmed()
    model[0].mlp["fc1"].weight.requires_grad_(False)
    unchanged(model, optimizer, "the weight of 0.mlp.fc1 is frozen")
    model, _ = warmed()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    unchanged(model, optimizer, "does not hold the weight of 1.attn.qkv, the weight of 1.mlp.fc1")


def test_optimizers_whose_state_cannot_be_split():
    model = network()
    optimizer = torch.optim.Adamax(model.parameters())
    train(model, optimizer, 1)
    unchanged(model, optimizer, "0.attn.qkv in Adamax has exp_inf, .*; its keys are step, exp_avg, exp_inf, known are")
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1)
    unchanged(model, optimizer, "Adafactor has row_var")
    optimizer = torch.optim.LBFGS(model.parameters())
    unchanged(model, optimizer, "LBFGS has one group")
    wide = network(32)
    unchanged(wide, comoving.AdamW(wide.parameters(), rank=4), "0.attn.qkv is projected in this optimizer, .* rank=1.0")
    ruled = comoving.LowRankOptimizer(wide.parameters(), rank=1.0, rule=comoving.rules.Muon())
    unchanged(wide, ruled, "0.attn.qkv is stepped in a whole frame")
    model.zero_grad()
    stepping = comoving.AdamW(model.parameters(), rank=1.0)
    stepping.step_in_backward()
    unchanged(model, stepping, "steps in the backward pass")


def test_a_group_that_the_optimizer_refuses():
    """What goes wrong last of all, after another group was added, is undone as well."""
    model = network()
    optimizer = comoving.AdamW([{"params": list(block.parameters())} for block in model], lr=1e-2, rank=1.0)
    train(model, optimizer, 2)
    optimizer.param_groups[1]["max_lr"] = 1.0
    unchanged(model, optimizer, "unknown hyper-parameters", error=TypeError)
    train(model, optimizer, 2)
    assert len(optimizer.sites) == len(list(model.parameters()))


def test_layers_of_transformers():
    """GPT-2 stores the transposes of its matrices, in modules of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
        model = transformers.GPT2Model(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    words = torch.arange(8)[None]

    def step():
        optimizer.zero_grad()
        model(words).last_hidden_state[..., 0].sum().backward()
        optimizer.step()

    step()
    with torch.no_grad():
        before = model(words).last_hidden_state
        extraction = extract(model, "attn.qkv,mlp.fc2", optimizer, rank=4, source="momentum")
        torch.testing.assert_close(model(words).last_hidden_state, before, atol=1e-5, rtol=0)
    assert extraction.layers == ("h.0.attn.c_attn", "h.0.mlp.c_proj")
    assert [x.shape for x in extraction.directions("h.0.attn.c_attn")] == [(16, 4), (48, 4)]
    step()
    extraction.fold()
    step()


def test_removing_a_group_of_this_librarys_optimizer():
    model = network()
    groups = [
        {"params": list(block.parameters()), "lr": lr} for block, lr in zip(model, (1e-3, 2e-3, 3e-3), strict=True)
    ]
    optimizer = comoving.AdamW(groups, rank=1.0)
    train(model, optimizer, 1)
    optimizer.remove_param_group(1)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 3e-3]
    removed, last = list(model[1].parameters()), model[2].weight
    assert not any(p in optimizer.state or p in optimizer.sites for p in removed) and last in optimizer.state
    before = [p.detach().clone() for p in removed], last.detach().clone()
    train(model, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(removed, before[0], strict=True)) and not torch.equal(last, before[1])
    optimizer.add_param_group(groups[1] | {"params": removed})
    train(model, optimizer, 1)
    assert not torch.equal(removed[0], before[0][0])
    with pytest.raises(IndexError):
        optimizer.remove_param_group(7)


def test_unknown_layers():
    model, optimizer = warmed()
    extraction = extract(model, "mlp.fc1", optimizer, rank=RANK)
    with pytest.raises(KeyError, match="mlp.fc2 is none of the extracted layers 0.mlp.fc1, 1.mlp.fc1"):
        extraction.directions("mlp.fc2")
