"""The table of a race: one list of columns, for the terminal and for the report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comoving.race.runner import SPIKE_DEVIATIONS, SPIKE_EXCESS, SPIKE_WINDOW

DASH = "–"
Line = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and how a line of the summary is shown under it."""

    heading: str
    meaning: str
    show: Callable[[Line], str]


def size(count: float) -> str:
    """Bytes, in binary units with three figures."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def quality(line: Line) -> str:
    """Mean and deviation."""
    deviation = line["deviation"]
    return f"{line['mean']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def times(value: float | None) -> str:
    """A multiple."""
    return DASH if value is None else f"{value:.2f}×"


def rate(line: Line) -> str:
    """The best rate, marked where the sweep was extended (*) and where it lies at the edge even so (!)."""
    return f"{line['rate']:g}" + ("*" if line["extended"] else "") + ("!" if line["still_at_edge"] else "")


def share(value: float | None) -> str:
    """A percentage; unknown for optimizers that do not tell."""
    return DASH if value is None else f"{100 * value:.0f}%"


def reached(line: Line, seeds: int) -> str:
    """Steps, tokens or samples, seconds; or how many seeds got there."""
    target = line["target"]
    if target is None:
        return f"{line['reached']} of {seeds} seeds"
    return f"{target['steps']:.0f} / {target['counted']:.3g} / {target['seconds']:.0f} s"


def columns(found: dict[str, Any]) -> list[Column]:
    """The columns of a race; that of the target only if there is one."""
    settings, task = found["settings"], found["task"]
    chosen = [
        Column("optimizer", "as given on the command line", lambda line: line["contender"]),
        Column(task["metric"], "at the end of training, mean ± deviation over seeds, at the best rate", quality),
        Column("rate", "best peak learning rate; * the sweep was extended, ! the best is at its edge even so", rate),
        Column("state", "bytes of optimizer state", lambda line: size(line["state"])),
        Column("× AdamW", "state over AdamW's", lambda line: times(line["state_over_adamw"])),
        Column(
            "projected",
            "state of the weights that comoving projects at this rank, the same ones for everybody",
            lambda line: size(line["state_projected"]),
        ),
        Column(
            "× weights",
            "that over the bytes of these weights",
            lambda line: times(line["state_projected_over_parameters"]),
        ),
        Column(
            "× AdamW there", "that over AdamW's state of them", lambda line: times(line["state_projected_over_adamw"])
        ),
        Column(
            "peak memory", "of the process (of the GPU on CUDA) during training", lambda line: size(line["peak_memory"])
        ),
        Column(
            "opt. step",
            "median time of optimizer.step(), the first aside",
            lambda line: f"{line['optimizer_seconds'] * 1e3:.1f} ms",
        ),
        Column(
            "worst/median",
            "slowest optimizer step over the median one, the first aside",
            lambda line: f"{line['worst_step_ratio']:.1f}",
        ),
        Column(
            "refresh",
            "share of optimizer time spent on refreshing frames; – unknown",
            lambda line: share(line["refresh_share"]),
        ),
        Column(
            "spikes",
            f"steps per run whose loss exceeds the median of the last {SPIKE_WINDOW} by {SPIKE_EXCESS:.0%} of it "
            f"and by {SPIKE_DEVIATIONS:g} median absolute deviations",
            lambda line: f"{line['spikes']:.1f}",
        ),
        Column("step", "median time of a whole training step", lambda line: f"{line['step_seconds'] * 1e3:.0f} ms"),
    ]
    if settings["wrapping"]:
        meaning = "bytes that each process puts into sums of gradients, a step; – not counted"
        chosen.append(Column("sent", meaning, lambda line: DASH if line.get("sent") is None else size(line["sent"])))
    if settings["target"] is not None:
        heading = f"to {settings['target']:g}"
        meaning = f"steps / {task['counted']} / seconds of training until a validation is at or below the target"
        chosen.append(Column(heading, meaning, lambda line: reached(line, settings["seeds"])))
    return chosen


WRAPPINGS = {
    "ddp": "DistributedDataParallel, the whole model in each",
    "fsdp": "fully_shard, a shard of the model in each",
}


def processes(found: dict[str, Any]) -> list[str]:
    """How many trained each run together, and whose gradients were sent whole though compression was asked for."""
    settings = found["settings"]
    if not settings["wrapping"]:
        return []
    lines = [
        f"{settings['ranks']} processes trained each run, with {WRAPPINGS[settings['wrapping']]} and an equal part of "
        f"every batch; times, memory and state are those of the first one, in which all runs followed one another"
    ]
    whole = [line["contender"] for line in found["summary"] if line["status"] == "finished" and not line["compressed"]]
    if settings["compress"]:
        lines.append(
            "compressed gradients are projected, and their frames refreshed, in the backward pass: that is in the time "
            "of a step and not in that of the optimizer"
        )
    if settings["compress"] and whole:
        lines.append(f"{', '.join(whole)}: nothing is projected by comoving, so gradients were sent uncompressed")
    return lines


def remarks(found: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table: refusals, failures, extended sweeps, notes, doubtful timings."""
    lines = processes(found)
    for line in found["summary"]:
        name = line["contender"]
        if line["status"] == "refused":
            lines.append(f"{name} refused: {line['problems'][0]}")
            continue
        if line["status"] == "failed":
            lines.append(f"{name} failed at every rate")
        lines += [f"{name}: {problem}" for problem in line["problems"]]
        if line["note"]:
            lines.append(f"{name}: {line['note']}")
        if line.get("ratio", 1.0) != 1:
            lines.append(f"{name}: all but the hidden weights at {line['ratio']:g} of this rate, as tuned")
        if line["extended"]:
            end = "the best rate is at the edge again" if line["still_at_edge"] else "the best rate lies inside now"
            lines.append(f"{name}: best rate at the edge of the list, extended by {line['extended']:g}; {end}")
    if found["settings"]["jobs"] > 1:
        lines.append(
            f"{found['settings']['jobs']} runs went on at once: times are not to be trusted, figures of quality are"
        )
    return lines
