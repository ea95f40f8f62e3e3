"""Frames whose factors are stored in few bits, and the engine around codecs that draw."""

import copy
from dataclasses import dataclass
from itertools import product

import pytest
import torch

import comoving
from comoving import explain, state_bytes
from comoving.codecs import BFloat16, Full, Int4, Int8, RankOne, Root
from comoving.draws import scramble
from comoving.finders import BlockSelection, CosineSelection, Power, RandomProjection, TrainSVD, TreeSVD
from comoving.frames import Blocks, Cosines, ModeFrame, Modes, Seeded, SparseModes, Trains, Trees
from comoving.frames import stored as stored_frame
from comoving.parts import part
from comoving.ranks import Energy
from comoving.residual import Feedback, MomentumBuffer
from comoving.transport import Carry, Keep, Reset, Rotate
from contract.support import COMPLEX, REAL, Holder, cells, close, lone, randn, random_frame, step
from test_moments import build, flat_states, saved, states_equal, train, travelled

F32, C64 = torch.float32, torch.complex64
DRAWN = Int8(table="dynamic", rounding="stochastic")
CODECS = [BFloat16(), Int8(), Int8(table="dynamic"), Int4(), Int4(table="linear"), DRAWN, Int4(rounding="stochastic")]
CODED = pytest.mark.parametrize("codec", CODECS, ids=str)
SHAPES = [((24, 40), F32), ((12, 10, 9), C64), ((7,), F32)]


def stored(codec, frame, shape, layout=Modes(), seed=3):  # noqa: B008  (frozen)
    """A state with this frame alone, and the frame that it has become."""
    group, state = {"frame": layout, "bases": codec}, {}
    return group, state, stored_frame.put(group, state, frame, None, shape, (seed,))


def factors_equal(a, b):
    return all(u is v if u is None else torch.equal(u, v) for u, v in zip(a.factors, b.factors, strict=True))


# ------------------------------------------------------------------------------------------------------ in and out


@CODED
@pytest.mark.parametrize("dtype", [F32, C64, REAL, COMPLEX], ids=str)
@pytest.mark.parametrize(("shape", "ranks"), [((64, 9), (5, None)), ((300, 12, 6), (1, 7, 6)), ((8, 8), (8, None))])
def test_a_decoded_basis_is_orthonormal_and_near(codec, shape, ranks, dtype):
    """Its defect is a few roundings; no direction leaves the stored span by more than the codec's bound."""
    frame = random_frame(shape, ranks, dtype, 1)
    group, state, used = stored(codec, frame, shape)
    assert used.ranks == ranks == stored_frame.ranks(state, shape)
    assert used.defect() <= 16 * torch.finfo(dtype).eps
    expected = stored_frame.schema(group, shape, ranks, dtype)
    assert {n: (tuple(x.shape), x.dtype) for n, x in state.items()} == {
        n: (p.shape, p.dtype) for n, p in expected.items()
    }
    for n, (u, v) in enumerate(zip(frame.factors, used.factors, strict=True)):
        if u is None:
            continue
        own = {name.removeprefix(f"frame.{n}."): x for name, x in state.items() if name.startswith(f"frame.{n}.")}
        bound = float(codec.error(own)) * (1 + 1e-4) + 1e-6
        outside = u - v @ (v.mH @ u)
        assert torch.linalg.matrix_norm(outside, 2) <= bound  # the sine of the largest angle
        assert (u - v).norm() <= 3 * bound
        assert codec == Full() or u.shape[1] == u.shape[0] or (u - v).norm() > 1e-4
    assert factors_equal(stored_frame.load(group, state, shape, dtype), used)


@CODED
def test_a_factor_that_stays_keeps_its_codes(codec):
    shape, frame = (40, 30), random_frame((40, 30), (4, 3), F32, 1)
    group, state, used = stored(codec, frame, shape)
    before = copy.deepcopy(state)
    again = stored_frame.put(group, state, used, used, shape, (3,))
    states_equal([before], [state])
    assert factors_equal(again, used)
    other = ModeFrame((used.factors[0], random_frame(shape, (None, 5), F32, 9).factors[1]))
    mixed = stored_frame.put(group, state, other, used, shape, (3,))
    assert torch.equal(mixed.factors[0], used.factors[0]) and mixed.ranks == stored_frame.ranks(state, shape) == (4, 5)
    states_equal(*([{n: x for n, x in s.items() if n.startswith("frame.0")}] for s in (before, state)))
    assert factors_equal(stored_frame.load(group, state, shape, F32), mixed)
    whole = stored_frame.put(group, state, ModeFrame((None, mixed.factors[1])), mixed, shape, (3,))
    assert whole.ranks == (None, 5) and not any(name.startswith("frame.0") for name in state)


