"""Processes of this machine that talk through gloo."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returned in each of so many processes, of one thread each."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (count, folder, work, args), nprocs=count)
        return [torch.load(Path(folder) / f"result.{rank}", weights_only=False) for rank in range(count)]


def _work(rank: int, count: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", count), rank=rank, world_size=count)
    torch.save(work(rank, *args), Path(folder) / f"result.{rank}")
    dist.barrier()
    dist.destroy_process_group()
