"""What a figure was measured on: the machine and the versions of packages."""

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from comoving.race.contenders import version


def machine(device: str, jobs: int) -> dict[str, Any]:
    """Processor, cores, threads, GPU and system of ``jobs`` runs at once on ``device``."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads_per_run": 1,
        "runs_at_once": jobs,
        "gpu": torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None,
        "system": platform.platform(),
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of this package, of what every run needs, and of ``packages``."""
    names = sorted({"torch", "numpy", "transformers", "scipy", "scikit-learn", *packages})
    return {"python": sys.version.split()[0], "comoving": version("comoving"), **{p: version(p) for p in names}}