@pytest.mark.parametrize("dtype", [F32, REAL], ids=str)
def test_directions_that_few_bits_make_equal_are_completed(dtype):
    """Two of them that differ in entries below half a step alone."""
    d = 256
    u = torch.full((d, 2), 1.0, dtype=dtype)
    u[0] = (d - 1) ** 0.5
    u[1:, 1] = -1.0
    u /= u[:, 0].norm()
    codec = Int4(block=256, table="linear")
    _, state, used = stored(codec, ModeFrame((u, None)), (d, 9))
    assert used.defect() <= 1e-5 and used.factors[0].isfinite().all()
    close(used.factors[0][:, 0].abs()[0].to(REAL), torch.tensor(1.0, dtype=REAL), 1e-5)
    assert state["frame.0.rank"].item() == 2


@dataclass(frozen=True)
class Deaf(Int8):
    """Holds one direction only."""

    def encode(self, x, parts):
        return super().encode(torch.ones_like(x), parts)


def test_a_codec_that_holds_no_basis_says_so():
    with pytest.raises(RuntimeError, match=r"Deaf.*cannot hold 3 orthonormal directions of 20: use more bits"):
        stored(Deaf(), random_frame((20, 9), (3, None), F32, 1), (20, 9))


def test_plain_frames_are_stored_as_they_are_found():
    """Not rounded, cast or made orthonormal again: the very tensors."""
    found = []

    @dataclass(frozen=True)
    class Recording(Power):
        def find(self, operand, start, warm, memory):
            found.append(super().find(operand, start, warm, memory))
            return found[-1]

    p, optimizer = lone(randn((24, 40), F32), rank=3, refresh_every=2, finder=Recording(), bases=Full())
    for t in range(4):
        step(optimizer, p, randn((24, 40), F32, t))
        assert optimizer.state[p]["frame.0"] is found[-1].factors[0]
    assert len(found) == 2 and not any(name.startswith("frame.0.") for name in optimizer.state[p])


# ------------------------------------------------------------------------------------------------------ the engine


@CODED
@pytest.mark.parametrize("dtype", [F32, C64], ids=str)
def test_the_frame_of_a_refresh_is_that_of_the_steps_after_it(codec, dtype):
    """The core is taken in the decoded basis, and codes and basis stand until the next refresh."""
    p, optimizer = lone(randn((24, 40), dtype), rank=3, refresh_every=3, bases=codec, betas=(0.0, 0.9))
    frames, codes = [], []
    for t in range(7):
        g = randn((24, 40), dtype, t)
        step(optimizer, p, g)
        (unit,) = cells(optimizer, p)
        frames.append(unit.frame)
        codes.append({n: x.clone() for n, x in unit.basis.items()})
        assert torch.equal(unit.moments["moment.first"], frames[-1].project(g))
        assert frames[-1].defect() < 1e-6
        if t % 3:
            states_equal(codes[-2:-1], codes[-1:])
            assert factors_equal(frames[-2], frames[-1])
        elif t:
            assert not factors_equal(frames[-2], frames[-1])
    assert state_bytes(optimizer) == explain(optimizer).state_bytes


SWEEP = [
    (codec, transport, moments)
    for (codec, moments), transport in product(
        [
            (Int8(), Int4()),
            (Int4(), Full()),
            (DRAWN, Int8(rounding="stochastic")),
            (Int4(rounding="stochastic"), DRAWN),
        ],
        [Keep(), Reset(), Rotate(), Carry()],
    )
]


