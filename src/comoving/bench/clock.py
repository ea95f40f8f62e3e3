"""Times: processor seconds of this process, so that the load of the machine meets them less than the wall clock."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def seconds(work: Callable[[], Any], repeats: int = 1, inner: int = 1) -> float:
    """Least processor time of one call of ``work`` over ``repeats`` tries of ``inner`` calls each."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(inner):
            work()
        best = min(best, (time.process_time() - start) / inner)
    return best


def machine() -> dict[str, Any]:
    """What this runs on, and how busy it is."""
    cpu = platform.processor()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [line.split(":")[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load}


def versions() -> dict[str, str]:
    """Of Python and the packages that take part; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("comoving", "torch", "tensorly", "neuraloperator", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
