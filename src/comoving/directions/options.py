"""The monitor on a command line."""

import argparse
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from .monitor import SpectralMonitor
from .sinks import Log, Sink, WandB, parse_sink
from .targets import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --spec-monitor and what belongs to it to a parser."""
    group = parser.add_argument_group("spectral monitor")
    group.add_argument("--spec-monitor", action="store_true", help="watch spectra of weights, gradients, updates")
    group.add_argument("--spec-every", type=int, default=100, metavar="N", help="updates between readings (100)")
    group.add_argument("--spec-topk", type=int, default=8, metavar="K", help="singular triplets (8)")
    group.add_argument("--spec-targets", default=TARGETS, metavar="PATTERNS", help=f"layers ({TARGETS})")
    group.add_argument(
        "--spec-out", action="append", default=None, metavar="SINK",
        help="jsonl:PATH, tensorboard:FOLDER, wandb:PROJECT, log or log:LOGGER; several times for several (log)",
    )  # fmt: skip
    group.add_argument("--log-wandb", action="store_true", help="write to Weights & Biases")
    group.add_argument("--wandb-project", default="comoving", metavar="NAME", help="its project (comoving)")


def from_arguments(
    namespace: argparse.Namespace, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]
) -> SpectralMonitor | None:
    """The monitor that the arguments ask for, attached; None without --spec-monitor.

    Raises:
        ValueError: --spec-out or --log-wandb without --spec-monitor; what :class:`SpectralMonitor` refuses. Sinks are
            opened last.
    """
    if not namespace.spec_monitor:
        if namespace.spec_out or namespace.log_wandb:
            raise ValueError("--spec-out and --log-wandb need --spec-monitor")
        return None
    monitor = SpectralMonitor(model, namespace.spec_targets, every=namespace.spec_every, k=namespace.spec_topk)
    monitor.attach(*([optimizer] if isinstance(optimizer, Optimizer) else optimizer))
    try:
        sinks: list[Sink] = [parse_sink(text) for text in namespace.spec_out or ()]
        if namespace.log_wandb:
            sinks.append(WandB(namespace.wandb_project))
    except BaseException:
        monitor.detach()
        raise
    monitor.sinks = tuple(sinks or [Log()])
    return monitor