@pytest.mark.parametrize(("codec", "transport", "moments"), SWEEP, ids=str)
def test_resuming_across_a_refresh_is_bitwise(codec, transport, moments):
    options = {
        "bases": codec, "moments": moments, "transport": transport, "residual": Feedback(),
        "codec": Int8() if moments == Full() else moments,
    }  # fmt: skip
    p, whole = build(SHAPES, **options)
    train(p, whole, 0, 3)
    q, resumed = build(SHAPES, **options)
    with torch.no_grad():
        for a, b in zip(p, q, strict=True):
            b.copy_(a)
    resumed.load_state_dict(saved(whole))
    states_equal(flat_states(whole), flat_states(resumed))
    for params, optimizer in ((p, whole), (q, resumed)):
        train(params, optimizer, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
    states_equal(flat_states(whole), flat_states(resumed))
    assert state_bytes(whole) == explain(whole).state_bytes
    assert all(x.isfinite().all() for s in whole.state.values() for x in s.values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(("codec", "transport", "moments"), [c for c in SWEEP if c[1] != Keep()], ids=str)
@pytest.mark.parametrize("rank", [2, 4])
def test_a_checkpoint_of_another_rank_is_carried_over(codec, transport, moments, rank):
    """Also where the codes of both ranks have one shape: rows of 3 and of 4 entries, two a byte, are as long."""
    options = {"bases": codec, "moments": moments, "transport": transport, "refresh_every": 50}
    p, source = build(SHAPES, **options)
    train(p, source, 0, 3)
    before = [cells(source, x)[0] for x in p[:2]]
    q, target = build(SHAPES, rank=rank, **options)
    target.load_state_dict(saved(source))
    train(q, target, 3, 4)
    assert state_bytes(target) == explain(target).state_bytes
    for x, old in zip(q[:2], before, strict=True):
        unit = cells(target, x)[0]
        frame, m = unit.frame, unit.moments["moment.first"]
        assert frame.ranks == target.sites[x].ranks != old.frame.ranks
        assert m.shape == target.sites[x].core_shape
        if transport.projects:
            expected = 0.9 * frame.overlap(old.frame).move(old.moments["moment.first"]) + 0.1 * frame.project(x.grad)
            assert (m - expected).norm() <= (0.2 if moments == Int4() else 0.05) * expected.norm()


@pytest.mark.parametrize("codec", [Int4(), DRAWN], ids=str)
def test_ranks_that_adapt(codec):
    policy = Energy(minimum=1, maximum=0.8, step=1)
    options = {"bases": codec, "moments": codec, "ranks": policy, "transport": Carry(), "residual": Feedback()}
    p, optimizer = build(SHAPES, **options)
    train(p, optimizer, 0, 9)
    assert any(cells(optimizer, x)[0].frame.ranks != optimizer.sites[x].ranks for x in p[:2])
    q, resumed = build(SHAPES, **options)
    with torch.no_grad():
        for a, b in zip(p, q, strict=True):
            b.copy_(a)
    resumed.load_state_dict(saved(optimizer))
    train(p, optimizer, 9, 12)
    train(q, resumed, 9, 12)
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))
    expected = sum(optimizer.roster.claim(x).bytes_now() for x in p[:2])
    assert state_bytes(optimizer, projected=True) == expected


@pytest.mark.parametrize("codec", [Int4(), DRAWN], ids=str)
@pytest.mark.parametrize("layout", [Blocks(), SparseModes(), Blocks(0, SparseModes())], ids=str)
def test_other_layouts_of_factors(codec, layout):
    sparse = layout != Blocks()
    options = {
        "bases": codec, "moments": codec, "frame": layout, "rank": 4, "refresh_every": 2, "transport": Carry(),
        "finder": BlockSelection() if sparse else Power(),
    }  # fmt: skip
    shape = (3, 12, 16)
    p, optimizer = lone(randn(shape, C64), **options)
    for t in range(3):
        step(optimizer, p, randn(shape, C64, t))
    assert state_bytes(optimizer) == explain(optimizer).state_bytes
    for unit in cells(optimizer, p):
        modes = unit.frame.modes if sparse else unit.frame
        assert modes.defect() < 1e-6 and unit.frame.ranks == unit.kind.site.ranks
    q, resumed = lone(p.detach(), **options)
    resumed.load_state_dict(saved(optimizer))
    for params, optimizers in ((p, optimizer), (q, resumed)):
        for t in range(3, 6):
            step(optimizers, params, randn(shape, C64, t))
    assert torch.equal(p, q)


def test_a_skipped_step_leaves_codes_and_seeds():
    options = {"bases": DRAWN, "moments": DRAWN, "codec": DRAWN, "residual": Feedback(), "refresh_every": 1}
    p, optimizer = build(SHAPES, on_nonfinite="skip", **options)
    train(p, optimizer, 0, 2)
    before = copy.deepcopy(flat_states(optimizer))
    for x in p:
        x.grad = torch.full_like(x, float("nan"))
    optimizer.step()
    after = flat_states(optimizer)
    for state in (*after, *before):
        state.pop("tick", None)  # the host counts on
    states_equal(after, before)


