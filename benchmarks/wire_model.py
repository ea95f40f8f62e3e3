"""Modelled step times against bandwidth and ranks: a sum of stated parts, not a measurement.

    step      = forward + backward + own work in the backward pass + exposed communication + optimizer
    forward   = 2 N tokens / flops, backward = 4 N tokens / flops              (N parameters, tokens a rank)
    optimizer = operations / optimizer_flops + bytes moved / memory_bandwidth
    exposed   = later + (1 - overlap) C + max(0, overlap C - what C can hide behind)
    C         = bytes / (bandwidth / 8) + collectives * 2 ceil(log2 ranks) * latency

Bytes are those of the plan (exact); sums go round a ring, 2 (N - 1)/N times. DistributedDataParallel hides C behind the
backward pass, FSDP2 behind both. "later" is communication that nothing hides: what frames are searched in, figures of
FSDP's optimizers, and the second half of an int8 wire. Operations are those of the plan, refreshes divided by the
period; bytes moved are weights and state, read and written, and gradients, read. Projections of compress() are taken
for work that hides nothing. PowerSGD is torch's hook around AdamW: two factors of every matrix of which they are less
than half, its own error buffer, 6 m n r operations. What does not fit into the memory is drawn dotted: weights,
gradients, buckets, state and temporaries of the plan, without activations.
"""

import argparse
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.lines import Line2D

import comoving
import powersgd
from comoving.memory.compressing import buckets
from comoving.memory.shapes import subject
from comoving.race.pictures import COLORS, STYLE, canvas

BANDWIDTHS = (1, 2, 5, 10, 25, 50, 100, 200, 400)
HEADINGS = {"llama-7b": "7B", "llama-13b": "13B", "llama-70b": "70B"}
LEADER, OURS, OURS_SHARDED = "AdamW + DDP", "comoving + compress", "comoving + FSDP2"
SHARDED, EQUAL = "AdamW + FSDP2", "PowerSGD, equal bytes"


@dataclass(frozen=True)
class Load:
    """What one rank has to do in a step, whatever the network.

    Args:
        hidden_bytes: on the wire while something is computed, ring and all.
        later_bytes: on the wire while nothing is.
        hidden_calls, later_calls: how many collectives that is.
        within: operations in the backward pass that are the optimizer's.
        after: operations of the step.
        moved: bytes that the step reads and writes.
        behind_forward: whether communication can hide behind the forward pass, too.
        peak: bytes held, without activations.
        powersgd_rank: of the hook, or 0.
    """

    hidden_bytes: float
    later_bytes: float
    hidden_calls: float
    later_calls: float
    within: float
    after: float
    moved: float
    behind_forward: bool
    peak: int
    powersgd_rank: int = 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of this study: all that is assumed."""
    parser.add_argument("--models", default=",".join(HEADINGS))
    parser.add_argument("--ranks", default="8,32,128,512,1024")
    parser.add_argument("--tokens", type=int, default=8192, help="a step and rank")
    parser.add_argument("--flops", type=float, default=400e12, help="achieved in forward and backward pass, a second")
    parser.add_argument("--optimizer-flops", type=float, default=40e12, help="achieved in float32, without TF32")
    parser.add_argument("--memory-bandwidth", type=float, default=2.5e12, help="achieved, bytes a second")
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of a device")
    parser.add_argument("--overlap", type=float, default=0.9, help="share of communication that can hide")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds a hop")
    parser.add_argument("--rank", type=float, default=0.125, help="of comoving")
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--wire", default="bfloat16", choices=("same", "bfloat16", "int8"))
    parser.add_argument("--powersgd-rank", type=int, default=32)
    parser.add_argument("--at-ranks", type=int, default=128, help="of the upper pictures")
    parser.add_argument("--at-bandwidth", type=int, default=10, help="Gb/s, of the lower pictures")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Plan, add up, draw."""
    ranks = [int(n) for n in given.ranks.split(",")]
    for name, value in vars(given).items():
        print(f"{name}: {value}")
    found: dict[str, Any] = {}
    for model in given.models.split(","):
        found[model] = _model(given, model, ranks)
        print(f"{model}: {found[model]['findings']}", flush=True)
    picture = Path(given.out).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(_picture(given, found, ranks))
    return {
        "assumptions": (__doc__ or "").splitlines(),
        "bandwidths in Gb/s": BANDWIDTHS,
        "ranks": ranks,
        "models": found,
    }


