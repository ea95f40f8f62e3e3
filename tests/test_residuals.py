"""What lies outside the frame: each recipe against its paper's reference, and what the papers leave open."""

import math

import pytest
import torch

import comoving
from comoving.codecs import Full, Int8
from comoving.finders import Exact, RandomProjection
from comoving.frames import Seeded
from comoving.residual import Channel, Discard, Feedback, Fira, Sign, Sparse
from comoving.residual.gains import brake
from comoving.transport import Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, RESIDUALS, Holder, close, feedback_of, frame_of, lone, randn, step
from references.algebra import every
from references.apollo import Apollo
from references.fira import Fira as FiraReference
from references.frugal import Frugal
from references.tensorgrad import TensorGRaD

HYPER = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
STEPS = 50
HOLDING = [residual for residual in RESIDUALS if not isinstance(residual, Discard | Feedback)]
FIELDS = pytest.mark.parametrize("dtype", [REAL, COMPLEX])
MATRICES = pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)], ids=["wide", "tall", "square"])


def gradients(shape, dtype, seed):
    """A drifting signal in noise, whose size goes up and down: the limiter acts in some steps and not in others."""
    low, high = randn(shape, dtype, seed), randn(shape, dtype, seed + 1)
    series = [
        low * (1 - t / STEPS) + high * (t / STEPS) + 0.5 * randn(shape, dtype, 70 * seed + t) for t in range(STEPS)
    ]
    return [g * (1 + 0.5 * math.sin(t)) for t, g in enumerate(series)]


def built(recipe, shape, dtype, rank, **options):
    """Two parameters of one shape, so that their refreshes are staggered, and the optimizer of both."""
    model = Holder(randn(shape, dtype, 1), randn(shape, dtype, 2))
    optimizer = comoving.build(recipe, model, rank=rank, **(HYPER | options))
    params = list(model.parameters())
    assert all(optimizer.sites[p].projected for p in params)
    return params, optimizer


def follow(params, optimizer, references, check=lambda p, reference, g, t: None):
    """Step both sides side by side; the optimizer first, so that references can be told its frames."""
    series = [gradients(tuple(p.shape), p.dtype, 10 + i) for i, p in enumerate(params)]
    for t in range(STEPS):
        for p, own in zip(params, series, strict=True):
            p.grad = own[t].clone()
        optimizer.step()
        for p, reference, own in zip(params, references, series, strict=True):
            assert torch.equal(p.grad, own[t])
            close(p.detach(), reference.step(own[t]), 1e-9)
            check(p, reference, own[t], t)
            assert "held" not in optimizer.state[p]


def loaded(optimizer, p):
    """The frame in the state, of whatever layout."""
    state = optimizer.state[p]
    return optimizer.param_groups[0]["frame"].load(state, tuple(p.shape), state["moment.first"])


def one_sided(optimizer, p):
    """U of  z = U^H g  or  z = g U."""
    left, right = loaded(optimizer, p).factors
    return left if right is None else right.conj()


def phased(optimizer, p, period):
    return every(period, optimizer.sites[p].phase)


@FIELDS
@MATRICES
@pytest.mark.parametrize(("per", "growth"), [("channel", 1.01), ("tensor", 1.2), ("channel", None)])
def test_fira(shape, per, growth, dtype):
    residual = Fira(per=per, growth=growth)
    params, optimizer = built("fira", shape, dtype, 2, refresh_every=7, scale=0.3, residual=residual)
    references = [
        FiraReference(
            p.detach(), rank=2, refresh_at=phased(optimizer, p, 7), alpha=0.3, gamma=growth,
            columnwise=per == "channel", first_bounded=True, find=lambda g, old, p=p: one_sided(optimizer, p), **HYPER,
        )
        for p in params
    ]  # fmt: skip

    def check(p, reference, g, t):
        if growth is not None:
            close(optimizer.state[p]["scaled.norm"], torch.tensor(reference.last, dtype=REAL), 1e-9)

    follow(params, optimizer, references, check)