def test_feedback_telescopes_in_coded_frames():
    """Nothing of the gradients is lost, for the frame in use is orthonormal, whatever it was before it was stored."""
    options = {"rank": 3, "refresh_every": 2, "residual": Feedback(), "betas": (0.8, 0.95), "bases": Int4()}
    p, optimizer = lone(randn((24, 40), REAL), **options)
    total, sums = torch.zeros(24, 40, dtype=REAL), torch.zeros(24, 40, dtype=REAL)
    for t in range(8):
        g = randn((24, 40), REAL, t)
        total = total + g
        step(optimizer, p, g)
        (unit,) = cells(optimizer, p)
        m = unit.frame.lift(unit.moments["moment.first"])
        sums = sums + m
    used = unit.moments["moment.first"] * unit.residual["feedback.weight"] + unit.residual["feedback.momenta.value"]
    kept = unit.residual["feedback.gradients.value"] - unit.frame.lift(used)
    close(sums + 4.0 * m + kept, total, 1e-9)


@pytest.mark.parametrize("role", ["moments", "codec", "bases"])
def test_training_tracks_a_state_that_is_stored_plainly(role):
    (q, full) = build(SHAPES, residual=Feedback())
    starts = [x.detach().clone() for x in q]
    train(q, full, 0, 20)
    for codec, limit in ((Int8(table="dynamic"), 0.08), (DRAWN, 0.12), (Int4(), 0.35)):
        p, coded = build(SHAPES, residual=Feedback(), **{role: codec})
        train(p, coded, 0, 20)
        assert 0 < travelled(p, q, starts) < limit


# ----------------------------------------------------------------------------------------------------------- seeds


def seeds_of(optimizer):
    return {
        (i, name): int(x)
        for i, state in enumerate(flat_states(optimizer))
        for name, x in state.items()
        if name.endswith(".seed")
    }


def drawing(seed=0, shapes=(((24, 40), F32), ((24, 40), F32)), **options):
    settings = {"bases": DRAWN, "moments": DRAWN, "codec": DRAWN, "residual": Feedback(), "seed": seed} | options
    return build(list(shapes), **settings)


def test_every_seed_is_another_and_follows_from_the_optimizers():
    slots = {"moment.first", "moment.second", "feedback.gradients", "feedback.momenta", "frame.0"}
    runs = []
    for seed in (0, 0, 1):
        p, optimizer = drawing(seed)
        train(p, optimizer, 0, 3)
        runs.append(seeds_of(optimizer))
    assert runs[0].keys() == {(i, f"{slot}.seed") for i in (0, 1) for slot in slots}
    assert runs[0] == runs[1] and not {*runs[0].values()} & {*runs[2].values()}
    assert len({*runs[0].values()}) == 10 and 0 not in runs[0].values()
    devices = {x.device.type for s in flat_states(optimizer) for n, x in s.items() if n.endswith(".seed")}
    assert devices == {"cpu"}


def test_blocks_draw_numbers_of_their_own():
    p, optimizer = drawing(shapes=[((4, 12, 16), F32)], frame=Blocks())
    train(p, optimizer, 0, 1)
    seeds = seeds_of(optimizer)
    assert len(seeds) == len({*seeds.values()}) == 4 * 5


def test_seeds_go_on_from_encoding_to_encoding():
    """Through refreshes, at which the feedback's second buffer is forgotten, and where nothing is seen."""
    p, optimizer = drawing(refresh_every=2)
    seen = [dict[tuple[int, str], int]()]
    for t in range(5):
        train(p, optimizer, t, t + 1)
        seen.append(seeds_of(optimizer))
        for key, seed in seen[-1].items():
            assert seed != 0
            chain = [seen[-2].get(key, seed)]
            for _ in range(3):
                chain.append(scramble(chain[-1]))
            assert seed in chain
    moving = {key for key in seen[-1] if seen[-1][key] != seen[-2][key]}
    assert {(0, "moment.first.seed"), (0, "moment.second.seed"), (0, "feedback.gradients.seed")} <= moving


@pytest.mark.parametrize("residual", [Feedback(), MomentumBuffer()], ids=str)
@pytest.mark.parametrize("rank", [3, 1.0])
def test_seeds_of_a_state_that_adamw_began(residual, rank):
    """Are those of a new optimizer, but for the encodings that loading takes."""
    shapes = [((24, 40), F32)]
    residual = residual if rank == 3 else Feedback()
    model = Holder(randn((24, 40), F32))
    theirs = torch.optim.AdamW(model.parameters())
    train(list(model.parameters()), theirs, 0, 2)
    (_, loaded), (q, fresh) = (drawing(shapes=shapes, residual=residual, rank=rank) for _ in range(2))
    loaded.load_state_dict(copy.deepcopy(theirs.state_dict()))
    seeds = {name: seed for (_, name), seed in seeds_of(loaded).items()}
    fresh.engine.row(q[0])
    first = {name: int(x) for name, x in fresh.state[q[0]].items() if name.endswith(".seed")}
    assert seeds.keys() == first.keys() and len(first) > 1
    for name, seed in seeds.items():
        assert seed in (first[name], scramble(first[name]), scramble(scramble(first[name])))


