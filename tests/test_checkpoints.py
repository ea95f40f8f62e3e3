"""Saving, resuming and converting state."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import comoving
from comoving import LowRankOptimizer, build, recipes
from comoving.codecs import Full
from comoving.finders import Exact
from comoving.residual import Feedback
from comoving.transport import Carry, Reset, Rotate

EVERY = 5
KEEPERS = ("galore", "tensor-galore")  # transport Keep
FIRST, SECOND = "moment.first", "moment.second"


class Mixed(nn.Module):
    """One parameter of each kind: wide, tall, third order, complex; dense real, dense complex."""

    def __init__(self, dtype=torch.float32, wide=(16, 24), bias=7, complex_too=True, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape, dtype=dtype):
            field = torch.complex64 if dtype.is_complex else torch.float32
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=field).to(dtype))

        self.wide = parameter(*wide)
        self.tall = parameter(24, 12)
        self.tensor = parameter(10, 12, 9)
        self.bias = parameter(bias)
        if complex_too:
            self.spectral = parameter(12, 16, dtype=torch.complex64)
            self.modes = parameter(5, dtype=torch.complex64)


def train(model, optimizer, first, last, schedule=None, noise=0.3):
    """Steps first ... last - 1 on |p|^2 / 2, with noise that depends on the step alone."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(1000 + t)
        for p in model.parameters():
            field = torch.complex64 if p.is_complex() else torch.float32
            p.grad = p.detach() + noise * torch.randn(p.shape, generator=generator, dtype=field).to(p.dtype)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def picture(model, optimizer):
    """Everything a step depends on, copied."""
    names = {p: n for n, p in model.named_parameters()}
    state = {names[p]: {k: copy.deepcopy(v) for k, v in slots.items()} for p, slots in optimizer.state.items()}
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    return {n: p.detach().clone() for n, p in model.named_parameters()}, state, groups


