"""Budgets in units and shares, and what they assign: ranks and codecs over the whole model."""

import copy
import io
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import comoving
from comoving import AdamW, LowRankOptimizer, explain, state_bytes
from comoving.allocation import _hull, frontier
from comoving.codecs import BFloat16, Full, Int4, Int8, RankOne, Root
from comoving.codecs.noise import noise
from comoving.finders import Exact
from comoving.frames import Blocks
from comoving.race import contenders
from comoving.ranks import Energy
from comoving.ranks import assignment as assignments
from comoving.ranks.budget import Claim
from comoving.ranks.limit import parse_budget
from comoving.residual import Discard, Feedback
from comoving.rules import Shampoo
from comoving.state import RANKS
from comoving.transport import Carry
from contract.support import cells

ORDER = [Full(), BFloat16(), Int8(), Int4()]


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(randn((48, 96), 0))
        self.square = nn.Parameter(randn((64, 64), 1))
        self.spectral = nn.Parameter(randn((12, 10, 9), 2, torch.complex64))
        self.bias = nn.Parameter(randn((7,), 3))


def build(budget, model=None, **options):
    model = model or Model()
    options = {"codec": "auto", "moments": "auto", "refresh_every": 2, **options}
    return model, AdamW(model.named_parameters(), 1e-2, options.pop("rank", 0.5), budget=budget, **options)


def feed(model, optimizer, t):
    for i, p in enumerate(model.parameters()):
        p.grad = randn(p.shape, 100 * t + i, p.dtype)
    optimizer.step()


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        x, y = a[1].state[p], b[1].state[q]
        assert x.keys() == y.keys()
        assert all(torch.equal(v, y[n]) if isinstance(v, torch.Tensor) else v == y[n] for n, v in x.items())


# --------------------------------------------------------------------------------------------------------- what is give


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (400, 400), ("400MB", 4 * 10**8), (" 1.5 gib ", 3 * 2**29), ("7b", 7), ("2KiB", 2048),
        (0.25, 0.25), ("25%", 0.25), (" 12.5 % ", 0.125), (1.0, 1.0), ("100%", 1.0), (None, None),
    ],
)  # fmt: skip
def test_budgets_are_read(given, meant):
    assert parse_budget(given) == meant
    assert type(parse_budget(given)) is type(meant)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("400", ValueError, "GiB"), ("4 parsecs", ValueError, "unknown unit 'parsecs'.*KiB"), 
        ("0MB", ValueError, "0MB"),
        ("-1MB", ValueError, "-1MB"), ("0%", ValueError, "0%"), ("101%", ValueError, "101%"), ("x%", ValueError, "x%"),
        (0.0, ValueError, "0.0"), (1.5, ValueError, "1.5"), (math.nan, ValueError, "nan"), (0, ValueError, ">= 1 byte"),
        ([1], TypeError, "share of AdamW"), ("nan%", ValueError, "nan%"),
    ],
)  # fmt: skip
def test_bad_budgets_are_refused(given, error, text):
    with pytest.raises(error, match=f"budget must be .*{text}"):
        build(given)


def test_auto_without_a_budget_is_eight_bits_for_what_is_projected_and_a_rule_takes():
    p = nn.Parameter(torch.zeros(32, 32))
    for role in ("codec", "moments"):
        optimizer = LowRankOptimizer([p], rank=4, **{role: "auto"})
        assert getattr(optimizer.sites[p], role) == Int8()
        whole = LowRankOptimizer([p], rank=1.0, **{role: "auto"})
        assert getattr(whole.sites[p], role) is None
        assert whole.sites[p].plain
    newton = LowRankOptimizer([p], rank=4, rule=Shampoo(root="newton", exponent=0.25), moments="auto")
    assert newton.sites[p].moments == Full()


def test_unmeetable_budgets_say_what_is_missing():
    with pytest.raises(ValueError, match=r"at least (\d+) bytes.*coarsest codecs.*got 2000$") as caught:
        build(2000)
    words = str(caught.value).replace(",", "").split()
    least, missing = int(words[words.index("least") + 1]), int(words[words.index("more") - 1])
    assert least - missing == 2000
    model, optimizer = build(least)
    feed(model, optimizer, 0)
    assert state_bytes(optimizer, projected=True) == least
    with pytest.raises(ValueError, match=f"{1} more than it allows"):
        build(least - 1)
    with pytest.raises(ValueError, match="0.01 of AdamW's state"):
        build("1%")