@FIELDS
@MATRICES
@pytest.mark.parametrize("recipe", ["apollo", "apollo-mini"])
@pytest.mark.parametrize("growth", [1.01, None])
def test_apollo(shape, recipe, growth, dtype):
    """The reference gets the frame at the size of a Gaussian one, hence eps at that size too."""
    per, rank = ("tensor", None) if recipe == "apollo-mini" else ("channel", 2)
    params, optimizer = built(recipe, shape, dtype, rank, refresh_every=7, residual=Channel(per=per, growth=growth))
    scale = optimizer.param_groups[0]["scale"]
    assert scale == (math.sqrt(128) if recipe == "apollo-mini" else 1.0)
    rank = 1 if rank is None else rank
    stretch = math.sqrt(min(shape) / rank)
    references = [
        Apollo(
            p.detach(), rank=rank, refresh_at=phased(optimizer, p, 7), scale=scale, channelwise=per == "channel",
            gamma=growth, first_bounded=True, find=lambda g, old, p=p: one_sided(optimizer, p) * stretch,
            **(HYPER | {"eps": 1e-3 * stretch}),
        )
        for p in params
    ]  # fmt: skip
    follow(params, optimizer, references)


class Told:
    """A projector of apollo_torch that projects with our frame."""

    def __init__(self, frame):
        self.frame = frame

    def project(self, gradient, iteration):
        return self.frame().project(gradient)


@MATRICES
@pytest.mark.parametrize(("per", "kind"), [("channel", "channel"), ("tensor", "tensor")])
def test_apollo_is_apollo_torch(shape, per, kind):
    """Where the package follows the paper: without its limiter, eps and weight decay, which it places otherwise.

    Its projection is given ours, so that z is smaller by sqrt(r/d) and the update larger by as much.
    """
    peer = pytest.importorskip("apollo_torch")
    own = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 0.0, "weight_decay": 0.0}
    residual = Channel(per=per, growth=None)
    p, optimizer = lone(
        randn(shape), rank=2, frame=Seeded(), finder=comoving.finders.RandomProjection(), transport=Keep(),
        residual=residual, refresh_every=7, scale=1.5, side="right" if shape[0] >= shape[1] else "left", **own,
    )  # fmt: skip
    q = torch.nn.Parameter(p.detach().clone())
    squared = (1.5 * math.sqrt(2 / min(shape))) ** 2
    group = {"params": [q], "rank": 2, "proj": "random", "scale_type": kind, "scale": squared, "update_proj_gap": 7}
    theirs = peer.APOLLOAdamW([group | {"proj_type": "std"}], disable_nl=True, **own)
    theirs.state[q]["projector"] = Told(lambda: loaded(optimizer, p))
    for g in gradients(shape, REAL, 4):
        step(optimizer, p, g)
        step(theirs, q, g)
        close(p.detach(), q.detach(), 1e-7)  # its 1e-8 is added to the smaller z


@FIELDS
@MATRICES
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_frugal(shape, rate, dtype):
    residual = Sign(rate=rate, floor=1e-3)
    params, optimizer = built("frugal", shape, dtype, 2, refresh_every=7, residual=residual)
    references = [
        Frugal(
            p.detach(), rank=2, refresh_at=phased(optimizer, p, 7), free_scale=rate, free_at=1e-3,
            find=lambda g, old, p=p: one_sided(optimizer, p), **HYPER,
        )
        for p in params
    ]  # fmt: skip
    follow(params, optimizer, references)


@FIELDS
@pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 10), (2, None)), ((6, 4, 5), (2, None, 3)), ((4, 3, 5, 3), (2, 2, 2, None))], ids=str
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("statistics", ["keep", "reset", "carry"])
def test_tensorgrad(shape, ranks, first, statistics, dtype):
    residual = Sparse(fraction=0.11, first=first, scale=0.6, statistics=statistics)
    params, optimizer = built("tensorgrad", shape, dtype, ranks, refresh_every=7, scale=0.8, residual=residual)
    references = [
        TensorGRaD(
            p.detach(), ranks=ranks, density=0.11, refresh_at=phased(optimizer, p, 7), scale=0.8, sparse_scale=0.6,
            order="sparse_first" if first else "low_first",
            sparse_moments="match" if statistics == "carry" else statistics,
            find=lambda g, old, p=p: list(frame_of(optimizer, p).factors), **HYPER,
        )
        for p in params
    ]  # fmt: skip

    def check(p, reference, g, t):
        state = optimizer.state[p]
        assert torch.equal(state["sparse.indices"], reference.indices.int())
        close(state["sparse.moment.second"], reference.sparse[1], 1e-9)

    follow(params, optimizer, references, check)