def assert_same(a, b):
    """Bitwise equality of nested dicts, lists and tensors, dtypes included."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def make(recipe, model, **options):
    if recipe in KEEPERS:
        options = {"refresh_every": EVERY, **options}
    return build(recipe, model, 1e-2, rank=options.pop("rank", 0.25), **options)


def loss(model):
    return sum(p.detach().abs().square().sum().item() for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "offsets"), [(torch.float32, (1, 4)), (torch.bfloat16, (2, 5)), (torch.float64, (3, 8))], ids=str
)
@pytest.mark.parametrize("recipe", [*recipes(), "galore+ef", "tensor-galore+ef"])
def test_resumed_training_is_bitwise_uninterrupted_training(recipe, dtype, offsets):
    recipe, name = recipe.split("+")[0], recipe
    total = 14  # beyond every offset lie two refreshes of each parameter
    options = {"refresh_every": EVERY} if recipe in KEEPERS else {}
    model = Mixed(dtype)
    optimizer = build(name, model, 1e-2, **options)
    saved = {}
    for t in range(total):
        if t in offsets:
            saved[t] = copy.deepcopy(model), through_file(optimizer.state_dict())
        train(model, optimizer, t, t + 1)
    truth = picture(model, optimizer)
    assert any(site.projected for site in optimizer.sites.values()) is not recipes()[recipe].full_rank
    for offset, (resumed, state) in saved.items():
        other = build(name, resumed, 0.7, **options)  # the rate must come from the checkpoint
        other.load_state_dict(state)
        train(resumed, other, offset, total)
        assert_same(picture(resumed, other), truth)


@pytest.mark.parametrize("recipe", [name for name in recipes() if name != "adamw"])
def test_state_of_bf16_parameters_stays_fp32_when_loaded(recipe):
    model = Mixed(torch.bfloat16, complex_too=False)
    optimizer = make(recipe, model)
    train(model, optimizer, 0, 3)
    other = make(recipe, model)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for p, site in other.sites.items():
        large = {n: x.dtype for n, x in other.state[p].items() if isinstance(x, torch.Tensor) and site.projected}
        assert any(n == FIRST or n.startswith(f"{FIRST}.") for n in large) is site.projected
        assert not {n: d for n, d in large.items() if d.is_floating_point and d is not torch.float32}
        indices = {d for n, d in large.items() if n.endswith(("indices", "seed", "draws"))}
        assert indices <= {torch.int32, torch.int64}


def test_loading_copies():
    model = Mixed()
    optimizer = make("comoving-adamw", model)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    other = make("comoving-adamw", copy.deepcopy(model))
    other.load_state_dict(state)
    before = copy.deepcopy(state)
    for slots in other.state.values():
        for x in slots.values():
            if isinstance(x, torch.Tensor):
                x.fill_(3)
    assert_same(state, before)


# --------------------------------------------------------------------------------------- torch's AdamW, other ranks


def torch_adamw(model, named, **options):
    return torch.optim.AdamW(model.named_parameters() if named else model.parameters(), 1e-2, **options)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_adamw_checkpoint_continues_bitwise_at_full_rank(named, amsgrad):
    model = Mixed(complex_too=False)
    source = torch_adamw(model, named, amsgrad=amsgrad, weight_decay=0.03, betas=(0.8, 0.98))
    train(model, source, 0, 4)
    resumed, state = copy.deepcopy(model), through_file(source.state_dict())
    train(model, source, 4, 8)
    other = comoving.AdamW(
        resumed.named_parameters() if named else resumed.parameters(), 0.5, rank=1.0, amsgrad=amsgrad
    )
    other.load_state_dict(state)
    train(resumed, other, 4, 8)
    assert_same(list(resumed.parameters()), list(model.parameters()))


@pytest.mark.parametrize("named", [True, False])
def test_adamw_moments_are_carried_into_the_first_frame(named):
    model = Mixed(complex_too=False)
    source = torch_adamw(model, named)
    train(model, source, 0, 6)
    before = {n: {k: v.clone() for k, v in source.state[p].items()} for n, p in model.named_parameters()}
    optimizer = comoving.AdamW(model.named_parameters() if named else model.parameters(), moments=Full())
    optimizer.load_state_dict(through_file(source.state_dict()))
    train(model, optimizer, 6, 7)
    for name, p in model.named_parameters():
        site, state = optimizer.sites[p], optimizer.state[p]
        if not site.projected:
            assert name == "bias"
            continue

        def into(x, square=False, state=state):
            x = x.double()
            for n in range(x.ndim):
                if f"frame.{n}" in state:
                    u = state[f"frame.{n}"].double()
                    x = torch.tensordot(x, u * u if square else u, dims=([n], [0])).movedim(-1, n)
            return x

        m, v, g = before[name]["exp_avg"], before[name]["exp_avg_sq"], p.grad
        z = into(g)
        torch.testing.assert_close(state[FIRST].double(), 0.9 * into(m) + 0.1 * z, atol=2e-6, rtol=1e-5)
        c1, c2 = 1 - 0.9**6, 1 - 0.999**6
        k = sum((0.9**2 / 0.999) ** i for i in range(6)) * 0.1**2 / 0.001
        variance = into(v.double() / c2 - (m.double() / c1) ** 2, square=True)
        moved = c2 * torch.maximum(variance + (into(m) / c1) ** 2, into(m) ** 2 / (k * c2))
        torch.testing.assert_close(state[SECOND].double(), 0.999 * moved + 0.001 * z**2, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["comoving-adamw", "ldadam"])
def test_adamw_second_moment_keeps_its_size_on_noise(recipe):
    model = nn.Linear(48, 32, bias=False)
    source = torch.optim.AdamW(model.parameters(), 0.0, weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)

    def steps(optimizer, count):
        for _ in range(count):
            model.weight.grad = torch.randn(32, 48, generator=generator)
            optimizer.step()

    steps(source, 60)
    optimizer = comoving.AdamW(model.parameters(), moments=Full()) if recipe == "comoving-adamw" else None
    if optimizer is None:
        optimizer = LowRankOptimizer(model.parameters(), **recipes()["ldadam"].options)
    optimizer.load_state_dict(source.state_dict())
    steps(optimizer, 1)
    state = optimizer.state[model.weight]
    mass = state.get(SECOND + ".mass", torch.tensor(1 - 0.99**61))
    estimate = (state[SECOND] / mass).mean().item()
    assert 0.8 < estimate < 1.2  # the gradient's entries have variance 1, and so have those of any projection


@pytest.mark.parametrize("recipe", KEEPERS)
def test_keep_refuses_an_adamw_checkpoint_with_the_reason(recipe):
    model = Mixed(complex_too=False)
    source = torch_adamw(model, named=True)
    train(model, source, 0, 2)
    refused(model, make(recipe, model), source.state_dict(), r"wide.*cannot take moments.*Carry\(\)")


@pytest.mark.parametrize("complex_too", [True, False])
def test_amsgrad_checkpoint_is_refused_for_projected_parameters(complex_too):
    model = Mixed(complex_too=complex_too)
    source = torch_adamw(model, named=True, amsgrad=True)
    train(model, source, 0, 2)
    refused(model, make("comoving-adamw", model), source.state_dict(), "amsgrad")


@pytest.mark.parametrize("rank", [0.25, 1.0])
def test_complex_adamw_checkpoint_becomes_one_real_second_moment(rank):
    p = nn.Parameter(torch.randn(12, 16, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
    source = torch.optim.AdamW([p], 1e-2)
    gradients = [torch.randn(12, 16, dtype=torch.complex64) for _ in range(3)]
    for g in gradients:
        p.grad = g
        source.step()
    optimizer = comoving.AdamW([p], rank=rank, moments=Full())
    optimizer.load_state_dict(source.state_dict())
    v = torch.zeros(12, 16)
    for g in gradients:
        v = 0.999 * v + 0.001 * g.abs().square()
    torch.testing.assert_close(optimizer.state[p][SECOND], v)
    optimizer.step()
    assert not optimizer.state[p][SECOND].is_complex()
    assert torch.isfinite(torch.view_as_real(p.detach())).all()


TRANSPORTS = {"carry": Carry(), "rotate": Rotate(), "reset": Reset()}


@pytest.mark.parametrize(("old", "new"), [(3, 6), (6, 3)])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("feedback", [False, True])
def test_checkpoint_of_another_rank_converts(transport, old, new, feedback):
    def optimizer_of(model, rank):
        residual = {"residual": Feedback()} if feedback else {}
        return LowRankOptimizer(
            comoving.param_groups(model, rank=rank),
            2e-2,
            transport=TRANSPORTS[transport],
            refresh_every=4,
            scale="match",
            **residual,
        )

    resumed, alike = Mixed(), Mixed()
    optimizer = optimizer_of(resumed, old)
    train(resumed, optimizer, 0, 10)
    state = through_file(optimizer.state_dict())
    at_switch = loss(resumed)
    train(alike, optimizer_of(alike, new), 0, 60)  # the new rank from the start
    other = optimizer_of(resumed, new)
    other.load_state_dict(state)
    train(resumed, other, 10, 11)
    for p, site in other.sites.items():
        assert all(other.state[p][f"frame.{n}"].shape[1] == new for n, r in enumerate(site.ranks) if r is not None)
        if site.projected:
            assert other.state[p][FIRST].shape == other.state[p][SECOND].shape == site.core_shape
    train(resumed, other, 11, 60)
    assert all(torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all() for p in resumed.parameters())
    assert loss(resumed) < 0.8 * at_switch
    assert loss(resumed) < 1.3 * loss(alike)  # which had 10 more steps at the new rank


def test_moments_survive_a_larger_rank_exactly_when_the_old_directions_do():
    """Rank 3 to 6 on a gradient that lives in 3 directions: the new frame holds the old one, and F m is unchanged."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(16, 24))
    left = torch.randn(16, 3, generator=generator)
    right = torch.randn(3, 24, generator=generator)

    def optimizer_of(rank):
        return LowRankOptimizer([p], 0.0, rank, finder=Exact(method="svd"), transport=Carry(), refresh_every=100)

    def lifted(optimizer):
        return optimizer.state[p]["frame.0"] @ optimizer.state[p][FIRST]

    small = optimizer_of(3)
    for _ in range(4):
        p.grad = left @ right
        small.step()
    large = optimizer_of(6)
    large.load_state_dict(small.state_dict())
    before = lifted(small)
    large.step()
    assert large.state[p][FIRST].shape == (6, 24)
    torch.testing.assert_close(lifted(large), 0.9 * before + 0.1 * p.grad, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- refusals


def refused(model, optimizer, state, message):
    """The state is refused, and nothing has changed."""
    train(model, optimizer, 0, 3)
    before = picture(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_same(picture(model, optimizer), before)
    train(model, optimizer, 3, 4)


@pytest.mark.parametrize("recipe", KEEPERS)
def test_keep_refuses_another_rank(recipe):
    model = Mixed()
    source = make(recipe, model, rank=6)
    train(model, source, 0, 2)
    refused(model, make(recipe, model, rank=3), source.state_dict(), r"ranks.*6.*3.*Keep\(\)")


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ("galore", "ldadam", "another recipe.*transport.*Keep.*Rotate"),
        ("comoving-adamw", "tucker-adam", "another recipe.*codec"),
        ("galore", "galore+ef", "another recipe.*residual"),
        ("adamw", "galore", "galore|recipe|cannot take moments"),
    ],
)
def test_another_recipe_is_refused(saved, here, message):
    model = Mixed()
    source = build(saved, model, 1e-2)
    train(model, source, 0, 2)
    refused(model, build(here, model, 1e-2), source.state_dict(), message)


