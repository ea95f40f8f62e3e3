"""Frames and finders of a batch: every row's frame is the one that the row alone would have.

A batch holds four rows: between two ordinary ones, one that is zero and one whose unfoldings have rank 1, so that what
is decided row by row is decided differently.
"""

from functools import reduce

import pytest
import torch

from comoving.draws import gaussian, gaussian_rows
from comoving.finders import Exact, IncrementalSVD, Operand, RandomProjection, StreamingTucker
from comoving.frames import (
    Blocks,
    CosineFrame,
    Cosines,
    ModeFrame,
    Modes,
    Overlap,
    Pooled,
    Seeded,
    SeededFrame,
    SparseModes,
    Trains,
    Trees,
)
from contract.support import FINDERS, PATIENCE, SAMPLED, close, core_of, known_rank, randn, random_frame

ROWS, ZERO, ONE = 4, 1, 2
"""How many rows there are, and which are zero and of rank 1."""
CASES = {
    "left": ((7, 9), (3, None)),
    "right": ((9, 7), (None, 3)),
    "both": ((8, 9), (3, 3)),
    "more than the columns": ((9, 2), (4, None)),
    "3-D": ((6, 4, 5), (2, 3, 3)),
    "3-D, one whole": ((5, 6, 4), (3, None, 2)),
}
CASE = pytest.mark.parametrize("case", CASES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128], ids=str)
BATCHED = [
    *((finder, Modes()) for finder in FINDERS if finder.batched),
    *((finder, layout) for finder, layout in SAMPLED if finder.batched and layout.batched and layout != Pooled()),
    (RandomProjection(), Seeded(stored=True)),
]
"""Pooled frames are the same for all rows: test_compressed.py."""


def tolerance(dtype):
    return 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-10


def batch_of(shape, dtype, seed=0):
    x = torch.stack([randn(shape, dtype, 10 * seed + b) for b in range(ROWS)])
    x[ZERO] = 0
    x[ONE] = reduce(torch.multiply, (randn((d,), dtype, seed + n).view(-1, *[1] * (len(shape) - n - 1))
                                     for n, d in enumerate(shape)))  # fmt: skip
    return x


def frames_of(layout, like, ranks, seed, warm):
    """A frame for each row, each another one."""
    if warm and layout == Modes():
        return [random_frame(like.shape[1:], ranks, like.dtype, seed + b) for b in range(ROWS)]
    if layout != Cosines():
        return [layout.start(row, ranks, None, seed + b) for b, row in enumerate(like)]
    pairs = list(zip(like.shape[1:], ranks, strict=True))
    indices = [
        tuple(None if r is None else randn((d,), seed=seed + b).argsort()[:r] for d, r in pairs) for b in range(ROWS)
    ]
    return [CosineFrame.of(k, tuple(like.shape[1:]), like.dtype) for k in indices]


def memories_of(finder, x, ranks):
    """What each row remembers alone, and what the batch does."""
    schema = finder.schema(tuple(x.shape[1:]), ranks, x.dtype)
    alone = [{name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()} for _ in x]
    return alone, {
        name: torch.zeros(spec.shape if spec.scalar else (ROWS, *spec.shape), dtype=spec.dtype)
        for name, spec in schema.items()
    }


def operands_of(x, term, starts, ranks, seed):
    """Each row's operand and that of the batch: one term, or a second one in the frame to start from or another."""
    if term == "none":
        return [Operand(row) for row in x], Operand(x, rows=1)
    frames = starts if term == "own" else frames_of(Modes(), x, ranks, seed + 50, True)
    stacked = type(frames[0]).stack(frames)
    core = batch_of(core_of(x.shape[1:], ranks), x.dtype, seed + 3)
    momentum = batch_of(core_of(x.shape[1:], ranks), x.dtype, seed + 4)
    core[ONE] = 0
    alone = [
        Operand(row, 0.3, frame, w, past=(frame, m)).measured()
        for row, frame, w, m in zip(x, frames, core, momentum, strict=True)
    ]
    return alone, Operand(x, 0.3, stacked, core, past=(stacked, momentum), rows=1).measured()


def projector(u):
    return u @ u.mH