@pytest.mark.parametrize("share", [0.12, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("policy", [None, Energy(low=0.9, high=0.95)], ids=["fixed", "adaptive"])
def test_a_share_of_what_adamw_keeps_is_never_exceeded(share, policy):
    adaptive = {} if policy is None else {"ranks": policy, "transport": Carry()}
    model, optimizer = build(share, rank=0.3, **adaptive)
    rival = torch.optim.AdamW([p for p in model.parameters() if optimizer.sites[p].projected])
    twin = copy.deepcopy(rival)
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    twin.step()
    allowed, used = share * state_bytes(twin), []
    assert optimizer.limit() == math.floor(allowed)
    for t in range(10):
        feed(model, optimizer, t)
        used.append(state_bytes(optimizer, projected=True))
        assert used[-1] <= allowed
    if share < 0.5 or policy is not None:
        assert max(used) > 0.9 * allowed
    late = nn.Parameter(randn((40, 40), 5))
    optimizer.add_param_group({"params": [("late", late)]})
    assert optimizer.limit() == math.floor(share * (state_bytes(twin) + 8 * 1600 + 4))
    for t in range(10, 14):
        late.grad = randn((40, 40), t)
        feed(model, optimizer, t)
        assert state_bytes(optimizer, projected=True) <= optimizer.limit()


# -------------------------------------------------------------------------------------------------------- the assignmen


@pytest.mark.parametrize("codec", [Full(), BFloat16(), Int8(), Int4(), Int4(table="linear"), Root(), Root(64, bits=4)])
@pytest.mark.parametrize("width", [24, 64, 250])
def test_the_noise_of_a_rounding_is_what_is_measured(codec, width):
    x = randn((2000, width), 1, torch.float64)
    given = x.square() if isinstance(codec, Root) else x
    stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(x.shape, x.dtype).items()}
    codec.encode(given.clone(), stored)
    back = codec.decode(stored, tuple(x.shape), x.dtype)
    lost = (back.sqrt() - x.abs() if isinstance(codec, Root) else back - x).square().sum() / x.square().sum()
    assert noise(codec, (2000, width), x.dtype) == pytest.approx(float(lost), rel=0.03)


def test_noise_in_an_average_adds_up_as_stated():
    """m <- a m + (1 - a) z, rounded at every step: 1/(1 - a^2) times the noise of one rounding."""
    codec, exact = Int8(), torch.zeros(64, 256, dtype=torch.float64)
    kept, ratios = exact.clone(), []
    for t in range(120):
        z = randn(exact.shape, t, torch.float64)
        exact, kept = 0.9 * exact + 0.1 * z, 0.9 * kept + 0.1 * z
        stored = {n: torch.zeros(p.shape, dtype=p.dtype) for n, p in codec.schema(kept.shape, kept.dtype).items()}
        codec.encode(kept.clone(), stored)
        kept = codec.decode(stored, tuple(kept.shape), kept.dtype)
        ratios.append(float((kept - exact).square().sum() / exact.square().sum()))
    expected = noise(codec, (64, 256), torch.float64) / (1 - 0.81)
    assert sum(ratios[60:]) / 60 == pytest.approx(expected, rel=0.05)


def harmonic(n):
    return sum(1 / j for j in range(1, n + 1))


def loss_of(shape, mode, rank, codec, moments):
    """The documented loss of a real matrix with one compressed side, float32, Adam at 0.9."""
    core = tuple(rank if n == mode else d for n, d in enumerate(shape))
    energy = harmonic(rank) / harmonic(shape[mode])
    root = 0.25 if isinstance(moments, BFloat16) else 1.0
    moment = noise(moments, core, torch.float32) / (1 - 0.81) + root * noise(moments.positive, core, torch.float32)
    buffer = noise(codec, shape, torch.float32)
    return math.prod(shape) * (1 - energy + energy * moment + (1 - energy) / energy * buffer)


def measured(shape, rank, codec, moments):
    """Bytes of a real state after a step."""
    p = nn.Parameter(torch.zeros(shape))
    p.grad = randn(shape, 0)
    optimizer = LowRankOptimizer([p], rank=rank, codec=codec, moments=moments, residual=Feedback())
    optimizer.step()
    return state_bytes(optimizer)


def test_the_assignment_is_within_its_guarantee_of_the_best_there_is():
    shapes = [(24, 40), (32, 32), (20, 72)]
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    table = []
    for shape in shapes:
        table.append([
            (measured(shape, (r, None), c, m), loss_of(shape, 0, r, c, m), (r, None), c, m)
            for r in (16, 8, 1) for c in ORDER for m in ORDER
        ])  # fmt: skip
    exact = 0
    options = dict(rank=(16, None), residual=Feedback(), codec="auto", moments="auto")
    steps = [max(b[1] - a[1] for a, b in itertools.pairwise(hull_of(known))) for known in table]
    least, most = (sum(pick(o[0] for o in known) for known in table) for pick in (min, max))
    for share in (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 0.95):
        budget = int(least + share * (most - least))
        optimizer = LowRankOptimizer(params, budget=budget, **options)
        total, found = 0, 0.0
        for p, known in zip(params, table, strict=True):
            site = optimizer.sites[p]
            size, loss, *_ = next(o for o in known if o[2:] == (site.ranks, site.codec, site.moments))
            total, found = total + size, found + loss
        assert total <= budget
        best = least_loss(table, budget)
        assert best - 1e-9 <= found <= best + max(steps)
        exact += found <= best + 1e-9
        again = LowRankOptimizer(params, budget=budget, **options)
        assert again.sites == optimizer.sites
    assert exact >= 5


def hull_of(options):
    """Lower convex hull of (bytes, loss), from the least loss down."""
    best = min(options, key=lambda o: (o[1], o[0]))
    hull = [best]
    while left := [o for o in options if o[0] < hull[-1][0]]:
        at = hull[-1]
        hull.append(min(left, key=lambda o: ((o[1] - at[1]) / (at[0] - o[0]), o[0])))
    return hull


def least_loss(table, budget):
    """Over every combination."""
    return min(
        a[1] + b[1] + c[1]
        for a in table[0] for b in table[1] if a[0] + b[0] <= budget
        for c in table[2] if a[0] + b[0] + c[0] <= budget
    )  # fmt: skip


def test_eight_bits_come_before_rank_and_finer_budgets_lose_less():
    losses = []
    for share in (0.95, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.11):
        model, optimizer = build(share)
        sites = [s for s in optimizer.sites.values() if s.projected]
        claims = [Claim(s, optimizer.param_groups[0], {}) for s in sites]
        losses.append(sum(loss_at(claim) for claim in claims))
        for claim in claims[:2]:  # the matrices; a core of rank 1 is no longer than a block
            asked = claim._replace(site=replace(claim.site, ranks=claim.site.base, codec=Full(), moments=Full()))
            walk = _hull(frontier(assignments.options(asked._replace(site=assignments._asked(asked)))))
            assert (walk[0].ranks, walk[0].codec, walk[0].moments) == (claim.site.base, Full(), Full())
            lowered = [o for o in walk if o.ranks != claim.site.base and 1 not in o.ranks]
            assert lowered and all(ORDER.index(c) >= 2 for o in lowered for c in (o.codec, o.moments))
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert any(s.ranks != s.base for s in sites)


def loss_at(claim):
    asked = claim._replace(site=replace(claim.site, codec=Full(), moments=Full()))
    fits = [o for o in assignments.options(asked) if (o.ranks, o.codec, o.moments) == keys(claim.site)]
    return fits[0].loss


def keys(site):
    return site.ranks, site.codec, site.moments


def test_groups_are_assigned_together_and_again_when_one_joins():
    a, b, c = (nn.Parameter(torch.zeros(48, 64)) for _ in range(3))
    options = dict(rank=0.5, residual=Feedback(), codec="auto", moments="auto")
    together = LowRankOptimizer([a, b, c], budget=60_000, **options)
    apart = LowRankOptimizer([{"params": [p]} for p in (a, b, c)], budget=60_000, **options)
    joined = LowRankOptimizer([a], budget=60_000, **options)
    assert joined.sites[a].codec == joined.sites[a].moments == Full()
    for p in (b, c):
        joined.add_param_group({"params": [p]})
    for p in (a, b, c):
        assert keys(together.sites[p]) == keys(apart.sites[p]) == keys(joined.sites[p])
    assert all(g["codec"] == Full() == g["moments"] for o in (together, apart, joined) for g in o.param_groups)
    a.grad = randn((48, 64), 0)
    joined.step()
    before = keys(joined.sites[a])
    joined.add_param_group({"params": [nn.Parameter(torch.zeros(24, 24))], "codec": Int4(), "moments": Int8()})
    late = joined.param_groups[-1]["params"][0]
    assert joined.sites[late].codec is None and joined.param_groups[-1]["codec"] == Int4()
    assert keys(joined.sites[a]) == before  # what has a state keeps it
    joined.step()
    assert state_bytes(joined, projected=True) <= 60_000


def test_what_a_rule_cannot_take_is_not_assigned():
    p = nn.Parameter(torch.zeros(64, 64))
    claim = LowRankOptimizer(
        [p], rank=0.5, rule=Shampoo(root="newton"), residual=Feedback(), codec="auto", moments="auto", budget="1GB"
    )
    own = claim.roster.claim(p)
    assert {o.moments for o in assignments.options(own)} == {Full()}
    assert {o.codec for o in assignments.options(own)} == set(ORDER)
    with pytest.raises(TypeError, match="noise"):
        noise(RankOne(), (4, 4), torch.float32)


def test_experts_share_codecs_and_train():
    p = nn.Parameter(randn((4, 24, 32), 0))
    options = dict(rank=0.5, frame=Blocks(), residual=Feedback(), codec="auto", moments="auto")
    optimizer = LowRankOptimizer([p], budget="42%", **options)
    assert ORDER.index(optimizer.sites[p].codec) >= 2 and ORDER.index(optimizer.sites[p].moments) >= 2
    for t in range(4):
        p.grad = randn(p.shape, t)
        optimizer.step()
        assert state_bytes(optimizer, projected=True) <= optimizer.limit()
    other = LowRankOptimizer([p], budget=10**6, **options)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.sites[p].codec == Full()
    other.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("options", [{"codec": "auto"}, {"moments": "auto"}, {"codec": "auto", "moments": "auto"}])
@pytest.mark.parametrize("recipe", comoving.recipes())
def test_every_recipe_is_assigned_codecs_and_steps_or_is_refused_at_construction(recipe, options):
    """Also where the budget cannot be met in full precision; trees have more ranks than their tensor has modes."""
    if comoving.recipes()[recipe].full_rank:
        with pytest.raises((ValueError, TypeError), match="have nothing to act on|'comoving' chooses"):
            comoving.build(recipe, Model(), 1e-2, budget=0.9, **options)
        return
    for limit in (300_000, 80_000, 100):
        model = Model()
        try:
            optimizer = comoving.build(recipe, model, 1e-2, budget=limit, **options)
        except ValueError as error:
            assert limit < 300_000
            assert "budget must be at least" in str(error)
            continue
        assert limit > 100
        for t in range(2):
            feed(model, optimizer, t)
        assert state_bytes(optimizer, projected=True) <= limit
        assert all(p.isfinite().all() for p in model.parameters())


def test_the_table_shows_each_parameters_codecs():
    model, optimizer = build(0.2)
    table = explain(optimizer)
    assert "buffer / moments" in str(table) and "Int4 / Int8" in str(table)
    for row in table.rows:
        site = optimizer.sites[dict(model.named_parameters())[row.parameter]]
        assert (row.codec, row.moments) == (site.codec, site.moments)
    feed(model, optimizer, 0)
    assert sum(r.bytes for r in table.rows if r.projected) == state_bytes(optimizer, projected=True)
    assert "buffer" not in str(explain(LowRankOptimizer(Model().named_parameters())))


def test_contenders_of_a_race_can_have_assigned_codecs():
    contender = contenders.parse("comoving-adamw:budget='25%';codec=auto;moments=auto")
    optimizer = contender.build(Model(), 1e-3, 0.25, 0.0)
    assert optimizer.budget == 0.25
    assert any(site.codec != Full() for site in optimizer.sites.values() if site.projected)
    with pytest.raises(ValueError, match="full rank: budget"):
        comoving.build("adamw", Model(), budget=0.5, moments="auto")


# ----------------------------------------------------------------------------------------------------------- checkpoint


@pytest.mark.parametrize("policy", [None, Energy(low=0.9, high=0.95)], ids=["fixed", "adaptive"])
def test_resumed_training_is_bitwise_the_same(policy):
    adaptive = {} if policy is None else {"ranks": policy, "transport": Carry()}
    model, optimizer = build(0.2, **adaptive)
    saved = {}
    for t in range(8):
        feed(model, optimizer, t)
        saved[t] = copy.deepcopy(model), through_file(optimizer.state_dict())
    for start in (0, 1, 4):
        resumed, state = saved[start]
        _, other = build(0.2, resumed, **adaptive)
        other.load_state_dict(state)
        twin = copy.deepcopy((resumed, other))
        for own in ((resumed, other), twin):
            for t in range(start + 1, 8):
                feed(*own, t)
            same(own, (model, optimizer))


@pytest.mark.parametrize(("before", "after"), [(0.2, 0.35), (1.0, 0.2), (0.15, 1.0), (0.2, None)])
def test_another_assignment_takes_over_what_was_saved(before, after):
    model, optimizer = build(before, ranks=Energy(low=0, high=1.0), transport=Carry())
    for t in range(5):
        feed(model, optimizer, t)
    auto = {} if after else {"codec": Full(), "moments": Full()}
    twin = copy.deepcopy(model)
    _, other = build(after, twin, ranks=Energy(low=0, high=1.0), transport=Carry(), **auto)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        site = optimizer.sites[p]
        if site.projected:
            one, two = (momenta(o, x) for o, x in ((optimizer, p), (other, q)))
            assert float((one - two).norm() / one.norm()) < 0.2
            assert bool(one.any())
    for t in range(5, 9):
        feed(twin, other, t)
    assert all(bool(torch.isfinite(p).all()) for p in twin.parameters())
    if after:
        assert state_bytes(other, projected=True) <= other.limit()


def momenta(optimizer, p):
    (unit,) = cells(optimizer, p)
    return unit.frame.lift(unit.moments["moment.first"])


def test_a_checkpoint_of_fixed_codecs_is_refused_with_the_reason():
    model, optimizer = build(None, codec=Int8(), moments=Int8())
    feed(model, optimizer, 0)
    with pytest.raises(ValueError, match="another recipe.*codec: saved.*Int8.*here.*Full"):
        build(0.3, model)[1].load_state_dict(optimizer.state_dict())


# --------------------------------------------------------------------------------------------------- where the energy i


def test_rank_moves_to_where_the_energy_is():
    """Gradients of rank 2 and 12, a budget for 8 and 8: the second gets its 12, the first keeps 2."""
    few, many = (nn.Parameter(torch.zeros(32, 32)) for _ in range(2))
    factors = {few: (randn((32, 2), 1), randn((2, 32), 2)), many: (randn((32, 12), 3), randn((12, 32), 4))}
    policy = Energy(low=0.999, high=0.9999, step=1)
    options = dict(rank=(8, None), ranks=policy, transport=Carry(), finder=Exact(), refresh_every=1, residual=Discard())
    probe = LowRankOptimizer([few, many], **options, moments=Int8())
    size = sum(probe.roster.claim(p).bytes_at((8, None)) for p in (few, many))
    optimizer = LowRankOptimizer([few, many], budget=size, moments="auto", **options)
    assert optimizer.sites[few].moments == optimizer.sites[many].moments == Int8()
    for t in range(20):
        for i, (p, (left, right)) in enumerate(factors.items()):
            inner = randn((left.shape[1],) * 2, 50 + 2 * t + i) / 8 + torch.eye(left.shape[1])
            p.grad = left @ inner @ right
        optimizer.step()
        assert state_bytes(optimizer, projected=True) <= size
    assert optimizer.state[few][RANKS].tolist() == [2, -1]
    assert optimizer.state[many][RANKS].tolist() == [12, -1]
