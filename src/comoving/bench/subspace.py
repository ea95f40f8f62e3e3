"""The measurements of ``comoving bench subspace``: functions of tensors that return rows for tables and pictures.

In every section the contenders take turns, so that a drift of the machine's speed meets all alike, and whoever comes
first changes from round to round.
"""

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from math import prod
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from comoving.bench.clock import seconds
from comoving.bench.contenders import EXACT, Contender
from comoving.bench.gradients import Stream, train_tensor
from comoving.decompositions import tt_randomized, tt_svd
from comoving.finders import Exact, Operand, TrainIncrement, TrainSVD, TreeIncrement, TreeSVD
from comoving.finders.base import Memory
from comoving.frames import Modes, Trains, Trees

Row = dict[str, Any]
DECAY = 0.9
INNER = 20_000  # entries that a timed try reads at least: small tensors are tried several times over


def captured(frame: Any, x: Tensor) -> float:
    """||F^H x||^2 / ||x||^2, squares summed in double precision."""
    return square(frame.project(x)) / square(x)


def square(x: Tensor) -> float:
    """||x||^2."""
    double = torch.complex128 if x.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(x, dtype=double).square())


def turn(items: Sequence[Any], by: int) -> list[Any]:
    """The items, beginning with another one."""
    by %= max(1, len(items))
    return [*items[by:], *items[:by]]


class Follower:
    """A contender along one stream: frame, memory, and what was measured."""

    def __init__(self, contender: Contender, stream: Stream) -> None:
        like = stream.gradients[0]
        self.contender, self.like = contender, like
        self.ranks = contender.layout.ranks(stream.shape, stream.rank)
        schema = contender.finder.schema(stream.shape, self.ranks, like.dtype)
        self.memory: Memory = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in schema.items()}
        self.remembered = sum(prod(spec.shape) for spec in schema.values())
        stored = contender.layout.schema(stream.shape, self.ranks, like.dtype)
        self.frame_numbers = sum(prod(spec.shape) for spec in stored.values())
        self.core_numbers = prod(contender.layout.core_shape(stream.shape, self.ranks))
        self.frame: Any = None
        self.observing: list[float] = []
        self.finding: list[float] = []
        self.energies: list[float] = []

    def observe(self, gradient: Tensor) -> None:
        """Let the finder note a gradient."""
        self.observing.append(seconds(partial(self.contender.finder.observe, gradient, self.memory)))

    def refresh(self, gradient: Tensor, mean: Tensor, repeats: int) -> None:
        """Find a frame, as often as is asked from the same memory, and measure it on the running mean."""
        finder = self.contender.finder
        x = _mix(finder.inertia, gradient, mean)
        start = self.contender.layout.start(x, self.ranks, self.frame, 0)
        warm, times = self.frame is not None, list[float]()
        before, frame = self.memory, None
        for _ in range(repeats):
            self.memory = {name: value.clone() for name, value in before.items()}

            def find(start: Any = start, warm: bool = warm) -> Any:
                nonlocal frame
                frame = finder.find(Operand(x), start, warm, self.memory)

            times.append(seconds(find))
        self.frame = frame
        if warm:  # the first frame of all is another matter
            self.finding.append(min(times))
            self.energies.append(captured(frame, _mix(DECAY, gradient, mean)))


def _mix(inertia: float, gradient: Tensor, mean: Tensor) -> Tensor:
    return mean.mul(inertia).add_(gradient, alpha=1 - inertia) if inertia else gradient


