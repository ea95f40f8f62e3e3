"""Arrays that cost time to make, kept on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def folder() -> Path:
    """``$COMOVING_CACHE``, or ~/.cache/comoving."""
    return Path(os.environ.get("COMOVING_CACHE") or Path.home() / ".cache" / "comoving")


def load(
    name: str, spec: "DataclassInstance", source: Path, make: Callable[[], Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """What ``make`` returns, kept under a name made from every field of ``spec`` and the code in ``source``.

    The file appears by one rename, so that a run which is interrupted, or two at once, leave no half-written file.

    Args:
        name: beginning of the file's name, for people.
        spec: fixes the arrays completely.
        source: the module that makes them.
        make: is called if they are not there yet.
    """
    code = hashlib.sha256(source.read_bytes()).hexdigest()
    key = hashlib.sha256((json.dumps(asdict(spec), sort_keys=True) + code).encode()).hexdigest()[:16]
    path = folder() / f"{name}-{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return dict(stored)
    arrays: Any = dict(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez_compressed(file, **arrays)
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
    return arrays