def seconds(load: Load, given: argparse.Namespace, parameters: int, ranks: int, gigabits: float) -> float:
    """The modelled time of a step."""
    forward = 2 * parameters * given.tokens / given.flops
    backward = 2 * forward
    hop = 2 * ceil(log2(ranks)) * given.latency if ranks > 1 else 0.0
    speed = gigabits * 1e9 / 8
    hidden = load.hidden_bytes / speed + load.hidden_calls * hop
    later = load.later_bytes / speed + load.later_calls * hop
    room = backward + (forward if load.behind_forward else 0.0)
    exposed = later + (1 - given.overlap) * hidden + max(0.0, given.overlap * hidden - room)
    work = (load.within + load.after) / given.optimizer_flops + load.moved / given.memory_bandwidth
    return forward + backward + exposed + work


def _model(given: argparse.Namespace, model: str, ranks: list[int]) -> dict[str, Any]:
    """Times by contender and ranks, over the bandwidths; and what they are made of."""
    module = subject(model, torch.bfloat16).module
    trained = [*module.parameters()]
    count = sum(p.numel() for p in trained)
    makers = _contenders(given, model, trained, ranks[0])
    times: dict[str, dict[str, list[float]]] = {}
    loads: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        own = {n: make(n) for n in ranks}
        loads[name] = {str(n): asdict(load) for n, load in own.items()}
        times[name] = {str(n): [seconds(load, given, count, n, b) for b in BANDWIDTHS] for n, load in own.items()}
        print(f"  {model}, {name}: {[round(t, 2) for t in times[name][str(ranks[-1])]]}", flush=True)
    return {"parameters": count, "findings": _findings(times, ranks), "seconds": times, "loads": loads}