def follow(stream: Stream, contenders: Sequence[Contender], every: int, repeats: int = 2) -> list[Row]:
    """Run a stream through every contender as the engine does, refreshing every so many gradients.

    A finder looks at inertia * mean + (1 - inertia) * gradient, with its own inertia and the mean of the gradients
    so far, which forgets as Adam's first moment does. The energy is always that of the mix with 0.9, averaged over all
    refreshes but the first. Times are medians. The time of a refresh is ``find``'s and that of ``every`` gradients
    observed; the ratio to Exact's is also given for a refresh at every gradient, with one.

    Args:
        stream: at least 2 * every gradients.
        contenders: the first one named "Exact (HOSVD)" is what times and energies are compared to.
        every: gradients per refresh.
        repeats: times each frame is found, of which the fastest counts.
    """
    followers = [Follower(contender, stream) for contender in contenders]
    mean = torch.zeros_like(stream.gradients[0])
    for t, gradient in enumerate(stream.gradients):
        mean.lerp_(gradient, 1 - DECAY)
        unbiased = mean / (1 - DECAY ** (t + 1))
        for follower in turn(followers, t // every):
            follower.observe(gradient)
            if t % every == 0:
                follower.refresh(gradient, unbiased, repeats)
    exact = next(f for f in followers if f.contender.name == EXACT)
    base_find, base_observe = median(exact.finding), median(exact.observing)
    rows: list[Row] = []
    for follower in followers:
        find, observe = median(follower.finding), median(follower.observing)
        rows.append(
            {
                "tensor": stream.name,
                "finder": follower.contender.name,
                "frame": follower.contender.frame,
                "ranks": follower.ranks,
                "every": every,
                "find_seconds": find,
                "observe_seconds": observe,
                "refresh_seconds": find + every * observe,
                "time_of_exact": (find + every * observe) / (base_find + every * base_observe),
                "time_of_exact_every_step": (find + observe) / (base_find + base_observe),
                "energy": fmean(follower.energies),
                "energy_of_exact": fmean(follower.energies) / fmean(exact.energies),
                "frame_numbers": follower.frame_numbers,
                "core_numbers": follower.core_numbers,
                "memory_numbers": follower.remembered,
            }
        )
    return rows


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y against log x by least squares."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle_a, middle_b = fmean(a), fmean(b)
    rise = sum((x - middle_a) * (y - middle_b) for x, y in zip(a, b, strict=True))
    return rise / sum((x - middle_a) ** 2 for x in a)


ORDER_LAYOUTS: dict[str, Any] = {"Tucker": Modes(min_size=2), "TT": Trains(), "HT": Trees()}
ORDER_FINDERS: tuple[tuple[str, str, Any], ...] = (
    ("Tucker", "Exact", Exact()),
    ("TT", "TrainSVD", TrainSVD()),
    ("TT", "TrainIncrement", TrainIncrement()),
    ("HT", "TreeSVD", TreeSVD()),
    ("HT", "TreeIncrement", TreeIncrement()),
)


def state_numbers(kind: str, shape: tuple[int, ...], rank: int) -> int:
    """Numbers in the frame and two moments of its core."""
    layout = ORDER_LAYOUTS[kind]
    ranks = layout.ranks(shape, rank)
    frame = sum(prod(spec.shape) for spec in layout.schema(shape, ranks, torch.float32).values())
    return frame + 2 * prod(layout.core_shape(shape, ranks))


def cost_of_order(orders: Sequence[int], size: int = 6, rank: int = 4, rounds: int = 5) -> list[Row]:
    """State, and time of a step (project and lift) and of a refresh, for a float32 tensor of each order."""
    rows: list[Row] = []
    for order in orders:
        first, second = (train_tensor(size, order, rank, 0.1, seed) for seed in (0, 1))
        x = 0.9 * first + 0.1 * second
        inner = max(1, INNER // x.numel())
        frames: list[Any] = []
        for kind, _, finder in ORDER_FINDERS:
            layout = ORDER_LAYOUTS[kind]
            start = layout.start(first, layout.ranks(tuple(first.shape), rank), None, 0)
            frames.append(finder.find(Operand(first), start, False, {}))
        steps: list[list[float]] = [[] for _ in frames]
        refreshes: list[list[float]] = [[] for _ in frames]
        for round_ in range(rounds):
            for i in turn(range(len(frames)), round_):
                frame, finder = frames[i], ORDER_FINDERS[i][2]
                steps[i].append(seconds(partial(_project_and_lift, frame, x), inner=inner))
                refreshes[i].append(seconds(partial(_find, finder, x, frame), inner=inner))
        for i, (kind, name, _) in enumerate(ORDER_FINDERS):
            rows.append(
                {
                    "order": order,
                    "entries": x.numel(),
                    "kind": kind,
                    "finder": name,
                    "state": state_numbers(kind, tuple(x.shape), rank),
                    "step_seconds_per_entry": median(steps[i]) / x.numel(),
                    "refresh_seconds_per_entry": median(refreshes[i]) / x.numel(),
                }
            )
    return rows


def _project_and_lift(frame: Any, x: Tensor) -> Tensor:
    return frame.lift(frame.project(x))


def _find(finder: Any, x: Tensor, start: Any) -> Any:
    return finder.find(Operand(x), start, True, {})


def order_summary(rows: Sequence[Row], size: int = 6, rank: int = 4, far: Sequence[int] = (16, 24, 32)) -> list[Row]:
    """For each finder: exponents of the state, and times per entry at the last order against the first and the least.

    The state is also counted, without a tensor, at the orders ``far``.
    """
    found: list[Row] = []
    for kind, name, _ in ORDER_FINDERS:
        own = [row for row in rows if row["finder"] == name]
        orders = [row["order"] for row in own]
        row: Row = {"kind": kind, "finder": name, "exponent": exponent(orders, [r["state"] for r in own])}
        row["state_per_mode"] = [b["state"] - a["state"] for a, b in zip(own, own[1:], strict=False)]
        counted = [state_numbers(kind, (size,) * n, rank) for n in far]
        row["far_orders"], row["far_exponent"] = list(far), exponent(far, counted)
        for what in ("step", "refresh"):
            times = [r[f"{what}_seconds_per_entry"] for r in own]
            row[f"{what}_last_of_first"] = times[-1] / times[0]
            row[f"{what}_last_of_least"] = times[-1] / min(times)
        found.append(row)
    return found


def whole(cores: Sequence[Tensor]) -> Tensor:
    """The tensor of these TT cores."""
    x = cores[0].reshape(-1, cores[0].shape[-1])
    for core in cores[1:]:
        x = (x @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    return x.reshape([core.shape[1] for core in cores])


def _tensorly(x: Tensor, rank: int) -> list[Tensor]:
    tensorly: Any = importlib.import_module("tensorly")
    decomposition: Any = importlib.import_module("tensorly.decomposition")
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return list(decomposition.tensor_train(x, [1, *[rank] * (x.ndim - 1), 1]))


def _randomized(x: Tensor, rank: int, reads: int) -> list[Tensor]:
    return tt_randomized(x, rank, reads=reads, generator=torch.Generator().manual_seed(0))


TENSORLY = "tensorly tensor_train"
TT_METHODS: dict[str, Any] = {
    "tt_svd": tt_svd,
    "tt_randomized, 2 reads": partial(_randomized, reads=2),
    "tt_randomized, 1 read": partial(_randomized, reads=1),
    TENSORLY: _tensorly,
}


def decompositions(x: Tensor, rank: int, rounds: int = 3) -> list[Row]:
    """Time and error of each way to a tensor train, as multiples of reading x once and of tensorly's time."""
    times: dict[str, list[float]] = {name: [] for name in TT_METHODS}
    errors: dict[str, float] = {}
    missing: set[str] = set()
    reading: list[float] = []
    for name, method in TT_METHODS.items():  # what the first call of all costs is no part of it
        try:
            method(x[(slice(4),) * x.ndim].contiguous(), 2)
        except ImportError:
            missing.add(name)
    for round_ in range(rounds):
        reading.append(seconds(x.sum))
        for name in turn([name for name in TT_METHODS if name not in missing], round_):
            cores: list[Any] = []
            times[name].append(seconds(partial(_keep, cores, partial(TT_METHODS[name], x, rank))))
            if name not in errors:
                errors[name] = math.sqrt(square(whole(cores[0]) - x) / square(x))
    theirs = None if TENSORLY in missing else median(times[TENSORLY])
    rows: list[Row] = []
    for name in TT_METHODS:
        if name in missing:
            rows.append({"method": name, "status": "not installed"})
            continue
        own = median(times[name])
        rows.append(
            {
                "method": name,
                "status": "measured",
                "seconds": own,
                "reads": own / median(reading),
                "faster_than_tensorly": None if theirs is None else theirs / own,
                "error": errors[name],
            }
        )
    return rows


def increments(gradients: Iterable[Tensor], rank: int, recompute_every: int = 1) -> list[Row]:
    """Increments along a stream against decomposing each gradient anew: time per refresh and captured energy.

    Args:
        gradients: the stream; the first one makes the first frames and is not counted.
        rank: of every bond or edge.
        recompute_every: the decompositions from scratch are made at every so-many-th gradient only; both their times
            and the energies that they are compared by are those of the gradients at which all took part.
    """
    finders: dict[str, tuple[Any, Any]] = {
        "TrainIncrement": (TrainIncrement(), Trains()),
        "TreeIncrement": (TreeIncrement(), Trees()),
        "TrainSVD, QR and SVD": (TrainSVD(method="svd"), Trains()),
        "TrainSVD, Gram": (TrainSVD(), Trains()),
        "TreeSVD, QR and SVD": (TreeSVD(method="svd"), Trees()),
        "TreeSVD, Gram": (TreeSVD(), Trees()),
    }
    names = [*finders, "tt_svd"]
    frames: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    energies: dict[str, list[float]] = {name: [] for name in names}
    for t, x in enumerate(gradients):
        together = t % recompute_every == 0
        for name in turn(names, t):
            incremental = name.endswith("Increment")
            if not (incremental or together):
                continue
            result: list[Any] = []
            if name in finders:
                finder, layout = finders[name]
                start = layout.start(x, layout.ranks(tuple(x.shape), rank), frames.get(name), 0)
                find = partial(finder.find, Operand(x), start, name in frames, {})
                time = seconds(partial(_keep, result, find))
                frames[name] = result[0]
                energy = captured(result[0], x) if together else 0.0
            else:
                time = seconds(partial(_keep, result, partial(tt_svd, x, rank)))
                energy = square(result[0][-1]) / square(x)  # all cores before are orthonormal
            if t > 0:
                times[name].append(time)
            if t > 0 and together:
                energies[name].append(energy)
    base = {name: (median(times[name]), fmean(energies[name])) for name in names}
    rows: list[Row] = []
    for name in names:
        own, energy = base[name]
        rows.append(
            {
                "method": name,
                "seconds": own,
                "energy": energy,
                "compared_at": len(energies[name]),
                "refreshes": len(times[name]),
                "faster_than": {other: base[other][0] / own for other in names},
                "energy_of": {other: energy / base[other][1] for other in names},
            }
        )
    return rows


def _keep(result: list[Any], work: Any) -> None:
    result[:] = [work()]
