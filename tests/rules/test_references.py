"""Recipes with rules of their own follow float64 references written from their papers, over 50 steps."""

import copy

import pytest
import torch

import comoving
from comoving.clock import Clock
from comoving.codecs import Int4, Int8
from comoving.frames import Modes
from comoving.residual import Feedback, MomentumBuffer
from comoving.rules import Adafactor, Columns, Lion, Muon, NorMuon, Scheduled
from comoving.rules.orthogonalize import newton_schulz, polar, triples
from contract.support import COMPLEX, REAL, Holder, close, known_rank, lone, randn, step
from references import adafactor, dion, lion, muon, smmf
from references.algebra import unfold

STEPS = 50
CLOCK = Clock(torch.ones(()), 0.9, 0.99, 1)
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])


def gradients(shape, dtype, seed=0):
    """A drifting signal in noise; the seventh is zero."""
    low, high = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    noise = [0.5 * randn(shape, dtype, 100 + 50 * seed + t) for t in range(STEPS)]
    return [
        torch.zeros(shape, dtype=dtype) if t == 7 else low * (1 - t / STEPS) + high * (t / STEPS) + noise[t]
        for t in range(STEPS)
    ]


def follow(recipe, start, reference, tolerance=1e-9, **options):
    """Step both side by side, with one more optimizer resumed from a saved state in the middle."""
    model = Holder(start)
    optimizer = comoving.build(recipe, model, **options)
    (p,) = model.parameters()
    for t, g in enumerate(gradients(tuple(start.shape), start.dtype)):
        if t == STEPS // 2:
            saved, other = copy.deepcopy(optimizer.state_dict()), Holder(p.detach())
            optimizer, (p,) = comoving.build(recipe, other, **options), other.parameters()
            optimizer.load_state_dict(saved)
        step(optimizer, p, g)
        close(p.detach(), reference.step(g), tolerance)
    return optimizer, p


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.8},
        {"momentum": 0.8, "nesterov": False, "ema": True, "scale": "spectral"},
        {"momentum": 0.7, "ema": True, "orth": "polar", "scale": 0.7},
        {"momentum": 0.9, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 0.1},
    ],
    ids=str,
)
def test_muon(shape, dtype, options):
    if min(shape) == 1:
        pytest.skip("a vector is stepped by AdamW")
    names = {"momentum": "decay", "orth": "method", "ns_steps": "steps", "ns_coefficients": "coefficients"}
    own = {names.get(k, k): v for k, v in options.items() if k != "eps"}
    if "method" in own:
        own["method"] = "polar"
    start, eps = randn(shape, dtype, 9), options.get("eps", 1e-7)
    reference = muon.Muon(start, 0.03, weight_decay=0.1, **options)
    follow("muon", start, reference, rule=Muon(**own), lr=0.03, weight_decay=0.1, eps=eps)


FLAGS = [
    {"before": "rows", "ns_steps": 3},
    {"after": "rows", "scale": "match"},
    {"after": "columns", "nesterov": False},
    {"after": "both", "scale": "spectral", "before": "rows"},
    {"after": "columns", "orth": "polar"},
    {"orth": "rows"},
    {"orth": "rows", "after": "columns", "scale": 0.7},
    {"orth": "pe", "ns_steps": 9, "scale": "spectral"},
]


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)], ids=str)
@pytest.mark.parametrize("options", FLAGS, ids=str)
def test_the_flags_of_muon(shape, dtype, options):
    start = randn(shape, dtype, 9)
    reference = muon.Muon(start, 0.03, momentum=0.8, weight_decay=0.1, eps=1e-7, **options)
    follow("muon", start, reference, 1e-8, rule=Muon(0.8, **own(options)), lr=0.03, weight_decay=0.1, eps=1e-7)