@pytest.mark.parametrize("recipe", ["adamw", "galore", "ldadam", "comoving-adamw"])
@pytest.mark.parametrize("change", [{"wide": (16, 32)}, {"wide": (20, 24)}, {"bias": 9}])
def test_another_shape_is_refused_by_name(recipe, change):
    (name,) = change
    saved_model, model = Mixed(**change), Mixed()
    source = make(recipe, saved_model, rank=4)
    train(saved_model, source, 0, 2)
    refused(model, make(recipe, model, rank=4), source.state_dict(), f"{name}.*shape")


@pytest.mark.parametrize("recipe", ["adamw", "comoving-adamw"])
def test_other_names_are_refused(recipe):
    class Renamed(Mixed):
        def __init__(self):
            super().__init__()
            self.broad = self.wide
            del self.wide

    model = Mixed()
    source = make(recipe, Renamed())
    train(Renamed(), source, 0, 0)
    refused(model, make(recipe, model), source.state_dict(), "missing.*wide.*unexpected.*broad")


@pytest.mark.parametrize("split", [1, 3])
def test_other_group_sizes_are_refused_without_names(split):
    model = Mixed()
    params = list(model.parameters())
    source = comoving.AdamW([{"params": params[:split]}, {"params": params[split:]}])
    train(model, source, 0, 2)
    refused(model, comoving.AdamW(params), source.state_dict(), "groups of .*named_parameters")


