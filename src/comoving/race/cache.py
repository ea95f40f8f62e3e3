"""Arrays that cost time to make, kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from comoving.files import check_folder, explained, make_folder, replacing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LOG = logging.getLogger(__name__)


def folder() -> Path:
    """``$COMOVING_CACHE``, or ~/.cache/comoving."""
    return Path(os.environ.get("COMOVING_CACHE") or Path.home() / ".cache" / "comoving")


def load(
    name: str,
    spec: "DataclassInstance",
    source: Path,
    names: tuple[str, ...],
    make: Callable[[], tuple[NDArray[Any], ...]],
) -> tuple[NDArray[Any], ...]:
    """What ``make`` returns, kept under a name made from every field of ``spec`` and the code in ``source``.

    A file that is cut short, or holds something else, is named in the log, made anew and replaced.

    Args:
        name: beginning of the file's name, for people.
        spec: fixes the arrays completely.
        source: the module that makes them.
        names: of the arrays.
        make: is called if they are not there yet.

    Raises:
        OSError: the file cannot be read or written; the message says which and what to do.
    """
    code = hashlib.sha256(source.read_bytes()).hexdigest()
    key = hashlib.sha256((json.dumps(asdict(spec), sort_keys=True) + code).encode()).hexdigest()[:16]
    path = folder() / f"{name}-{key}.npz"
    kept = stored(path, names)
    if kept is not None:
        return kept
    with movable():
        check_folder(path.parent)  # missed here rather than after a minute of solving
    arrays = make()
    with movable():
        make_folder(path.parent)
        with replacing(path) as file:
            named: Any = dict(zip(names, arrays, strict=True))
            np.savez_compressed(file, **named)
    return arrays


def stored(path: Path, names: tuple[str, ...]) -> tuple[NDArray[Any], ...] | None:
    """The arrays ``names`` in a file; None where there is none, or one without them, which the log then names."""
    if not path.exists():
        return None
    with movable(), explained(path):
        file = path.open("rb")
    with file:
        try:
            found = np.load(file)
            return tuple(found[name] for name in names)
        except Exception as error:  # zipfile, zlib and NumPy's parsers have no common class for bytes of any kind
            said = (str(error) or type(error).__name__).splitlines()[0]
            LOG.warning("%s is damaged (%s); it is made anew", path, said)
            return None


@contextmanager
def movable() -> Generator[None]:
    """Errors of the system about the cache say how to move it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; COMOVING_CACHE=FOLDER moves the cache", error.filename
        ) from error