def own(options):
    """In the words of the rule."""
    names = {"orth": "method", "ns_steps": "steps", "ns_coefficients": "coefficients"}
    given = {names.get(k, k): v for k, v in options.items()}
    if given.get("method") == "pe":
        del given["method"]
        given["coefficients"] = "polar-express"
    return given


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (8, 5)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"scale": "spectral", "nesterov": False}, {"scale": 0.7, "orth": "polar", "eps": 1e-3}], ids=str
)
def test_normuon(shape, dtype, options):
    start, eps = randn(shape, dtype, 9), options.get("eps", 1e-7)
    reference = muon.Muon(start, 0.03, momentum=0.8, ema=True, decay2=0.7, weight_decay=0.1, **({"eps": eps} | options))
    rule = NorMuon(0.8, ema=True, decay2=0.7, **{k: v for k, v in own(options).items() if k != "eps"})
    optimizer, p = follow("normuon", start, reference, 1e-8, rule=rule, lr=0.03, weight_decay=0.1, eps=eps)
    close(optimizer.state[p]["moment.rows"], reference.v[:, 0])


@pytest.mark.parametrize(("ours", "theirs"), [("match", "match_rms"), (1.0, "preserve_norm")])
def test_normuon_is_that_of_pytorch_optimizer(ours, theirs):
    """Which iterates in bfloat16, good for two digits of a direction; both ways of choosing the length."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    start = randn((12, 20), torch.float32, 9)
    rule = NorMuon(0.9, ema=True, decay2=0.7, scale=ours)
    p, optimizer = lone(start, rank=1.0, rule=rule, lr=0.01, weight_decay=0.1, eps=1e-10)
    q = torch.nn.Parameter(start.clone())
    groups = [{"params": [q], "use_muon": True}]
    hyper = {"lr": 0.01, "momentum": 0.9, "beta2": 0.7, "weight_decay": 0.1, "update_scale": theirs}
    peer = pytorch_optimizer.NorMuon(groups, **hyper)
    for g in gradients((12, 20), torch.float32)[:7]:
        step(optimizer, p, g)
        step(peer, q, g)
    assert (p - q).norm() < 0.03 * (q - start).norm()


def test_normuon_of_spectral_weights_has_a_second_moment_for_each_row_of_all_frequencies():
    rule, x = NorMuon(0.0, method="polar", decay2=0.5, scale=1.0), randn((3, 4, 2, 2), COMPLEX, 3)
    state = {"moment.rows": torch.zeros(3, dtype=REAL)}
    rule.absorb(x, state, CLOCK)
    d = rule.direction(state, CLOCK, 0.0)
    each = {k: muon.polar(x[:, :, *k]) for k in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    v = 0.5 * sum(o.abs().square().mean(1) for o in each.values()) / 4
    close(state["moment.rows"], v)
    for k, o in each.items():
        p = o / v.sqrt()[:, None]
        close(d[:, :, *k], p * o.norm() / p.norm())


def test_a_row_without_gradients_stays_where_it_is():
    """Rounding is not brought to unit length, nor divided by its own root."""
    x = randn((5, 8), torch.float32, 3)
    x[2] = 0
    for rule in (Muon(after="rows"), Muon(method="polar", after="both"), Muon(before="rows"), NorMuon(method="polar")):
        state = {"moment.first": torch.zeros(5, 8), "moment.rows": torch.zeros(5)}
        for _ in range(5):
            rule.absorb(x, state, CLOCK)
            d = rule.direction(state, CLOCK, 1e-8)
        assert not d[2].any(), rule
        assert d[:2].any()


def test_polar_express_are_the_published_polynomials():
    """The first and the last of the paper's listing, before its safety factor, and what they do to singular values."""
    first, *_, last = muon.polar_express(8, safety=1.0)
    assert first == pytest.approx([8.28721201814563, -23.595886519098837, 17.300387312530933], rel=1e-9)
    assert last == pytest.approx([1.875, -1.25, 0.375], rel=1e-6)
    ours, safety = triples("polar-express", 10)
    assert safety == 1.01
    for own_, theirs in zip(ours, muon.polar_express(10), strict=True):
        assert own_ == pytest.approx(theirs, rel=1e-7)
    x = torch.linspace(1e-3, 1, 10_001, dtype=REAL)
    for a, b, c in ours[:7]:
        x = a * x + b * x**3 + c * x**5
    assert (x - 1.01).abs().max() < 0.05


