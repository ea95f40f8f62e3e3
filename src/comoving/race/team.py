"""Several processes, started by torchrun, that train each run of a race together: the first leads, the others follow.

The first one has the race: it knows which runs are due, tells of the race's course and writes files. The others wait
for a run to be named, take part in it, and are silent.
"""

import logging
import os
import shlex
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from comoving.files import write_json, write_text
from comoving.race.runner import train
from comoving.race.settings import RaceSettings, RunSettings, SettingsError
from comoving.race.tasks import Task

Record = dict[str, Any]
PATIENCE = timedelta(days=7)
"""For the next order: the first process may be making data."""
GRACE = timedelta(seconds=60)
"""For all processes to fail of the same thing."""


def launched(ddp: bool, fsdp: bool, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Record:
    """The settings ``wrapping`` and ``ranks``, from the options and from what torchrun has told this process.

    Args:
        ddp: an option.
        fsdp: another one.
        arguments: all that was typed, from "race" on.
        environment: of the process.

    Raises:
        SettingsError: both options; one of them without torchrun, or torchrun without one of them.
    """
    count = int(environment["WORLD_SIZE"]) if "RANK" in environment and "WORLD_SIZE" in environment else 0
    if ddp and fsdp:
        raise SettingsError("--ddp keeps the model whole in every process and --fsdp shards it: choose one")
    wrapping = "ddp" if ddp else "fsdp" if fsdp else ""
    if wrapping and not count:
        typed = shlex.join(arguments[1:])
        raise SettingsError(
            f"--{wrapping} trains in several processes, which torchrun starts: type "
            f"torchrun --nproc_per_node 2 -m comoving.race {typed}"
        )
    if count > 1 and not wrapping:
        raise SettingsError(f"torchrun has started {count} processes: add --ddp or --fsdp, or race without torchrun")
    return {"wrapping": wrapping, "ranks": max(1, count)}


def typed(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The command that makes this race again; ``arguments`` from "race" on."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return shlex.join(["comoving", *arguments])
    count = int(environment["WORLD_SIZE"])
    here = int(environment.get("LOCAL_WORLD_SIZE", count))
    nodes = [] if here == count else ["--nnodes", str(count // here)]
    return shlex.join(["torchrun", *nodes, "--nproc_per_node", str(here), "-m", "comoving.race", *arguments[1:]])


@contextmanager
def joined(device: str) -> Generator["Team"]:
    """This process among those that torchrun has started; a group that is there already is used, and left.

    Args:
        device: of the settings, "cpu" or "cuda".
    """
    own = not dist.is_initialized()
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device.startswith("cuda") else device
    if own:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Team(local)
    finally:
        if own:
            dist.destroy_process_group()


class Team:
    """The processes, seen from one of them.

    Args:
        device: what this one computes on.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.leads = dist.get_rank() == 0
        # Orders go a way of their own: a collective of a run that failed cannot be mistaken for one.
        self.orders: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.failures: Any = dist.new_group(backend="gloo", timeout=GRACE)
        self.task: Task | None = None
        if not self.leads:
            logging.getLogger("comoving").setLevel(logging.CRITICAL)

    def told(self, order: Any = None) -> Any:
        """What the first process says."""
        box = [order]
        dist.broadcast_object_list(box, src=0, group=self.orders)
        return box[0]

    def load(self, settings: RaceSettings) -> str:
        """The digest of the task's data; the first process makes them, and then all others read them.

        Raises:
            SettingsError: they cannot be loaded, or differ.
        """
        problem = self._load(settings) if self.leads else None
        problem = self.told(problem)
        if problem is not None:
            raise SettingsError(problem)
        if not self.leads:
            problem = self._load(settings)
        digest = problem if self.task is None else self.task.fingerprint()
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, digest, group=self.orders)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise SettingsError(f"process {rank} has other data than process 0: {other} instead of {digests[0]}")
        return digests[0]

    def _load(self, settings: RaceSettings) -> str | None:
        """Load the task; what went wrong."""
        try:
            self.task = settings.info.load(text=settings.text)
        except (ImportError, ValueError, OSError) as error:
            return str(error) or type(error).__name__
        return None

    def run(self, run: RunSettings, file: Path, progress: Callable[[int, float], None]) -> Record:
        """As the first process, train one run with all others and keep its record."""
        self.told(run)
        record = self.train(run, progress, file.with_suffix(".log"))
        if record["status"] != "failed":
            write_json(file, {"settings": asdict(run), **record})
        return record

    def follow(self) -> int:
        """As another process, take part in runs until there are no more; the exit status."""
        while isinstance(order := self.told(), RunSettings):
            self.train(order)
        return order

    def dismiss(self, status: int) -> None:
        """As the first process, let the others end with ``status``."""
        with suppress(RuntimeError):  # they are gone
            self.told(status)

    def train(
        self,
        run: RunSettings,
        progress: Callable[[int, float], None] = lambda step, loss: None,
        log: Path | None = None,
    ) -> Record:
        """Train; what all processes fail of together is a record with status "failed".

        Raises:
            Exception: what this process alone has failed of. It ends of it, and torchrun ends the others.
        """
        torch.set_num_threads(1)  # of this thread
        if self.device.startswith("cuda"):
            torch.cuda.set_device(self.device)
        try:
            return train(replace(run, device=self.device), self.task, progress)
        except Exception as error:
            self._fail_together(error)
            if log is not None:
                write_text(log, traceback.format_exc())
            return {"status": "failed", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:480]}"}

    def _fail_together(self, error: Exception) -> None:
        """Raise ``error`` unless all others come here too."""
        try:
            dist.barrier(self.failures)
        except RuntimeError:
            raise error from None
