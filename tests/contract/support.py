"""What the tests share: seeded tensors and frames, a model of bare parameters, and instances of every part."""

from math import prod

import torch
from torch import nn

from comoving import LowRankOptimizer
from comoving.cadence import Every, Growing, Lazy
from comoving.clock import Clock
from comoving.codecs import BFloat16, Full, Int4, Int8, RankOne, Root, TopDirections
from comoving.finders import (
    Amortized,
    BlockSelection,
    Correlation,
    CosineSelection,
    Delayed,
    Exact,
    Grassmann,
    IncrementalSVD,
    Nystroem,
    Oja,
    Operand,
    Power,
    Randomized,
    RandomProjection,
    RandomWalk,
    Standing,
    StreamingTucker,
    TrainIncrement,
    TrainRandomized,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from comoving.frames import Cosines, ModeFrame, Modes, Pooled, Seeded, SparseModes, Trains, Trees
from comoving.precondition import Factored, Kronecker, Plain
from comoving.residual import (
    Channel,
    Details,
    Discard,
    Feedback,
    Fira,
    Folded,
    MomentumBuffer,
    Raw,
    Sign,
    Sparse,
    SubsetNorm,
)
from comoving.rules import (
    SOAP,
    SWAN,
    Adafactor,
    Adam,
    AdamS,
    Columns,
    Lion,
    LowRankAdam,
    LowRankMuon,
    Momentum,
    Muon,
    Normalized,
    NorMuon,
    Scheduled,
    Shampoo,
)
from comoving.slots import Kind
from comoving.transport import Carry, Keep, Reset, Rotate, initial
from references.algebra import basis

REAL, COMPLEX = torch.float64, torch.complex128

FINDERS = [
    Exact(),
    Exact(method="svd"),
    Exact(sweeps=2),
    Exact(inertia=0.5, sweeps=1, method="svd"),
    Exact(sequential=True),
    Exact(inertia=0.9, sweeps=1, sequential=True, warm=True),
    Exact(sweeps=2, warm=True),
    Power(),
    Power(inertia=0.0, iterations=3),
    Power(start="exact"),
    Power(exact_up_to=8),
    Randomized(),
    Randomized(inertia=0.0, oversampling=2, reads=1, seed=3),
    Randomized(reads=2, sequential=True),
    Randomized(oversampling=1, reads=3, sequential=True, seed=1),
    Nystroem(),
    Nystroem(columns="energy"),
    Nystroem(samples=0.02, columns="slices"),
    Amortized(),
    Amortized(iterations=2),
    Oja(),
    Oja(inertia=0.0, rate=0.5, start="exact"),
    Grassmann(),
    Grassmann(inertia=0.5, start="random"),
    Correlation(),
    Correlation(rate=0.5, recalibrate=2),
    IncrementalSVD(),
    StreamingTucker(),
    StreamingTucker(decay=1.0, oversampling=2, newest=0.0, seed=1),
    Delayed(),
    Delayed(Randomized()),
]
CADENCES = [Every(), Growing(), Growing(base=1.0), Lazy(), Lazy(threshold=0.9, patience=2, growth=3)]
BOND_FINDERS = [
    TrainSVD(),
    TrainSVD(inertia=0.5, method="svd"),
    TrainRandomized(),
    TrainRandomized(reads=1, oversampling=12),
    TrainIncrement(),
    TrainIncrement(inertia=0.5, columns=4, add=2),
    TreeSVD(),
    TreeIncrement(),
]
SAMPLED = [
    (CosineSelection(), Cosines()),
    (CosineSelection(norm=1), Cosines()),
    (RandomProjection(), Seeded()),
    (RandomWalk(rate=0.3), Modes()),
    (RandomWalk(rate=1.0, start="random", seed=2), Modes()),
    (Standing(), Pooled()),
]
SPARSE = [
    (BlockSelection(), SparseModes(block=2)),
    (BlockSelection(Exact()), SparseModes(block=3, density=0.3)),
]
SUBSPACES = [
    *((finder, Modes()) for finder in FINDERS),
    *SAMPLED,
    *SPARSE,
    *((finder, layout) for finder in BOND_FINDERS for layout in (Trains(), Trees())),
    (TrainSVD(), Trains(bond=1)),
    (TrainIncrement(), Trees(bond=1)),
]
"""Every finder with every layout that it fills: what the contract of subspaces runs over."""
EXCUSED = {
    Trains: {"cuts within the older span": "where an inner edge is cut, those above lose what they had through it"},
    Trees: {"cuts within the older span": "as for trains"},
    Cosines: {"is drawn": "it starts with the lowest frequencies"},
    Seeded: {
        "keeps the older span": "the state holds one seed, from which all directions are drawn at once",
        "cuts within the older span": "likewise",
    },
    Pooled: {
        "is drawn": "it is one frame for each rank",
        "keeps the older span": "runs of another length have other sums",
        "cuts within the older span": "likewise",
    },
    SparseModes: {
        "is drawn": "the factors are, but it starts with the first blocks",
        "keeps the older span": "a core of other ranks is cut elsewhere",
        "cuts within the older span": "likewise",
    },
    BlockSelection: {"captures": "a core that is sparse between some directions is not between others of their span"},
    CosineSelection: {"captures": "it looks along fixed columns alone"},
    RandomWalk: {"captures": "it looks at nothing", "keeps where nothing is seen": "likewise"},
    Standing: {"captures": "it looks at nothing", "turns": "there is one frame for each rank"},
    RandomProjection: {"captures": "it looks at nothing", "keeps where nothing is seen": "likewise"},
}
"""Finder or layout -> {promise that it does not make: why}; the promises are those of ``test_subspaces``."""
PATIENCE = {Grassmann: 10, Oja: 40, TrainIncrement: 3, TreeIncrement: 3}
"""Refreshes with one operand that a finder may take where others need one: increments add few directions at a time."""
TRANSPORTS = [Keep(), Reset(), Rotate(), Carry()]
PRECONDITIONERS = [
    Plain(),
    Factored(),
    Factored(decay=0.5, floor=1e-6, clip=None),
    Kronecker(),
    Kronecker(decay=0.5, exponent=0.5, eps=1e-3, every=3, max_size=4, above="none", norm_matched=False),
    Kronecker(max_size=4, root="newton", every=2),
]
RULES = [
    Adam(),
    Momentum(),
    Momentum(corrected=True),
    Momentum(nesterov=True),
    Momentum(corrected=True, nesterov=True),
    Scheduled(),
    Scheduled(growth=0.9, decay=-0.8),
    Adafactor(),
    Adafactor(decay=None, clip=None),
    Adafactor(average="update"),
    AdamS(),
    Lion(),
    Lion(b1=0.8, b2=0.9),
    Muon(),
    Muon(nesterov=False, ema=True, method="polar", over="each"),
    Muon(scale="spectral", over="flat"),
    Muon(nesterov=False, normalized=True),
    Muon(coefficients="polar-express", before="rows", after="both"),
    NorMuon(),
    Columns(),
    Columns(along="right"),
    Normalized(decay=0.9, passes=1, scale=0.5),
    Normalized(decay=0.9, nesterov=True, passes=3, first="columns", threshold=0.3),
    Columns(orthonormal=True),
    Shampoo(),
    Shampoo(decay=0.9, exponent=0.3, eps=1e-3, every=3, max_size=4, graft=False),
    Shampoo(average=False, root="newton"),
    SOAP(),
    SOAP(decay=0.8, every=2, max_size=4),
    SOAP(every=3, one_sided=True),
]
STATELESS = [
    Muon(decay=0.0),
    Muon(decay=0.0, method="rows", after="columns"),
    Normalized(),
    SWAN(),
    SWAN(4, 0.5, 0.3, "each"),
    Adafactor(average=None),
]
"""Rules without a momentum, which are for whole frames; the last keeps other slots."""
THIN = [LowRankAdam(), LowRankAdam(3, newest=False), LowRankMuon(), LowRankMuon(2, inner=Muon(method="polar"))]
"""Rules of whole frames."""
CODECS = [Full(), BFloat16(), Int8(), Int8(block=8), Int4(), Int4(block=8), Int4(table="linear")]
DRAWN = [
    Int8(table="dynamic"),
    Int8(rounding="stochastic"),
    Int8(block=8, table="dynamic", rounding="stochastic"),
    Int4(rounding="stochastic"),
    Int4(block=8, table="linear", rounding="stochastic"),
]
"""Codecs of other tables and roundings, which keep the same promises; the longest sweeps go without."""
COARSE = [RankOne(), RankOne(signed=False)]
"""Codecs that promise nothing of single entries."""
APART = [TopDirections(), TopDirections(rank=0.4, block=8, mu=10.0), TopDirections(rank=0.0)]
"""Codecs that store a matrix otherwise than entry by entry."""
POSITIVE = [Root(), Root(block=8), Root(bits=4), Root(block=8, bits=4)]
"""Codecs of second moments alone."""
LOSS = {Int4: 0.2}
"""Share of a normal tensor's norm that a codec may lose, where that is more than 2%."""
MOVING = [MomentumBuffer(), MomentumBuffer(decay=0.5)]
"""Residuals that keep part of what the frame holds."""
RESIDUALS = [
    Discard(),
    Feedback(),
    Feedback(lazy=False),
    Feedback(momentum=False),
    Feedback(lazy=False, decay=0.7, momentum=False),
    Feedback(decay=0.7, window=3),
    Feedback(lazy=False, decay=0.7),
    Feedback(own=True),
    Feedback(own=True, decay=0.7, window=3, momentum=False),
    Fira(),
    Fira(per="tensor", growth=None),
    Channel(),
    Channel(per="tensor", growth=None),
    Sign(),
    Raw(),
    Folded(),
    Details(),
    Details(growth=None),
    SubsetNorm(),
    SubsetNorm(decay=0.9),
    Sparse(),
    Sparse(fraction=0.2, choose="random", first=False, statistics="keep"),
    Sparse(choose="probabilistic", scale=0.5, statistics="reset", seed=3),
    Sparse(first=False),
]


def randn(shape, dtype=REAL, seed=0):
    """Standard normal, without the global generator."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_frame(shape, ranks, dtype=REAL, seed=0):
    """Orthonormal factors of these ranks, None where whole."""
    pairs = enumerate(zip(shape, ranks, strict=True))
    return ModeFrame(
        tuple(None if r is None else torch.linalg.qr(randn((d, r), dtype, 97 * seed + n)).Q for n, (d, r) in pairs)
    )


def known_rank(shape, ranks, dtype=REAL, seed=0):
    """A tensor whose n-th unfolding has rank r_n (all of it, where r_n is None)."""
    frame = random_frame(shape, ranks, dtype, seed)
    core = tuple(d if r is None else r for d, r in zip(shape, ranks, strict=True))
    return frame.lift(randn(core, dtype, seed + 1000))


def memory_of(finder, x, ranks):
    """What a finder remembers of a tensor with a frame of these ranks, before its first search."""
    schema = finder.schema(tuple(x.shape), ranks, x.dtype)
    memory = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
    finder.observe(x, memory)
    return memory


def search(finder, x, ranks, warm, seed=0, layout=Modes(), patience=1):  # noqa: B008  (frozen)
    """Where a search began, and the frame that it found."""
    start = layout.start(x, ranks, None, seed)
    if warm:
        start = random_frame(x.shape, ranks, x.dtype, 8) if type(start) is ModeFrame else start
    memory = memory_of(finder, x, ranks)
    frame = finder.find(Operand(x), start, warm, memory)
    for _ in range(1, patience):
        frame = finder.find(Operand(x), frame, True, memory)
    return start, frame


def explicit(frame, shape, dtype):
    """The frame as one matrix on flattened tensors."""
    return basis(frame.factors, shape, dtype)


def frame_of(optimizer, p, order=None):
    """The frame that is in the state; the factors are copies."""
    state = optimizer.state[p]
    factors = (state.get(f"frame.{n}") for n in range(p.ndim if order is None else order))
    return ModeFrame(tuple(None if u is None else u.clone() for u in factors))


def feedback_of(optimizer, p):
    """e = A - F (m/b + Y), or A - F C, from the slots that the feedback keeps, a tensor of its own."""
    group, state = optimizer.param_groups[0], optimizer.state[p]
    shape, m = tuple(p.shape), state["moment.first"]
    gradients = group["codec"].decode(stored(state, "feedback.gradients."), shape, m.dtype)
    if group["residual"].own:
        used = group["codec"].decode(stored(state, "feedback.used."), tuple(m.shape), m.dtype)
        return gradients - frame_of(optimizer, p).lift(used)
    used = m * state["feedback.weight"]
    if group["residual"].lazy:
        used = used + group["codec"].decode(stored(state, "feedback.momenta."), tuple(m.shape), m.dtype)
    return gradients - frame_of(optimizer, p).lift(used)


def feedback_error(optimizer, p):
    """The bound on what the codec has lost in the last step."""
    group = optimizer.param_groups[0]
    return float(group["residual"].error(optimizer.state[p], group["codec"]))


def stored(state, prefix):
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


def look(finder, operand, start, warm):
    """A search with fresh memory, which has observed the operand."""
    x = operand.full()
    memory = {n: x.new_zeros(p.shape, dtype=p.dtype) for n, p in finder.schema(x.shape, start.ranks, x.dtype).items()}
    finder.observe(x, memory)
    return finder.find(operand, start, warm, memory)


class Holder(nn.Module):
    """A model that is nothing but its parameters w0, w1, ..."""

    def __init__(self, *starts):
        super().__init__()
        for i, start in enumerate(starts):
            self.register_parameter(f"w{i}", nn.Parameter(start.clone()))


def step(optimizer, p, gradient):
    p.grad = gradient.clone()
    optimizer.step()


def lone(start, **options):
    """A parameter and an optimizer of it alone."""
    p = nn.Parameter(start.clone())
    return p, LowRankOptimizer([p], **options)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def core_of(shape, ranks):
    return tuple(d if r is None else r for d, r in zip(shape, ranks, strict=True))


def numel(shape):
    return prod(shape)


def cells(optimizer, p):
    """The state of a parameter, or of each of its blocks, with moments decoded."""
    found = [row.cell() for row in optimizer.engine.rows_of(p)]
    for cell in found:
        cell.decode()
    return found


def shape_of(slot, core):
    """The shape that a kind stands for."""
    if slot.kind in (Kind.LINEAR, Kind.VARIANCE):
        return core
    if slot.kind in (Kind.SCALAR, Kind.THIN):
        return slot.size
    return (core[slot.mode],) * (1 if slot.kind is Kind.FACTORED else 2)


def is_real(slot):
    return slot.kind in (Kind.VARIANCE, Kind.FACTORED, Kind.SCALAR) or slot.real


class Bare:
    """A rule without an engine, in a core that stands still."""

    def __init__(self, rule, shape, dtype, betas=(0.9, 0.99)):
        self.rule, self.betas, self.t, self.tick = rule, betas, torch.zeros(()), 0
        self.state = {}
        for slot in rule.slots(shape):
            kind = dtype.to_real() if dtype.is_complex and is_real(slot) else dtype
            self.state[slot.name] = initial(slot, torch.empty(shape_of(slot, shape), dtype=kind))

    def take(self, z, eps=1e-8):
        self.t, self.tick = self.t + 1, self.tick + 1
        clock = Clock(self.t, *self.betas, self.tick)
        self.rule.absorb(z, self.state, clock)
        return self.rule.direction(self.state, clock, eps)


def mixed(dtype):
    """Ordinary matrices next to a zero one, one of rank 1, an orthonormal one and one of condition number 1e9."""
    a = torch.randn(7, 12, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    a[1] = 0
    a[2] = a[2, :, :1] @ a[2, :1]
    a[3] = torch.linalg.qr(a[3]).Q
    u, _, vh = torch.linalg.svd(a[4], full_matrices=False)
    a[4] = (u * torch.tensor([1, 1e-3, 1e-6, 1e-9]).to(dtype)) @ vh
    a[5] *= 1e6
    return a