@FIELDS
@pytest.mark.parametrize("options", [{}, {"orth": "polar", "scale": "spectral"}], ids=str)
def test_without_momentum_the_gradient_is_orthogonalized_and_nothing_is_kept(dtype, options):
    """Not even beside a matrix: its state is the step count."""
    start = randn((5, 8), dtype, 9)
    reference = muon.Muon(start, 0.03, momentum=0.0, nesterov=False, weight_decay=0.1, eps=1e-7, **options)
    rule = Muon(decay=0.0, method=options.get("orth", "newton-schulz"), scale=options.get("scale", "match"))
    optimizer, p = follow("orthogonal-sgd", start, reference, rule=rule, lr=0.03, weight_decay=0.1, eps=1e-7)
    assert optimizer.state[p].keys() == {"tick", "step"}
    assert comoving.state_bytes(optimizer) == 4


def test_a_rule_without_momentum_is_refused_in_a_frame():
    with pytest.raises(ValueError, match=r"rule=Muon.* is refused: p0 is projected, and it keeps no momentum"):
        comoving.LowRankOptimizer([("p0", torch.nn.Parameter(randn((6, 8), REAL)))], 0.1, 2, rule=Muon(decay=0.0))


@pytest.mark.parametrize("over", ["auto", "flat"])
def test_muon_sees_a_real_tensor_as_a_matrix(over):
    start = randn((4, 3, 5), REAL, 9)
    reference = muon.Muon(start, 0.03, momentum=0.8, flatten=True)
    follow("muon", start, reference, rule=Muon(decay=0.8, over=over), lr=0.03, weight_decay=0.0, eps=1e-7)


def test_muon_sees_a_spectral_weight_as_a_matrix_per_frequency():
    start = randn((4, 5, 3, 2), COMPLEX, 9)
    p, optimizer = lone(start, rank=1.0, rule=Muon(decay=0.8), lr=0.03, weight_decay=0.1, eps=1e-7)
    parts = {k: muon.Muon(start[:, :, *k], 0.03, momentum=0.8, weight_decay=0.1) for k in [(0, 0), (2, 1), (1, 0)]}
    for g in gradients((4, 5, 3, 2), COMPLEX):
        step(optimizer, p, g)
        for k, reference in parts.items():
            close(p.detach()[:, :, *k], reference.step(g[:, :, *k]))


def test_each_skips_modes_of_length_one():
    x = randn((1, 4, 1, 5, 3), REAL, 2)
    rule, state = Muon(nesterov=False, over="each", method="polar", scale=1.0), {"moment.first": torch.zeros_like(x)}
    rule.absorb(x, state, CLOCK)
    d = rule.direction(state, CLOCK, 1e-8)
    close(d[0, :, 0, :, 2], muon.polar(x[0, :, 0, :, 2]))


@pytest.mark.parametrize("match", [("match", "match_rms_adamw"), ("spectral", "original")])
def test_muon_is_torchs(match):
    """Torch iterates in bfloat16, which is good for two digits of a direction."""
    start = randn((12, 20), torch.float32, 9)
    p, optimizer = lone(start, rank=1.0, rule=Muon(ema=True, scale=match[0]), lr=0.01, weight_decay=0.1, eps=1e-7)
    q = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon([q], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn=match[1])
    for g in gradients((12, 20), torch.float32)[:7]:
        step(optimizer, p, g)
        step(theirs, q, g)
    assert (p - q).norm() < 0.03 * (q - start).norm()


@FIELDS
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 4)], ids=str)
def test_iterations_bring_singular_values_near_one(shape, dtype):
    x = randn(shape, dtype, 3)
    values = torch.linalg.svdvals(newton_schulz(x, [(3.4445, -4.7750, 2.0315)] * 5, 1e-7, dtype))
    assert 0.6 < values.min() and values.max() < 1.3
    o = polar(x) if shape[-2] >= shape[-1] else polar(x).mH
    close(o.mH @ o, torch.eye(3).to(dtype).expand(*shape[:-2], 3, 3))


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_lion(shape, dtype, own):
    start = randn(shape, dtype, 9)
    reference = lion.Lion(start, 0.03, betas=(0.8, 0.95), weight_decay=0.1)
    rule = {"rule": Lion(b1=0.8, b2=0.95)} if own else {"betas": (0.8, 0.95)}
    follow("lion", start, reference, lr=0.03, weight_decay=0.1, **rule)