# ---------------------------------------------------------------------------------------------- names and refusals


def test_codecs_of_bases_have_names_and_fields():
    assert part("bases", "int4(block=256)") == Int4(block=256)
    assert part("moments", "int8(table='dynamic', rounding='stochastic')") == DRAWN
    model = Holder(randn((24, 40), F32))
    optimizer = comoving.build(
        "comoving-adamw", model, rank=3, bases="int8", moments="int8(table='dynamic')", codec="int4"
    )
    (p,) = model.parameters()
    step(optimizer, p, randn((24, 40), F32))
    assert optimizer.state[p]["frame.0.codes"].dtype is torch.int8
    assert optimizer.state[p]["moment.first.codes"].dtype is torch.uint8
    direct = comoving.AdamW(model.named_parameters(), rank=3, bases=Int8(), moments=Int8(table="dynamic"), codec=Int4())
    assert direct.param_groups[0]["bases"] == Int8()
    with pytest.raises(ValueError, match="bases would have nothing to act on"):
        comoving.build("muon", model, bases="int8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frame": Trains(), "finder": TrainSVD()}, "network of small transfer tensors"),
        ({"frame": Trees(), "finder": TreeSVD()}, "network of small transfer tensors"),
        ({"frame": Blocks(0, Trains()), "finder": TrainSVD()}, "network of small transfer tensors"),
        ({"frame": Cosines(), "finder": CosineSelection()}, "no factors"),
        ({"frame": Seeded(), "finder": RandomProjection()}, "no factors"),
        ({"bases": RankOne()}, "no basis can be had back"),
        ({"bases": Root()}, "stores no signs"),
    ],
    ids=str,
)
def test_bases_that_cannot_be_coded_are_refused(options, says):
    with pytest.raises(ValueError, match=rf"bases=.* is refused.*{says}"):
        lone(randn((6, 12, 16), F32), **{"bases": Int8(), "rank": 3} | options)


def test_bases_must_be_a_codec_and_cannot_change():
    with pytest.raises(TypeError, match="bases must be a codec part"):
        lone(randn((12, 16), F32), rank=3, bases=8)
    p, optimizer = lone(randn((12, 16), F32), rank=3, bases=Int8())
    optimizer.param_groups[0]["bases"] = Int4()
    with pytest.raises(ValueError, match="bases cannot be edited"):
        step(optimizer, p, randn((12, 16), F32))
    q, other = lone(randn((12, 16), F32), rank=3)
    step(other, q, randn((12, 16), F32))
    r, coded = lone(randn((12, 16), F32), rank=3, bases=Int8())
    with pytest.raises(ValueError, match="another recipe.*bases: saved"):
        coded.load_state_dict(other.state_dict())


@pytest.mark.parametrize("rank", [0, 13, -1])
def test_a_rank_that_no_frame_has_is_refused_when_loaded(rank):
    p, optimizer = lone(randn((12, 16), F32), rank=3, bases=Int8())
    step(optimizer, p, randn((12, 16), F32))
    broken = saved(optimizer)
    broken["state"][0]["frame.0.rank"] = torch.tensor(rank)
    q, other = lone(randn((12, 16), F32), rank=3, bases=Int8())
    with pytest.raises(ValueError, match=r"parameter 0: .*no frame of a tensor of shape \(12, 16\)"):
        other.load_state_dict(broken)
    assert not other.state


@pytest.mark.parametrize("rank", [3, 5])
def test_seeded_frames_say_the_rank_that_coded_moments_do_not(rank):
    """Rows of 3 and of 4 entries, two a byte, are as long: a checkpoint of rank 4 must not be read as one of 3."""
    options = {"frame": Seeded(), "finder": RandomProjection(), "moments": Int4(), "refresh_every": 50, "side": "right"}
    p, source = lone(randn((40, 24), F32), rank=4, **options)
    for t in range(3):
        step(source, p, randn((40, 24), F32, t))
    old = cells(source, p)[0]
    q, target = lone(p.detach(), rank=rank, **options)
    target.load_state_dict(saved(source))
    g = randn((40, 24), F32, 9)
    step(target, q, g)
    new = cells(target, q)[0]
    expected = 0.9 * new.frame.overlap(old.frame).move(old.moments["moment.first"]) + 0.1 * new.frame.project(g)
    assert new.frame.ranks == (None, rank)
    assert (new.moments["moment.first"] - expected).norm() < 0.2 * expected.norm()