def test_incomplete_state_is_refused():
    model = Mixed()
    for recipe, first, second in (
        ("tucker-adam", FIRST, SECOND),
        ("comoving-adamw", f"{FIRST}.codes", f"{SECOND}.codes"),
    ):
        source = make(recipe, model)
        train(model, source, 0, 2)
        state = copy.deepcopy(source.state_dict())
        del next(s for s in state["state"].values() if first in s and "frame.0" in s)[second]
        refused(model, make(recipe, model), state, SECOND)


def test_groups_are_matched_by_name_in_any_order():
    model = Mixed()
    source = comoving.AdamW(model.named_parameters())
    train(model, source, 0, 3)
    other = comoving.AdamW(reversed(list(model.named_parameters())))
    other.load_state_dict(through_file(source.state_dict()))
    for p in model.parameters():
        assert_same(dict(other.state[p]), dict(source.state[p]))


# ----------------------------------------------------------------------------- hyper-parameters, schedulers, copies


def test_hyper_parameters_are_taken_over():
    model = Mixed()
    source = make("comoving-adamw", model, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    train(model, source, 0, 1)
    source.param_groups[0]["lr"] = 0.123
    other = build("comoving-adamw", model, 1.0)
    other.load_state_dict(through_file(source.state_dict()))
    got = {key: other.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert {**got, "betas": tuple(got["betas"])} == {
        "lr": 0.123,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.2,
    }


SCHEDULES = {
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=2e-2, total_steps=20),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recipe", ["comoving-adamw", "ldadam", "adamw"])
def test_schedulers_work_and_resume(recipe, schedule):
    model = Mixed()
    optimizer = make(recipe, model)
    scheduler = SCHEDULES[schedule](optimizer)
    train(model, optimizer, 0, 5, scheduler)
    resumed, saved = copy.deepcopy(model), through_file([optimizer.state_dict(), scheduler.state_dict()])
    train(model, optimizer, 5, 12, scheduler)
    other = make(recipe, resumed)
    again = SCHEDULES[schedule](other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, other, 5, 12, again)
    truth, got = picture(model, optimizer), picture(resumed, other)
    assert_same(got[:2], truth[:2])
    assert [g["lr"] for g in got[2]] == [g["lr"] for g in truth[2]] != [1e-2] * len(truth[2])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("recipe", ["comoving-adamw", "ldadam", "galore", "adamw"])
def test_copies_of_model_and_optimizer_go_on_bitwise(recipe, how):
    model = Mixed()
    optimizer = make(recipe, model)
    train(model, optimizer, 0, 3)
    both = (model, optimizer)
    other, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert twin.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    train(model, optimizer, 3, 10)
    train(other, twin, 3, 10)
    assert_same(picture(other, twin), picture(model, optimizer))
    assert [s.phase for s in twin.sites.values()] == [s.phase for s in optimizer.sites.values()]


def test_copies_keep_the_settings_of_the_optimizer():
    model = Mixed()
    optimizer = make("comoving-adamw", model, on_nonfinite="skip", seed=11)
    train(model, optimizer, 0, 1)
    model.wide.grad.fill_(torch.nan)
    optimizer.step()
    _, twin = copy.deepcopy((model, optimizer))
    assert (twin.on_nonfinite, twin.seed, twin.skipped_steps) == ("skip", 11, 1)
    twin.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3)))]})


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("recipe", recipes())
def test_distributed_state_dict_roundtrip(recipe, flatten):
    from torch.distributed.checkpoint.state_dict import StateDictOptions  # noqa: PLC0415

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = Mixed()
    optimizer = make(recipe, model)
    train(model, optimizer, 0, 3)
    resumed = copy.deepcopy(model)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, 3, 10)
    other = make(recipe, resumed)
    set_optimizer_state_dict(resumed, other, state, options=options)
    train(resumed, other, 3, 10)
    assert_same(picture(resumed, other)[:2], picture(model, optimizer)[:2])


@pytest.mark.parametrize(("recipe", "new"), [("muon", "after"), ("dion", "orthonormal"), ("muon", "decay")])
def test_a_field_that_a_part_has_got_since_it_was_saved_is_at_its_default(recipe, new):
    """And where it is not, the checkpoint is of another recipe."""
    model = Mixed(complex_too=False)
    saved = copy.deepcopy(build(recipe, model).state_dict())
    for group in saved["param_groups"]:
        del group["rule"][new]
        group.pop("decay")
    build(recipe, model).load_state_dict(copy.deepcopy(saved))
    other = {"after": "rows", "orthonormal": True, "decay": 0.5}[new]
    rule = type(recipes()[recipe].options["rule"])(**{new: other})
    with pytest.raises(ValueError, match="another recipe.*rule: saved"):
        build(recipe, model, rule=rule).load_state_dict(saved)