@FIELDS
@pytest.mark.parametrize("shape", [(5, 8), (4, 3, 5), (6, 1, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": -0.6, "b1": 0.7, "d": 0.3, "momentum_on": "gradient"},
        {"decay": -0.6, "b1": 0.7, "d": 0.3, "momentum_on": "update"},
        {"b2": 0.95, "b1": 0.7, "d": None, "eps1": 1e-3, "momentum_on": "gradient"},
        {"b2": 0.95, "b1": 0.7, "d": 0.3, "eps1": 0.0},
    ],
    ids=str,
)
def test_adafactor(shape, dtype, options):
    start = randn(shape, dtype, 9)
    reference = adafactor.Adafactor(start, 0.03, weight_decay=0.1, **options)
    rule = Adafactor(
        decay=None if "b2" in options else options.get("decay", -0.8),
        floor=options.get("eps1", 1e-30),
        clip=options.get("d", 1.0),
        average=options.get("momentum_on", "update"),
    )
    betas = (options.get("b1", 0.0), options.get("b2", 0.999))
    follow("adafactor", start, reference, rule=rule, betas=betas, lr=0.03, weight_decay=0.1)


@pytest.mark.parametrize("shape", [(5, 8), (6, 6), (4, 3, 5), (7, 11)], ids=str)
def test_smmf(shape):
    start = randn(shape, REAL, 9)
    reference = smmf.SMMF(start, 0.03, beta=0.8, growth=0.99, decay=-0.7, eps=1e-3, weight_decay=0.1)
    optimizer, p = follow(
        "smmf", start, reference, rule=Scheduled(growth=0.99, decay=-0.7), betas=(0.8, 0.5), eps=1e-3, lr=0.03,
        weight_decay=0.1,
    )  # fmt: skip
    state = optimizer.state[p]
    close(
        state["moment.second.rows"][:, None] * state["moment.second.columns"], torch.outer(reference.r_v, reference.c_v)
    )
    assert state["moment.first.signs"].shape == (-(-p.numel() // 8),)


def test_scheduled_decay_rates_in_full_precision():
    """Complex moments, without the codec: the formulas written out."""
    start = randn((4, 5), COMPLEX, 9)
    p, optimizer = lone(start, rank=1.0, rule=Scheduled(), betas=(0.8, 0.9), eps=1e-3, lr=0.03, weight_decay=0.1)
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros(4, 5, dtype=REAL)
    for t, g in enumerate(gradients((4, 5), COMPLEX), start=1):
        b1, b2 = 0.8 * 0.999 ** (t - 1), 1 - t**-0.5
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.abs() ** 2
        w = w * (1 - 0.003) - 0.03 * m / (v.sqrt() + 1e-3)
        step(optimizer, p, g)
        close(p.detach(), w)


@FIELDS
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("shape", "side"), [((6, 9), "left"), ((9, 6), "left"), ((6, 9), "right"), ((9, 6), "auto")])
@pytest.mark.parametrize("orthonormal", [False, True])
def test_dion(shape, side, iterations, dtype, orthonormal):
    """On either side: a frame of columns is Dion of the transpose at the other scale."""
    start, seed = randn(shape, dtype, 9), 3
    left = side == "left"
    turn = (lambda x: x) if left else (lambda x: x.mT)
    g0 = gradients(shape, dtype)[0]
    ranks = (3, None) if left else (None, 3)
    first = Modes().start(g0, ranks, None, seed).factors[0 if left else 1]
    q = turn(g0).mH @ first
    lr = 0.03 if left else 0.03 * shape[0] / shape[1]
    hyper = {"mu": 0.7, "eps": 1e-3, "weight_decay": 0.003 / lr, "power_iters": iterations, "orthonormal": orthonormal}
    reference = dion.Dion(turn(start), lr, q, **hyper)

    class Turned:
        def step(self, g):
            return turn(reference.step(turn(g)))

    finder = comoving.finders.Amortized(iterations=iterations)
    optimizer, p = follow(
        "dion", start, Turned(), finder=finder, residual=MomentumBuffer(decay=0.7), eps=1e-3, lr=0.03, weight_decay=0.1,
        rank=3, side=side, seed=seed, rule=Columns(orthonormal=orthonormal),
    )  # fmt: skip
    close(turn(optimizer.state[p]["feedback.momentum.value"]), reference.m)


def test_dion_with_a_zero_gradient_first_begins_at_the_next():
    start, shape = randn((6, 9), REAL, 9), (6, 9)
    p, optimizer = lone(start, **(dict(comoving.recipes()["dion"].options) | {"rank": 3, "lr": 0.1, "seed": 3}))
    step(optimizer, p, torch.zeros(shape, dtype=REAL))
    close(p.detach(), start * (1 - 0.1 * 0.01))
    g = randn(shape, REAL, 4)
    first = Modes().start(g, (3, None), None, 3).factors[0]
    reference = dion.Dion(p.detach(), 0.1, g.mH @ first, weight_decay=0.01)
    for t in range(5):
        step(optimizer, p, randn(shape, REAL, 4 + t))
        close(p.detach(), reference.step(randn(shape, REAL, 4 + t)))


@FIELDS
def test_an_accumulated_gradient_is_one_gradient_to_the_buffer(dtype):
    """While the frame stands: two calls of absorb are one with the sum."""
    options = dict(comoving.recipes()["dion"].options) | {"rank": 3, "lr": 0.1, "refresh_every": 3}
    (p, once), (q, twice) = (lone(randn((6, 9), dtype, 9), **options) for _ in range(2))
    for t in range(8):
        a, b = randn((6, 9), dtype, t), randn((6, 9), dtype, 50 + t)
        opening = t % 3 == 0
        once.absorb(p, a + (0 if opening else b))
        twice.absorb(q, a)
        if not opening:
            twice.absorb(q, b)
        once.apply(p), twice.apply(q)
        close(p.detach(), q.detach())
        close(once.state[p]["feedback.momentum.value"], twice.state[q]["feedback.momentum.value"])


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=str)
def test_dion_with_a_coded_buffer_stays_close(codec):
    start = randn((24, 40), torch.float32, 9)
    options = dict(comoving.recipes()["dion"].options) | {"rank": 6, "lr": 0.02}
    (p, exact), (q, coded) = lone(start, **options), lone(start, **(options | {"codec": codec}))
    low = known_rank((24, 40), (6, None), torch.float32, 1)  # in noise alone any frame is as good as another
    for g in gradients((24, 40), torch.float32):
        step(exact, p, low + 0.1 * g)
        step(coded, q, low + 0.1 * g)
    assert (p - q).norm() < (0.02 if isinstance(codec, Int8) else 0.2) * (p - start).norm()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": "spectral", "side": "both"}, "scale='spectral' is refused.*one compressed side"),
        ({"rule": Scheduled()}, "transport=.*bias correction"),
        (
            {"rule": Adafactor(average="update"), "residual": Feedback(), "finder": comoving.finders.Exact()},
            "residual=.*no average of gradients",
        ),
        ({"rule": Adafactor(average="update"), "finder": comoving.finders.Power(inertia=0.5)}, "finder=.*look at"),
    ],
    ids=str,
)
def test_bad_combinations_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        lone(randn((16, 24)), rank=4, **options)


def test_columns_take_the_compressed_mode():
    z = randn((3, 8), REAL, 1)
    for rule, x in ((Columns(), z), (Columns(), z.mT), (Columns(along="right"), z.mT), (Columns(along="left"), z)):
        state = {"moment.first": torch.zeros_like(x)}
        rule.absorb(x, state, CLOCK)
        d = rule.direction(state, CLOCK, 0.0)
        short = 0 if x.shape[0] == 3 else 1
        close(d.square().mean(1 - short), torch.ones(3, dtype=REAL))
    assert unfold(d, 0).shape == (3, 8)