@pytest.mark.parametrize(("finder", "layout"), BATCHED, ids=str)
@CASE
@DTYPES
@pytest.mark.parametrize("term", ["none", "own", "other"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_batch_is_found_as_its_rows_are(finder, layout, case, dtype, term, warm):
    """Two refreshes, with what is remembered from the first."""
    shape, ranks = CASES[case]
    slack = tolerance(dtype)
    alone, together = memories_of(finder, batch_of(shape, dtype), ranks)
    starts = None
    for refresh in range(2):
        x = batch_of(shape, dtype, 1 + refresh)
        if refresh:
            x[-1] = 0  # of which something is remembered
        for row, memory in zip(x, alone, strict=True):
            finder.observe(row, memory)
        finder.observe(x, together, 1)
        follows = warm or refresh > 0
        starts = starts or frames_of(layout, x, ranks, 7, follows)
        batch_start = type(starts[0]).stack(starts)
        rows, batch = operands_of(x, term, starts, ranks, refresh)
        if term == "own":
            batch_start = batch.frame
        found = finder.find(batch, batch_start, follows, together)
        expected = [finder.find(o, s, follows, m) for o, s, m in zip(rows, starts, alone, strict=True)]
        assert type(found) is type(expected[0])
        assert found.ranks == ranks
        assert found.defect().shape == (ROWS,)
        assert found.defect().max() <= 100 * torch.finfo(dtype).eps
        for b, frame in enumerate(expected):
            whole = rows[b].full()
            for n, u in enumerate(frame.factors):
                if u is None:
                    continue
                v = found.factors[n][b]
                seen = whole.movedim(n, 0).flatten(1)
                size = seen.norm().clamp_min(1)
                # A stream of fewer columns than the rank leaves directions open that the operand may have.
                if case != "more than the columns" or not isinstance(finder, StreamingTucker):
                    assert (projector(v) @ seen - projector(u) @ seen).norm() <= 10 * slack * size
                if b == ZERO or (b != ONE and case != "more than the columns"):
                    assert (projector(v) - projector(u)).abs().max() <= 10 * slack
        for name, value in together.items():
            for b, memory in enumerate(alone):
                other = value if value.ndim == 0 else value[b]
                assert other.shape == memory[name].shape
                # Singular values that should be zero are the roots of what rounding has left.
                close(other.square(), memory[name].square(), 10 * slack)
        starts = expected  # from the same ones, for directions that are left open may differ


@pytest.mark.parametrize(("finder", "layout"), BATCHED, ids=str)
@pytest.mark.parametrize("case", ["left", "3-D"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_rows_of_any_size_do_not_touch_their_mates(finder, layout, case, warm):
    """The ordinary rows are found next to one 1e-25 and one 1e25 times as large as they are next to each other."""
    shape, ranks = CASES[case]
    x = torch.stack([known_rank(shape, tuple(r and 1 for r in ranks), torch.float32, b) for b in range(ROWS)])
    sized = x * torch.tensor([1, 1e-25, 1e25, 1]).view(-1, *[1] * len(shape))
    frames = frames_of(layout, x, ranks, 5, warm)
    starts = type(frames[0]).stack(frames)
    found = []
    for operand in (x, sized):
        _, memory = memories_of(finder, x, ranks)
        finder.observe(operand, memory, 1)
        frame = finder.find(Operand(operand, rows=1), starts, warm, memory)
        for _ in range(1, PATIENCE.get(type(finder), 2 if isinstance(finder, IncrementalSVD) else 1)):
            frame = finder.find(Operand(operand, rows=1), frame, True, memory)
        found.append(frame)
    for b in range(ROWS):
        captured = [frame.lift(frame.project(x))[b] for frame in found]
        assert (captured[0] - captured[1]).norm() <= 1e-3 * x[b].norm()


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_row_that_lost_its_operand_starts_anew_and_its_mates_go_on(sweeps):
    """Warm HOOI: one frame sees nothing of its operand, the others see all of theirs."""
    finder, dtype = Exact(sweeps=sweeps, sequential=True, warm=True), torch.float64
    starts = [random_frame((6, 4, 5), (2, 2, 2), dtype, b) for b in range(3)]
    x = torch.stack([frame.lift(randn((2, 2, 2), dtype, b)) for b, frame in enumerate(starts)])
    u = starts[1].factors[0]
    rest = torch.linalg.qr(torch.cat([u, randn((6, 2), dtype)], 1)).Q[:, 2:]
    starts[1] = ModeFrame((rest, *starts[1].factors[1:]))
    x += 1e-3 * randn(x.shape, dtype, 5)
    found = finder.find(Operand(x, rows=1), ModeFrame.stack(starts), True, {})
    for b, start in enumerate(starts):
        expected = finder.find(Operand(x[b]), start, True, {})
        for u, v in zip(found.factors, expected.factors, strict=True):
            close(projector(u[b]), projector(v), 1e-10)
        assert expected.project(x[b]).norm() > 0.99 * x[b].norm()


@CASE
@DTYPES
def test_frames_with_rows(case, dtype):
    shape, ranks = CASES[case]
    slack = tolerance(dtype)
    x, z = batch_of(shape, dtype), batch_of(core_of(shape, ranks), dtype, 1)
    olds, news = (frames_of(Modes(), x, ranks, seed, True) for seed in (0, 9))
    old, new = ModeFrame.stack(olds), ModeFrame.stack(news)
    assert old.ranks == ranks
    whole = ModeFrame((None,) * len(shape))
    loaded = Modes().load(new.tensors(), shape)
    assert all(u is v for u, v in zip(loaded.factors, new.factors, strict=True))
    assert Modes().start(x, ranks, new, 3).factors == new.factors
    wholes = [whole] * ROWS
    for one, other, ones, others in ((new, old, news, olds), (whole, old, wholes, olds), (new, whole, news, wholes)):
        overlap = one.overlap(other)
        start = z if other is old else x
        alone = [a.overlap(b) for a, b in zip(ones, others, strict=True)]
        close(overlap.move(start), torch.stack([r.move(y) for r, y in zip(alone, start, strict=True)]), slack)
        energy = start.abs().square()
        moved = torch.stack([r.move_squares(y) for r, y in zip(alone, energy, strict=True)])
        close(overlap.move_squares(energy), moved, slack)
        assert overlap.moved_shape(start) == [ROWS, *alone[0].moved_shape(start[0])]
        mass = torch.rand(ROWS, *(1 if r is None else r for r in other.ranks))
        spread = torch.stack([r.spread(y) for r, y in zip(alone, mass, strict=True)])
        assert torch.equal(overlap.spread(mass), spread)
    close(new.project(x), torch.stack([f.project(y) for f, y in zip(news, x, strict=True)]), slack)
    close(new.lift(z), torch.stack([f.lift(y) for f, y in zip(news, z, strict=True)]), slack)
    bent = ModeFrame(tuple(None if u is None else u * torch.arange(1, ROWS + 1).view(-1, 1, 1) for u in new.factors))
    alone = [ModeFrame(tuple(None if u is None else u[b] for u in bent.factors)).defect() for b in range(ROWS)]
    close(bent.defect(), torch.stack(alone), slack)
    for out in (x.clone(), torch.stack([x, x], -1)[..., 0]):
        expected = torch.stack([f.add_lift(y.clone(), w, 0.3, -0.5) for f, y, w in zip(news, out, z, strict=True)])
        returned = new.add_lift(out, z, 0.3, -0.5)
        close(out, expected, slack)
        close(returned, expected, slack)


def test_frames_of_cosines_with_rows():
    x = batch_of((9, 7), torch.float64)
    frames = frames_of(Cosines(), x, (None, 3), 0, True)
    frame = CosineFrame.stack(frames)
    loaded = Cosines().load(frame.tensors(), (9, 7), x)
    assert torch.equal(loaded.factors[1], torch.stack([f.factors[1] for f in frames]))
    assert torch.equal(loaded.indices[1], torch.stack([f.indices[1] for f in frames]))


@DTYPES
def test_every_row_draws_what_it_draws_alone(dtype):
    like = torch.zeros((), dtype=dtype)
    drawn = gaussian_rows((5, 3), like, (7, 2**63 - 1, 0))
    assert drawn.dtype is dtype
    assert all(torch.equal(x, gaussian((5, 3), like, s)) for x, s in zip(drawn, (7, 2**63 - 1, 0), strict=True))


@pytest.mark.parametrize("stored", [False, True])
@CASE
@DTYPES
def test_frames_that_are_drawn_with_rows(stored, case, dtype):
    (shape, ranks), layout = CASES[case], Seeded(stored=stored)
    x = batch_of(shape, dtype)
    frames = frames_of(layout, x, ranks, 2**62, False)
    frame = SeededFrame.stack(frames)
    z = batch_of(core_of(shape, ranks), dtype)
    loaded = layout.load(frame.tensors(), shape, z)
    for several, singles in ((frame, frames), (loaded, frames), (loaded.next(), [f.next() for f in frames])):
        assert several.stored is stored
        assert several.ranks == ranks
        schema = layout.schema(shape, ranks, dtype)
        for name, value in several.tensors().items():
            alone = [single.tensors()[name] for single in singles]
            if schema[name].shape:
                close(value, torch.stack(alone), tolerance(dtype))
            else:
                assert value.dtype is torch.int64
                assert torch.equal(value.expand(ROWS), torch.stack(alone))
                assert (value.ndim == 1) == schema[name].seed
        close(
            several.project(x), torch.stack([f.project(y) for f, y in zip(singles, x, strict=True)]), tolerance(dtype)
        )
    if stored:
        assert all(a is b for a, b in zip(frame.factors, loaded.factors, strict=True))
    else:
        with pytest.raises(ValueError, match="belongs to no frame"):
            layout.load(frame.tensors(), shape, z[0])
        with pytest.raises(ValueError, match="belongs to no frame"):
            layout.load(frame.tensors(), shape, z[:-1])


@CASE
@DTYPES
@pytest.mark.parametrize("term", ["none", "own", "other"])
def test_operands_with_rows(case, dtype, term):
    shape, ranks = CASES[case]
    slack = tolerance(dtype)
    x = batch_of(shape, dtype)
    frames = frames_of(Modes(), x, ranks, 7, True)
    stacked = ModeFrame.stack(frames)
    alone, batch = operands_of(x, term, frames, ranks, 0)
    if term != "none":
        core = batch_of(core_of(shape, ranks), dtype, 6)
        alone = [o.mix(0.5, o.frame, w) for o, w in zip(alone, core, strict=True)]
        batch = batch.mix(0.5, batch.frame, core)

    def agree(found, figure):
        close(found, torch.stack([figure(o, f, b) for b, (o, f) in enumerate(zip(alone, frames, strict=True))]), slack)

    assert (batch.order, batch.shape) == (len(shape), shape)
    agree(batch.norm(), lambda o, f, b: o.norm())
    agree(batch.full(), lambda o, f, b: o.full())
    overlap = None if batch.frame is None else stacked.overlap(batch.frame)
    agree(batch.project(stacked, overlap), lambda o, f, b: o.project(f, o.frame and f.overlap(o.frame)))
    matrices = [randn((2, d), dtype, n) if n % 2 else None for n, d in enumerate(shape)]
    for n, u in enumerate(stacked.factors):
        agree(batch.sketches(matrices, (n,))[n], lambda o, f, b, n=n: o.sketches(matrices, (n,))[n])
        agree(batch.gram(n), lambda o, f, b, n=n: o.gram(n))
        agree(batch.sketch(n, 2, 3, 4), lambda o, f, b, n=n: o.sketch(n, 2, 3, 4))
        assert batch.columns(n) == alone[0].columns(n)
        if u is not None:
            own = batch.frame.factors[n] if term == "own" else u  # the very tensor
            y = batch.contract(n, own)
            agree(y, lambda o, f, b, n=n: o.contract(n, f.factors[n]))
            agree(batch.correlate(n, y), lambda o, f, b, n=n, y=y: o.correlate(n, y[b]))


@pytest.mark.parametrize("shape", [(40, 50), (30, 9, 11)], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["shared", "each its own"])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_columns_of_operands_with_rows(shape, each, count):
    """Few of them are lifted on their own, many from the sum that is formed."""
    ranks = tuple(3 if n == 0 else 2 for n in range(len(shape)))
    x = torch.stack([randn(shape, seed=b) for b in range(ROWS)])
    frames = frames_of(Modes(), x, ranks, 7, True)
    core = batch_of(core_of(shape, ranks), x.dtype, 2)
    for n in range(len(shape)):
        limit = x[0].numel() // shape[n]
        lead = (ROWS,) if each else ()
        columns = torch.randint(limit, (*lead, count), generator=torch.Generator().manual_seed(0))
        found = Operand(x, 0.3, ModeFrame.stack(frames), core, rows=1).sample(n, columns)
        for b, frame in enumerate(frames):
            whole = 0.3 * x[b] + frame.lift(core[b])
            close(found[b], whole.movedim(n, 0).flatten(1)[:, columns[b] if each else columns], 1e-10)


def test_who_serves_batches():
    assert all(finder.batched for finder in FINDERS)
    assert not any(layout.batched for layout in (Blocks(), SparseModes(), Trains(), Trees()))


def test_an_overlap_of_nothing_keeps_the_shape():
    assert Overlap((None, None)).moved_shape(torch.zeros(4, 2, 3)) == [4, 2, 3]