def test_the_papers_own_settings():
    model = Holder(randn((32, 48)))
    group = {
        name: comoving.build(name, model, rank=None if name == "apollo-mini" else 4).param_groups[0]
        for name in ("fira", "apollo", "apollo-mini", "frugal", "tensorgrad")
    }
    assert {name: g["refresh_every"] for name, g in group.items()} == {
        "fira": 200, "apollo": 200, "apollo-mini": 200, "frugal": 200, "tensorgrad": 1000,
    }  # fmt: skip
    assert {name: g["scale"] for name, g in group.items()} == {
        "fira": 0.25, "apollo": 1.0, "apollo-mini": math.sqrt(128), "frugal": 1.0, "tensorgrad": 1.0,
    }  # fmt: skip
    assert {name: g["rank"] for name, g in group.items()} == {
        "fira": 4, "apollo": 4, "apollo-mini": 1, "frugal": 4, "tensorgrad": 4,
    }  # fmt: skip
    assert group["fira"]["residual"] == Fira(per="channel", growth=1.01)
    assert group["apollo"]["residual"] == Channel(per="channel", growth=1.01)
    assert group["frugal"]["transport"] == Reset()
    assert group["tensorgrad"]["residual"].statistics == "keep"
    assert comoving.build("apollo-mini", model, rank=3).param_groups[0]["rank"] == 3
    assert comoving.build("galore", model).param_groups[0]["rank"] == 0.25


# -------------------------------------------------------------------------------------------------- Fira and APOLLO


@FIELDS
def test_channels_are_the_whole_modes(dtype):
    """phi for each index along the whole modes; one for all where there is none."""
    for ranks, modes in [((2, None, 3, None), (0, 2)), ((2, 2, 2, 1), (0, 1, 2, 3))]:
        shape = (4, 3, 5, 2)
        p, optimizer = lone(
            randn(shape, dtype), rank=ranks, residual=Fira(growth=None), finder=Exact(), scale=0.7, lr=0.1,
            weight_decay=0.0, eps=1e-3,
        )  # fmt: skip
        before, g = p.detach().clone(), randn(shape, dtype, 5)
        step(optimizer, p, g)
        frame = frame_of(optimizer, p)
        z = frame.project(g)
        d = z / (z.abs() + 1e-3)
        phi = torch.linalg.vector_norm(d, dim=modes, keepdim=True) / torch.linalg.vector_norm(
            z, dim=modes, keepdim=True
        )
        close(p.detach(), before - 0.1 * (0.7 * frame.lift(d) + phi * (g - frame.lift(z))), 1e-7)


def test_the_limit_survives_zeros():
    """Zeros neither set the limit nor loosen it; a norm that overflows stops one update alone."""
    last = torch.zeros((), dtype=torch.float32)
    sizes = [float("inf"), 0.0, 1e-4, 50.0, 0.0, float("nan"), 50.0, float("inf"), 1.0, 1.0, 1e-4]
    after = []
    for size in sizes:
        brakes, last = brake(torch.tensor(size), last, 1.01, torch.tensor(5.0))
        assert brakes.isfinite()
        after.append((round(float(brakes), 4), round(float(last), 4)))
    start = [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0), (0.1, 5.0), (1.0, 5.0), (1.0, 5.0)]
    assert after == [*start, (0.101, 5.05), (0.0, 5.05), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("residual", [Fira(), Channel(), Channel(per="tensor")], ids=str)
def test_a_first_gradient_of_zero_is_no_limit(residual):
    p, optimizer = lone(randn((6, 10)), rank=2, residual=residual, lr=0.1, weight_decay=0.0)
    before = p.detach().clone()
    step(optimizer, p, torch.zeros(6, 10, dtype=REAL))
    assert torch.equal(p.detach(), before)
    step(optimizer, p, randn((6, 10), seed=3))
    assert (p.detach() - before).norm() > 0.01


# ---------------------------------------------------------------------------------------------------------- sparse


def chosen(residual, g, times=1, seed_state=None):
    """The indices after so many refreshes with one gradient."""
    schema = residual.schema(Full(), tuple(g.shape), (2,), g.dtype)
    state = {n: torch.zeros(spec.shape, dtype=spec.dtype) for n, spec in schema.items()}
    for _ in range(times):
        residual.renew(g, state, Full())
    return state["sparse.indices"], state


@pytest.mark.parametrize("choose", ["random", "probabilistic"])
def test_draws_are_seeded_and_counted(choose):
    residual, g = Sparse(fraction=0.2, choose=choose), randn((10, 12))
    first, state = chosen(residual, g)
    assert torch.equal(first, chosen(residual, g)[0])
    assert int(state["sparse.draws"]) == 1
    assert not torch.equal(first, chosen(residual, g, times=2)[0])
    assert not torch.equal(first, chosen(Sparse(fraction=0.2, choose=choose, seed=1), g)[0])
    assert len(set(first.tolist())) == 24
    assert (first.diff() > 0).all()


def test_how_often_an_entry_is_drawn():
    """A single entry: in proportion to |g|, or evenly."""
    g = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=REAL)
    for choose, expected in [("probabilistic", [0.1, 0.2, 0.3, 0.4]), ("random", [0.25] * 4)]:
        counts = torch.zeros(4)
        for seed in range(2000):
            counts[int(chosen(Sparse(fraction=0.2, choose=choose, seed=seed), g)[0])] += 1
        assert torch.allclose(counts / 2000, torch.tensor(expected), atol=0.04)


