"""Bad input is refused or survived, and nothing is left half done."""

import copy

import pytest
import torch
from torch import nn

import comoving
from comoving import AdamW, LowRankOptimizer, build, param_groups, recipes
from comoving.codecs import Int8
from comoving.finders import Exact, Power
from comoving.frames import Modes
from comoving.parts import part
from comoving.residual import Discard, Feedback
from comoving.transport import Carry, Keep, Reset, Rotate

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
RECIPES = ["adamw", "galore", "ldadam", "tensor-galore", "tucker-adam", "comoving-adamw"]
SCALED = ["fira", "fira(per='tensor')", "channel", "channel(per='tensor')"]
TRANSPORTS = {"keep": Keep(), "reset": Reset(), "rotate": Rotate(), "carry": Carry()}


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wide = nn.Parameter(torch.randn(12, 20, generator=generator))
        self.tensor = nn.Parameter(torch.randn(8, 9, 10, generator=generator))
        self.spectral = nn.Parameter(torch.randn(12, 16, generator=generator, dtype=torch.complex64))
        self.modes = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(6, generator=generator))


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def matrix(*shape, value=None):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) if value is None else value)


def picture(model, optimizer, clock=True):
    """Parameters and state, copied; without the refresh clock if wanted."""
    names = {p: n for n, p in model.named_parameters()}
    state = {
        f"{names[p]}/{k}": copy.deepcopy(v)
        for p, s in optimizer.state.items()
        for k, v in s.items()
        if clock or k != "tick"
    }
    return {n: p.detach().clone() for n, p in model.named_parameters()} | state


def differing(a, b):
    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not same(a[k], b[k])]


def finite(optimizer):
    def ok(x):
        return not isinstance(x, torch.Tensor) or bool(
            (torch.view_as_real(x) if x.is_complex() else x).isfinite().all()
        )

    return all(ok(p.detach()) and all(map(ok, s.values())) for p, s in optimizer.state.items())


# ------------------------------------------------------------------------------------------------------ NaN and Inf