def _contenders(
    given: argparse.Namespace, model: str, trained: list[torch.Tensor], few: int
) -> dict[str, Callable[[int], Load]]:
    """What makes the load of each contender, by the number of ranks."""
    options = {"dtype": "bfloat16", "refresh_every": given.refresh_every}
    adamw = comoving.plan(model, "adamw", dtype="bfloat16", ddp=few, foreach=False)
    cores = comoving.plan(model, "comoving-adamw", given.rank, ddp=few, compress=given.wire, **options)
    plain_calls = sum(1 for _ in buckets(trained))
    frame_calls = 2 * sum(1 for p in trained if p.ndim > 1) / given.refresh_every  # Power asks twice
    period = given.refresh_every

    def plain(n: int) -> Load:
        ring = 2 * (n - 1) / n
        return Load(
            ring * adamw.wire_bytes, 0, plain_calls, 0, 0, adamw.step_flops, _moved(adamw), False, adamw.peak_bytes
        )

    def compressed(n: int) -> Load:
        ring, sent = 2 * (n - 1) / n, cores.wire
        late = sent["cores"] / 2 if given.wire == "int8" else 0.0
        return Load(
            ring * (sent["dense"] + sent["cores"] - late),
            ring * (sent["frames"] + late),
            2 * plain_calls,
            frame_calls,
            cores.refresh_flops / period,
            cores.step_flops,
            _moved(cores),
            False,
            cores.peak_bytes,
        )

    def sharded(recipe: str) -> Callable[[int], Load]:
        def make(n: int) -> Load:
            own = options if recipe == "comoving-adamw" else {"dtype": "bfloat16", "foreach": False}
            plan = comoving.plan(model, recipe, given.rank if recipe == "comoving-adamw" else None, fsdp=n, **own)
            gathered = (n - 1) * plan.wire["weights"] + (n - 1) / n * plan.wire["gradients"]
            own_sums = (
                2 * (n - 1) / n * (plan.wire["norms"] + plan.wire["cores"] + plan.wire["refreshes"])
                + plan.wire["dealt"]
            )
            layers = max(1, sum(1 for p in trained if p.ndim > 1) // 7)
            work = plan.step_flops + plan.refresh_flops / period
            calls = frame_calls if recipe == "comoving-adamw" else 0
            return Load(gathered, own_sums, 3 * layers, calls, 0, work, _moved(plan), True, plan.peak_bytes)

        return make

    def hooked(rank: int) -> Callable[[int], Load]:
        def make(n: int) -> Load:
            ring = 2 * (n - 1) / n
            work = sum(6 * p.numel() * rank for p in trained if powersgd.compressed(p, rank))
            kept = sum(p.numel() * p.element_size() for p in trained)  # the hook's buffer is that of a whole bucket
            sent, moved = powersgd.sent_bytes(trained, rank), _moved(adamw) + 2 * kept
            peak = adamw.peak_bytes + kept
            return Load(ring * sent, 0, 3 * plain_calls, 0, work, adamw.step_flops, moved, False, peak, rank)

        return make

    equal = powersgd.equal_rank(trained, cores.wire_bytes)
    return {
        LEADER: plain,
        SHARDED: sharded("adamw"),
        f"PowerSGD, rank {given.powersgd_rank}": hooked(given.powersgd_rank),
        EQUAL: hooked(equal),
        OURS: compressed,
        OURS_SHARDED: sharded("comoving-adamw"),
    }


def _moved(plan: comoving.Plan) -> int:
    """Bytes that a step reads and writes."""
    return 2 * plan.weights + plan.gradients + 2 * plan.state_bytes


def _findings(times: dict[str, dict[str, list[float]]], ranks: list[int]) -> dict[str, Any]:
    """By ranks: the most bandwidth of those tried at which ours is ahead of plain DDP, of FSDP2, and of PowerSGD."""
    found: dict[str, Any] = {}
    for n in map(str, ranks):
        found[n] = {}
        for ours, rivals in ((OURS, [k for k in times if k not in {OURS, OURS_SHARDED}]), (OURS_SHARDED, [SHARDED])):
            for rival in rivals:
                pairs = zip(BANDWIDTHS, times[ours][n], times[rival][n], strict=True)
                ahead = [b for b, a, c in pairs if a < c]
                found[n][f"{ours} ahead of {rival} at Gb/s"] = ahead
    return found


def _picture(given: argparse.Namespace, found: dict[str, Any], ranks: list[int]) -> bytes:
    """Above against bandwidth, below against ranks; a column a model."""
    with rc_context(STYLE):
        figure = canvas(4.2 * len(found), 7.4)
        grid = figure.subplots(2, len(found), squeeze=False)
        at = BANDWIDTHS.index(given.at_bandwidth)
        names = [*next(iter(found.values()))["seconds"]]
        for column, (model, own) in enumerate(found.items()):
            for name, color in zip(names, COLORS, strict=False):
                times, loads = own["seconds"][name], own["loads"][name]
                fits = [loads[str(n)]["peak"] <= given.memory for n in ranks]
                style = "-" if loads[str(given.at_ranks)]["peak"] <= given.memory else ":"
                grid[0, column].plot(BANDWIDTHS, times[str(given.at_ranks)], style, color=color, marker=".")
                grid[1, column].plot(
                    ranks, [times[str(n)][at] for n in ranks], "-" if all(fits) else ":", color=color, marker="."
                )
            grid[0, column].set_title(f"{HEADINGS.get(model, model)}, {given.at_ranks} ranks", fontsize=11)
            grid[0, column].set_xlabel("bandwidth of a rank, Gb/s")
            grid[1, column].set_title(f"{HEADINGS.get(model, model)}, {given.at_bandwidth} Gb/s", fontsize=11)
            grid[1, column].set_xlabel("ranks")
            for row in (0, 1):
                grid[row, column].set_yscale("log")
                grid[row, column].set_xscale("log", base=10 if row == 0 else 2)
            for row, ticks in ((0, BANDWIDTHS), (1, ranks)):
                grid[row, column].set_xticks(ticks, [str(tick) for tick in ticks])
                grid[row, column].minorticks_off()
            grid[0, column].tick_params(axis="x", labelsize=9)
        for row in (0, 1):
            grid[row, 0].set_ylabel("modelled seconds a step")
        lines = [Line2D([], [], color=color) for _, color in zip(names, COLORS, strict=False)]
        dotted = Line2D([], [], color="#555555", linestyle=":")
        figure.legend(
            [*lines, dotted], [*names, f"dotted: does not fit into {given.memory / 1e9:.0f} GB"],
            loc="outside lower center", ncols=4, frameon=False, fontsize=9,
        )  # fmt: skip
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