@pytest.mark.parametrize("choose", ["top", "probabilistic"])
def test_a_zero_gradient_leaves_the_choice(choose):
    residual, g = Sparse(fraction=0.1, choose=choose), randn((10, 12))
    before, state = chosen(residual, g)
    residual.renew(torch.zeros_like(g), state, Full())
    assert torch.equal(state["sparse.indices"], before)
    first, _ = chosen(residual, torch.zeros_like(g))
    assert len(set(first.tolist())) == 12


def test_probability_goes_to_where_there_is_something():
    g = torch.zeros(10, 12, dtype=torch.float32)
    g[3] = 1e-30
    assert (chosen(Sparse(fraction=0.1, choose="probabilistic"), g)[0] // 12 == 3).all()


def test_indices_stay_integers_in_bfloat16():
    p, optimizer = lone(randn((16, 24)).bfloat16(), rank=2, residual=Sparse(choose="random"), refresh_every=3)
    step(optimizer, p, randn((16, 24)).bfloat16())
    q, other = lone(p.detach(), rank=2, residual=Sparse(choose="random"), refresh_every=3)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[q]["sparse.indices"].dtype is torch.int32
    assert torch.equal(other.state[q]["sparse.indices"], optimizer.state[p]["sparse.indices"])
    assert other.state[q]["sparse.draws"].dtype is torch.int64


# -------------------------------------------------------------------------------------------------- decaying feedback

DECAYS = pytest.mark.parametrize(("decay", "window"), [(0.7, None), (1.0, 3), (0.6, 4), (0.5, 1)])


@FIELDS
@DECAYS
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("transport", [comoving.transport.Rotate(), Keep(), Reset()], ids=str)
@pytest.mark.parametrize(("shape", "ranks"), [((6, 9), (2, None)), ((5, 4, 6), (2, None, 3))], ids=str)
def test_decay_and_window(shape, ranks, transport, period, lazy, decay, window, dtype):
    """e = g~ - F' z + a/b (F m - F' m') with g~ = g + d e, d = 0 every so many steps; and the sum of all of it."""
    residual = Feedback(lazy=lazy, decay=decay, window=window)
    p, optimizer = lone(
        randn(shape, dtype), rank=ranks, residual=residual, refresh_every=period, transport=transport, betas=(0.8, 0.95)
    )
    e, forgotten = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    gradients_sum, lifted = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    for t in range(13):
        old, m = (frame_of(optimizer, p), optimizer.state[p]["moment.first"].clone()) if t else (None, None)
        g, d = randn(shape, dtype, 30 + t), 0.0 if window is not None and t % window == 0 else decay
        step(optimizer, p, g)
        frame, after = frame_of(optimizer, p), optimizer.state[p]["moment.first"]
        z = frame.project(g + d * e)
        moved = (after - 0.2 * z) / 0.8
        expected = g + d * e - frame.lift(z)
        if old is not None:
            expected += 4 * (old.lift(m) - frame.lift(moved))
        close(feedback_of(optimizer, p), expected, 1e-8)
        forgotten, gradients_sum, lifted = forgotten + (1 - d) * e, gradients_sum + g, lifted + frame.lift(after)
        e = feedback_of(optimizer, p)
        close(lifted + 4 * frame.lift(after) + e + forgotten, gradients_sum, 1e-8)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_window_of_accumulation_decays_once(lazy):
    options = {"rank": 2, "residual": Feedback(lazy=lazy, decay=0.5, window=3), "refresh_every": 2}
    p, optimizer = lone(randn((6, 9)), **options)
    q, other = lone(randn((6, 9)), **options)
    for t in range(7):
        g, h = randn((6, 9), seed=2 * t), randn((6, 9), seed=2 * t + 1)
        if t % 2:  # the frame of the others is found from the first gradient alone
            optimizer.absorb(p, g)
            optimizer.absorb(p, h)
            optimizer.apply(p)
        else:
            step(optimizer, p, g + h)
        step(other, q, g + h)
        close(p.detach(), q.detach(), 1e-9)


@pytest.mark.parametrize("per", ["channel", "tensor"])
@pytest.mark.parametrize("then", ["apply", "step"])
def test_a_sum_is_limited_by_its_own_norm(per, then):
    """Not by that of the last gradient of the sum alone, which the engine knows: here it is a hundredth of the sum."""
    options = {"rank": 2, "refresh_every": 2, "frame": Seeded(), "finder": RandomProjection(), "transport": Keep()}
    options |= {"residual": Channel(per=per)}
    p, optimizer = lone(randn((6, 9)), **options)
    q, other = lone(randn((6, 9)), **options)
    for t in range(5):
        g, h = 2.0**t * randn((6, 9), seed=2 * t), 2.0**t * randn((6, 9), seed=2 * t + 1) / 100
        optimizer.absorb(p, g)
        if then == "step":
            step(optimizer, p, h)
        else:
            optimizer.absorb(p, h)
            optimizer.apply(p)
        step(other, q, g + h)
        close(p.detach(), q.detach(), 1e-9)
        close(optimizer.state[p]["scaled.norm"], other.state[q]["scaled.norm"], 1e-9)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("recipe", ["fira", "apollo", "apollo-mini", "frugal", "tensorgrad"])
def test_feedback_would_replace_what_makes_the_recipe(recipe):
    with pytest.raises(ValueError, match=f"{recipe} is made by what it does outside the frame, residual .*residual="):
        comoving.build(f"{recipe}+ef", Holder(randn((16, 24))), rank=2)


def test_what_is_refused():
    model = Holder(randn((16, 24)))
    with pytest.raises(ValueError, match="w0: residual .* keeps 384 of 384 entries exactly, which leaves nothing"):
        comoving.build("tensorgrad", model, rank=2, residual=Sparse(fraction=0.999))
    with pytest.raises(ValueError, match=r"transport Reset\(\) sets the rule's clock back"):
        comoving.build("tensorgrad", model, rank=2, transport="reset")
    comoving.build("tensorgrad", model, rank=2, transport="reset", residual=Sparse(statistics="reset"))
    with pytest.raises(TypeError, match="rule must be a rule part, got 'lion'"):
        Sparse(rule="lion")


def test_parts_by_text():
    assert comoving.parts.part("residual", "sparse(rule='adam', fraction=0.1)") == Sparse(fraction=0.1)
    assert comoving.parts.part("residual", "fira(per='tensor')") == Fira(per="tensor")


# ---------------------------------------------------------------------------------- beside the rest of the engine


@pytest.mark.parametrize("residual", HOLDING, ids=str)
def test_blocks_have_residuals_of_their_own(residual):
    """Every expert is stepped as if it were alone; without a gradient it stays as it is."""
    shape = (3, 12, 10)
    options = {"rank": 2, "residual": residual, "lr": 0.1, "weight_decay": 0.0, "finder": Exact()}
    p, optimizer = lone(randn(shape), frame=comoving.frames.Blocks(), **options)
    alone = [lone(x, **options) for x in p.detach().clone()]
    for t in range(5):
        g = randn(shape, seed=t)
        g[1] *= t != 2
        step(optimizer, p, g)
        for b, (q, other) in enumerate(alone):
            if g[b].any():
                step(other, q, g[b])
    for b, (q, _) in enumerate(alone):
        close(p.detach()[b], q.detach(), 1e-9)


@pytest.mark.parametrize("residual", HOLDING, ids=str)
def test_a_skipped_step_leaves_no_trace(residual):
    """on_nonfinite="skip": parameters and state are those of a run without the bad gradient."""
    options = {"rank": 2, "residual": residual, "refresh_every": 50, "on_nonfinite": "skip"}
    p, optimizer = lone(randn((6, 10)), **options)
    q, other = lone(randn((6, 10)), **options)
    for t in range(5):
        g = randn((6, 10), seed=t)
        if t == 3:
            step(optimizer, p, torch.full_like(g, float("nan")))
        step(optimizer, p, g)
        step(other, q, g)
    assert torch.equal(p, q)
    assert optimizer.skipped_steps == 1
    ours, theirs = ({n: x for n, x in o.state[w].items() if n != "tick"} for o, w in ((optimizer, p), (other, q)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[n]) for n, x in ours.items() if n != "diagnostics")


@pytest.mark.parametrize("residual", HOLDING, ids=str)
@pytest.mark.parametrize("strided", ["transposed", "matrix view", "maximize"])
def test_the_way_weights_lie_does_not_matter(residual, strided):
    shape = (8, 3, 2, 2)
    options = {"rank": 2, "residual": residual, "lr": 0.1, "finder": Exact(), "view": "matrix"}
    q, other = lone(randn(shape), **options)
    start = randn(shape)
    if strided == "transposed":
        start = start.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    p = torch.nn.Parameter(start.clone(memory_format=torch.preserve_format))
    if strided == "matrix view":
        p, options["view"] = torch.nn.Parameter(start.reshape(8, 12).clone()), "tensor"
    optimizer = comoving.LowRankOptimizer([p], **(options | {"maximize": strided == "maximize"}))
    for t in range(4):
        g = randn(shape, seed=t)
        step(optimizer, p, (-g if strided == "maximize" else g).reshape(p.shape))
        step(other, q, g)
    close(p.detach().reshape(shape), q.detach(), 1e-9)


@pytest.mark.parametrize("residual", [residual for residual in HOLDING if not residual.reads], ids=str)
@pytest.mark.parametrize("layout", [comoving.frames.Trains(), comoving.frames.Trees()], ids=str)
def test_frames_without_modes(residual, layout):
    """A core of two bonds: one phi for all of it, and the rest as everywhere."""
    finder = comoving.finders.TrainSVD() if isinstance(layout, comoving.frames.Trains) else comoving.finders.TreeSVD()
    p, optimizer = lone(
        randn((6, 5, 4, 3), COMPLEX), rank=3, frame=layout, finder=finder, residual=residual, refresh_every=2,
        moments=Int8(), lr=0.01,
    )  # fmt: skip
    before = p.detach().clone()
    for t in range(5):
        step(optimizer, p, randn((6, 5, 4, 3), COMPLEX, t))
    assert p.isfinite().all()
    assert 0 < (p.detach() - before).norm() < 5
    assert "held" not in optimizer.state[p]


@pytest.mark.parametrize("residual", HOLDING, ids=str)
def test_ranks_that_change(residual):
    policy = comoving.ranks.Temperature(start=2.0, end=0.5, steps=6, step=1)
    p, optimizer = lone(randn((16, 24)), rank=4, ranks=policy, residual=residual, refresh_every=2, transport=Rotate())
    found = set()
    for t in range(9):
        step(optimizer, p, randn((16, 24), seed=t))
        found.add(frame_of(optimizer, p).ranks)
    assert len(found) > 1
    assert p.isfinite().all()


@pytest.mark.parametrize("residual", HOLDING, ids=str)
def test_moments_of_adamw_are_taken_over(residual):
    """From torch's AdamW, and from another rank, into the middle of a run."""
    q = torch.nn.Parameter(randn((16, 24)))
    dense = torch.optim.AdamW([q])
    step(dense, q, randn((16, 24), seed=1))
    p, optimizer = lone(q.detach(), rank=4, residual=residual, refresh_every=50, transport=Rotate())
    optimizer.load_state_dict(dense.state_dict())
    step(optimizer, p, randn((16, 24), seed=2))
    w, other = lone(p.detach(), rank=3, residual=residual, refresh_every=50, transport=Rotate())
    other.load_state_dict(optimizer.state_dict())
    step(other, w, randn((16, 24), seed=3))
    assert w.isfinite().all()
    if isinstance(residual, Sparse):
        assert len(set(other.state[w]["sparse.indices"].tolist())) == residual.count((16, 24))


def test_a_rule_of_another_kind_in_the_sparse_part_is_another_recipe():
    """Nested parts are saved by name."""
    assert comoving.checkpoint.describe(Sparse())["rule"] == {"part": "Adam"}