@pytest.mark.parametrize("good", [0, 1, 4])
@pytest.mark.parametrize("culprit", ["wide", "tensor", "spectral", "modes", "bias"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_raise_names_the_parameter_and_changes_nothing(recipe, culprit, good):
    model = Mixed()
    optimizer = build(recipe, model, 1e-2, on_nonfinite="raise")
    for t in range(good):
        gradients(model, t)
        optimizer.step()
    for value in BAD.values():
        gradients(model, 99)
        getattr(model, culprit).grad.view(-1)[2] = value
        before = picture(model, optimizer)
        with pytest.raises(RuntimeError, match=rf"non-finite.* {culprit}\b"):
            optimizer.step()
        assert not differing(picture(model, optimizer), before)
    gradients(model, 100)
    optimizer.step()
    assert finite(optimizer)


def test_raise_accepts_finite_gradients_whose_norm_overflows():
    p = matrix(8, 12)
    optimizer = AdamW([p])
    p.grad = torch.full_like(p, 3e18)
    optimizer.step()
    assert p.isfinite().all() and all(
        x.isfinite().all() for n, x in optimizer.state[p].items() if n.startswith("moment")
    )


@pytest.mark.parametrize(
    "moments", ["full", "int8", "int8(table='dynamic')", "int4(rounding='stochastic')", "rank_one"]
)
@pytest.mark.parametrize("residual", ["discard", "feedback", *SCALED])
@pytest.mark.parametrize("rule", ["adam", "momentum", "lion"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_gradient_whose_squares_overflow_makes_no_weight_nan(rule, residual, moments, transport):
    """Second moments become infinite, or as large as can be stored: entries may stand still, but stay numbers."""
    parts = {"rule": rule, "residual": residual, "moments": moments}
    p, options = matrix(24, 32), {role: part(role, spec) for role, spec in parts.items()}
    optimizer = LowRankOptimizer([p], 1e-3, 4, transport=TRANSPORTS[transport], **options)
    for t, size in enumerate((1.0, 1.0, 1e20, 1.0, 1.0, 1.0)):
        p.grad = size * torch.randn(24, 32, generator=torch.Generator().manual_seed(t))
        before = p.detach().clone()
        optimizer.step()
        assert p.isfinite().all()
        assert t > 1 or not torch.equal(p, before)


@pytest.mark.parametrize("statistics", ["carry", "keep", "reset"])
@pytest.mark.parametrize("rank", [1.0, 4])
@pytest.mark.parametrize(
    "rule",
    ["shampoo(every=1)", "shampoo(every=1, root='newton')", "shampoo(every=1, graft=False)", "soap(every=1)",
     "shampoo(every=1, average=False)", "soap(every=2, one_sided=True)", "muon", "adafactor"],
)  # fmt: skip
def test_statistics_of_modes_stay_finite_where_squares_overflow(rule, rank, statistics):
    """Roots and bases are made anew at every step here, of factors that have seen such a gradient."""
    p = matrix(24, 32)
    optimizer = LowRankOptimizer([p], 1e-3, rank, rule=part("rule", rule), transport=Rotate(statistics=statistics))
    for t, size in enumerate((1.0, 1.0, 1e20, 1.0, 1.0, 1.0)):
        p.grad = size * torch.randn(24, 32, generator=torch.Generator().manual_seed(t))
        before = p.detach().clone()
        optimizer.step()
        assert p.isfinite().all()
        assert t > 1 or not torch.equal(p, before)


@pytest.mark.parametrize("recipe", recipes())
def test_no_recipe_makes_a_weight_nan_of_a_gradient_whose_squares_overflow(recipe):
    model = Mixed()
    optimizer = build(recipe, model, 1e-3)
    for t, size in enumerate((1.0, 1.0, 1e20, 1.0, 1.0, 1.0)):
        gradients(model, t)
        for p in model.parameters():
            p.grad *= size
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_skip_does_not_skip_finite_gradients_whose_norm_overflows():
    p = matrix(8, 12)
    optimizer = LowRankOptimizer([p], 1e-2, 1.0, on_nonfinite="skip")
    p.grad = torch.full_like(p, 3e18)
    before = p.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 0 and not torch.equal(p, before)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("culprit", ["wide", "spectral", "modes", "bias"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_skip_leaves_parameters_and_state(recipe, culprit, value):
    """At the first step, at refreshes and between them: with a period of 3 the six steps meet each case."""
    model = Mixed()
    options = {} if recipe == "adamw" else {"refresh_every": 3}
    optimizer = build(recipe, model, 1e-2, on_nonfinite="skip", **options)
    for t in range(1, 7):
        gradients(model, t)
        optimizer.step()
        before = picture(model, optimizer, clock=False)
        gradients(model, 50)
        getattr(model, culprit).grad.view(-1)[0] = BAD[value]
        optimizer.step()
        changed = differing(picture(model, optimizer, clock=False), before)
        # Only the clock and the choice of direction may move: a frame may be looked for again, with nothing to look at.
        assert not changed, changed
        assert finite(optimizer)
        assert optimizer.skipped_steps == t


@pytest.mark.parametrize("recipe", RECIPES)
def test_skip_at_the_very_first_step(recipe):
    model = Mixed()
    optimizer = build(recipe, model, 1e-2, on_nonfinite="skip")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients(model, 0)
    for p in model.parameters():
        p.grad.view(-1)[0] = torch.nan
    optimizer.step()
    assert not differing(dict(model.named_parameters()), before)
    assert optimizer.skipped_steps == 1
    assert finite(optimizer)
    # No weight has been given to a gradient that was not taken in: everything that accumulates is zero.
    for p, state in optimizer.state.items():
        moved = [
            n for n, x in state.items() if not n.startswith(("frame.", "tick", "diagnostics")) and torch.any(x != 0)
        ]
        assert not moved, (optimizer.sites[p].name, moved)


@pytest.mark.parametrize("residual", [Discard(), Feedback()])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("where", [0, 1, 3])
def test_skipping_is_as_if_the_step_had_not_been(transport, residual, where):
    """With a decomposition at every step the clock has no say, and the runs agree bit for bit."""

    def run(bad_at):
        model = Mixed()
        optimizer = LowRankOptimizer(
            param_groups(model), 1e-2, finder=Exact(), transport=TRANSPORTS[transport], residual=residual,
            on_nonfinite="skip", diagnostics=False,
        )  # fmt: skip
        for t in range(6):
            if t == bad_at:
                gradients(model, 99)
                model.tensor.grad[0, 0, 0] = torch.inf
                optimizer.step()
            gradients(model, t)
            optimizer.step()
        return picture(model, optimizer, clock=False)

    assert not differing(run(where), run(None))


def test_a_skipped_first_step_does_not_fix_the_frame_for_a_period():
    model = nn.Linear(20, 12, bias=False)
    optimizer = build("galore", model, 1e-2, rank=4, refresh_every=50, on_nonfinite="skip")
    model.weight.grad = torch.full_like(model.weight, torch.nan)
    optimizer.step()
    model.weight.grad = torch.randn(12, 4) @ torch.randn(4, 20)
    optimizer.step()
    assert optimizer.diagnostics()["weight"]["captured"] > 0.999


# ---------------------------------------------------------------------------------- sparse, zero, missing gradients


@pytest.mark.parametrize("rank", [2, 1.0])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_sparse_gradients_are_refused_by_name(rank, policy):
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True))
    other = matrix(8, 12)
    optimizer = LowRankOptimizer(
        [*model.named_parameters(), ("other", other)], 0.1, rank, select="shape", on_nonfinite=policy
    )
    model(torch.tensor([1, 3])).sum().backward()
    other.grad = torch.ones_like(other)
    before = other.detach().clone(), model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"0\.weight.*sparse"):
        optimizer.step()
    assert torch.equal(other, before[0]) and torch.equal(model[0].weight, before[1])
    assert not optimizer.state.get(other)


@pytest.mark.parametrize("finder", [Exact(), Exact(method="svd"), Power(), Power(inertia=0.0), Power(start="exact")])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("zero", [{0}, {1}, {0, 1, 2}, {2, 3}])
def test_zero_gradient_at_a_refresh(finder, transport, zero):
    """Frames stay orthonormal, nothing becomes NaN, and the next refresh finds the gradient."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.complex64):
        p = matrix(value=torch.randn(12, 20, generator=generator, dtype=dtype))
        optimizer = LowRankOptimizer([p], 1e-2, 4, finder=finder, transport=TRANSPORTS[transport])
        left, right = (torch.randn(s, generator=generator, dtype=dtype) for s in ((12, 2), (2, 20)))
        for t in range(8):
            p.grad = torch.zeros_like(p) if t in zero else left @ right
            optimizer.step()
            frame = optimizer.state[p]["frame.0"]
            torch.testing.assert_close(frame.mH @ frame, torch.eye(4, dtype=dtype), atol=1e-5, rtol=0)
            assert finite(optimizer)
        assert optimizer.diagnostics()["parameter 0"]["captured"] > 0.999


@pytest.mark.parametrize("recipe", recipes())
def test_only_zero_gradients_move_nothing(recipe):
    model = Mixed()
    optimizer = build(recipe, model, 0.1, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert not differing(dict(model.named_parameters()), before)
    assert finite(optimizer)


@pytest.mark.parametrize("recipe", recipes())
def test_parameters_without_gradient_are_left_alone(recipe):
    model = Mixed()
    optimizer = build(recipe, model, 0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert not differing(dict(model.named_parameters()), before) and not any(optimizer.state.values())
    for t in range(3):
        gradients(model, t)
        model.wide.grad = model.bias.grad = None
        optimizer.step()
    after = dict(model.named_parameters())
    assert set(differing(after, before)) == {"tensor", "spectral", "modes"}
    assert not optimizer.state.get(model.wide) and not optimizer.state.get(model.bias)
    gradients(model, 9)
    optimizer.step()
    assert not torch.equal(model.wide, before["wide"]) and finite(optimizer)


# ------------------------------------------------------------------------------------------------- hyper-parameters

REFUSED = [
    ("rank", 0, ValueError, ">= 1.*0"),
    ("rank", -3, ValueError, ">= 1.*-3"),
    ("rank", True, TypeError, "True"),
    ("rank", "8", TypeError, "'8'"),
    ("rank", 1.5, ValueError, r"\(0, 1\].*1\.5"),
    ("rank", 0.0, ValueError, r"\(0, 1\].*0\.0"),
    ("rank", -0.5, ValueError, r"\(0, 1\].*-0\.5"),
    ("rank", float("nan"), ValueError, "nan"),
    ("rank", None, TypeError, "None"),
    ("rank", [4, 4], TypeError, r"\[4, 4\]"),
    ("rank", (4,), ValueError, r"\(4,\).*1 entries.*needs 2"),
    ("rank", (4, 4, 4), ValueError, "3 entries.*needs 2"),
    ("rank", (13, None), ValueError, "13 directions in mode 0.*12"),
    ("rank", (4, 21), ValueError, "21.*mode 1.*20"),
    ("rank", (0, 4), ValueError, ">= 1.*0"),
    ("rank", (True, 4), TypeError, "True"),
    ("rank", (2.0, 4), TypeError, r"2\.0"),
    ("lr", -0.1, ValueError, r"lr.*\[0, inf\).*-0\.1"),
    ("lr", float("nan"), ValueError, "lr.*nan"),
    ("lr", float("inf"), ValueError, "lr.*inf"),
    ("lr", "fast", TypeError, "lr.*fast"),
    ("lr", torch.tensor(0.1), TypeError, "lr must be a float"),
    ("betas", (1.0, 0.9), ValueError, r"betas\[0\].*\[0, 1\).*1\.0"),
    ("betas", (0.9, -0.1), ValueError, r"betas\[1\].*-0\.1"),
    ("betas", (0.9,), ValueError, r"two numbers.*0\.9"),
    ("betas", 0.9, ValueError, r"two numbers.*0\.9"),
    ("betas", (0.9, 1.0), ValueError, r"betas\[1\].*\[0, 1\).*1\.0"),
    ("betas", (0.9, 0.0), ValueError, r"betas\[1\]=0.*projected"),
    ("eps", -1e-9, ValueError, r"eps.*\[0, inf\).*-1e-09"),
    ("weight_decay", -1.0, ValueError, r"weight_decay.*\[0, inf\).*-1"),
    ("side", "top", ValueError, "side.*'auto'.*'top'"),
    ("view", "cube", ValueError, "view.*'tensor'.*'cube'"),
    ("view", "pairs", ValueError, "parameter 0.*pairs.*real tensor"),
    ("scale", 0.0, ValueError, r"scale.*\(0, inf\).*0\.0"),
    ("scale", "best", ValueError, "scale.*'match'.*'best'"),
    ("refresh_every", 0, ValueError, "refresh_every.*>= 1.*0"),
    ("refresh_every", 2.0, TypeError, r"refresh_every.*2\.0"),
    ("refresh_every", True, TypeError, "refresh_every.*True"),
    ("maximize", "yes", ValueError, "maximize.*'yes'"),
    ("diagnostics", None, ValueError, "diagnostics.*None"),
    ("foreach", "yes", ValueError, "foreach.*'yes'"),
    ("fused", 3, ValueError, "fused.*3"),
    ("select", "names", ValueError, "select.*'auto'.*'names'"),
    ("amsgrad", True, ValueError, "amsgrad.*refused: parameter 0 is projected"),
    ("finder", Exact, TypeError, "finder"),
    ("finder", Carry(), TypeError, "finder.*Carry"),
    ("finder", "exact", TypeError, "finder"),
    ("frame", Modes, TypeError, "frame"),
    ("transport", Carry, TypeError, "transport"),
    ("transport", None, TypeError, "transport"),
    ("rule", "adam", TypeError, "rule"),
    ("residual", Feedback, TypeError, "residual"),
    ("codec", Int8, TypeError, "codec"),
    ("codec", Feedback(), TypeError, "codec.*Feedback"),
]  # fmt: skip


@pytest.mark.parametrize("where", ["constructor", "group", "added group"])
@pytest.mark.parametrize(("key", "value", "error", "message"), REFUSED, ids=lambda v: str(v)[:20])
def test_hyper_parameters_out_of_their_interval(where, key, value, error, message):
    p, message = matrix(12, 20), message.replace("parameter 0", "parameter .") if where == "added group" else message
    if where == "added group":
        optimizer = LowRankOptimizer([matrix(4)])
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [p], key: value})
        assert len(optimizer.param_groups) == 1 and p not in optimizer.sites
    else:
        params, options = ([p], {key: value}) if where == "constructor" else ([{"params": [p], key: value}], {})
        with pytest.raises(error, match=message):
            LowRankOptimizer(params, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite.*'raise'.*'skip'.*'ignore'"),
        ({"seed": -1}, ValueError, "seed.*>= 0.*-1"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"learning_rate": 0.1}, TypeError, "learning_rate"),
    ],
)
@pytest.mark.parametrize("kind", [AdamW, LowRankOptimizer])
def test_options_of_the_whole_optimizer(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind([matrix(12, 20)], **options)


@pytest.mark.parametrize(
    ("part", "fields", "error"),
    [
        (Power, {"inertia": 1.0}, ValueError),
        (Power, {"iterations": 0}, ValueError),
        (Power, {"start": "warm"}, ValueError),
        (Power, {"cold": True}, TypeError),
        (Exact, {"inertia": -0.1}, ValueError),
        (Exact, {"sweeps": -1}, ValueError),
        (Exact, {"method": "qr"}, ValueError),
        (Modes, {"min_size": 1}, ValueError),
        (Int8, {"block": 0}, ValueError),
    ],
)  # fmt: skip
def test_parts_check_their_fields(part, fields, error):
    ((key, _),) = fields.items()
    with pytest.raises(error, match=key):
        part(**fields)


def test_rank_errors_name_the_parameter():
    model = Mixed()
    with pytest.raises(ValueError, match="tensor: rank.*2 entries"):
        AdamW([("tensor", model.tensor)], rank=(2, 2))
    with pytest.raises(ValueError, match="spectral: rank.*mode 1"):
        AdamW([("spectral", model.spectral)], rank=(2, 17))


@pytest.mark.parametrize("make", [AdamW, LowRankOptimizer])
def test_unknown_keywords_in_a_group(make):
    with pytest.raises(TypeError, match="rnak.*known are.*rank"):
        make([{"params": [matrix(12, 20)], "rnak": 3}])


@pytest.mark.parametrize("name", ["adam", "galore+", "galore+fira", "+ef", "", "GaLore"])
def test_unknown_recipes(name):
    with pytest.raises(ValueError, match="unknown recipe.*galore.*ldadam"):
        build(name, nn.Linear(12, 20))


def test_unknown_keyword_of_a_recipe():
    with pytest.raises(TypeError, match="momentun"):
        build("galore", nn.Linear(12, 20), momentun=0.9)


# -------------------------------------------------------------------------------------------- parameters and groups


def test_duplicate_parameters():
    p, q = matrix(12, 20), matrix(4)
    with pytest.raises(ValueError, match="duplicate.*'a'"):
        AdamW([("p", p), ("a", p)])
    with pytest.raises(ValueError, match="duplicate"):
        AdamW([{"params": [p, q]}, {"params": [p]}])
    optimizer = AdamW([p])
    with pytest.raises(ValueError, match="duplicate"):
        optimizer.add_param_group({"params": [q, p]})
    assert q not in optimizer.sites and len(optimizer.param_groups) == 1


def test_empty_groups_and_optimizers():
    with pytest.raises(ValueError, match="empty"):
        AdamW([])
    with pytest.raises(ValueError, match="empty"):
        AdamW([{"params": [matrix(12, 20)]}, {"params": []}])
    with pytest.raises(ValueError, match="empty"):
        AdamW([matrix(12, 20)]).add_param_group({"params": iter(())})


def test_things_that_are_no_parameters():
    with pytest.raises(TypeError, match="str"):
        AdamW(["weight"])
    with pytest.raises(TypeError, match="Linear"):
        AdamW([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="non-leaf"):
        AdamW([matrix(12, 20) * 2])


@pytest.mark.parametrize("rank", [0.25, 2, 1.0])
@pytest.mark.parametrize("shape", [(12, 20), (5,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integer_parameters(rank, shape, dtype):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match="count: .*floating-point.*int64|count: .*floating-point.*bool"):
        AdamW([("count", p)], rank=rank)


def test_fused_is_refused_for_dense_complex_parameters_and_honoured_for_real_ones():
    model = Mixed()
    with pytest.raises(ValueError, match="fused=True is refused: modes is complex"):
        AdamW([("modes", model.modes)], fused=True)
    with pytest.raises(ValueError, match="amsgrad=True is refused: modes is complex"):
        AdamW([("modes", model.modes)], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True is refused: wide is projected"):
        AdamW([("wide", model.wide)], amsgrad=True)
    twin = copy.deepcopy(model.bias)
    ours = AdamW([("bias", model.bias)], fused=True, amsgrad=True)
    torchs = torch.optim.AdamW([twin], fused=True, amsgrad=True)
    for t in range(3):
        model.bias.grad = torch.randn(6, generator=torch.Generator().manual_seed(t))
        twin.grad = model.bias.grad.clone()
        ours.step()
        torchs.step()
    assert torch.equal(model.bias, twin)


def test_models_without_trainable_parameters():
    model = nn.Linear(12, 20).requires_grad_(False)
    for attempt in (param_groups, AdamW, lambda m: build("galore", m), comoving.explain):
        with pytest.raises((ValueError, TypeError), match="no trainable parameters|the module Linear"):
            attempt(model)
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        param_groups(nn.ReLU())


@pytest.mark.parametrize("key", ["dense", "project"])
@pytest.mark.parametrize("selector", ["attn.*", nn.Conv2d])
def test_selectors_that_match_nothing(key, selector):
    with pytest.raises(ValueError, match="Linear matches.*(attn|Conv2d)"):
        param_groups(nn.Linear(12, 20), **{key: [selector]})


@pytest.mark.parametrize("thing", [None, 3, torch.optim.SGD([matrix(2)], 0.1), [matrix(2)]])
def test_explain_refuses_other_things(thing):
    with pytest.raises(TypeError, match="explain takes a model or an optimizer"):
        comoving.explain(thing)
