"""Checkpoints that a crash cannot break."""

import os
from pickle import PicklingError
from typing import Any, BinaryIO

import torch

from ..files import StrPath, replacing

_NOTHING = object()
_ALLOWED = "save state_dict()s, tensors, numbers and text"


def save(path: StrPath, state: Any = _NOTHING, /, **entries: Any) -> None:
    """Save a checkpoint: all of it, or the file at ``path`` stays as it was.

        comoving.save("run.pt", model=model, optimizer=optimizer, step=step)

        saved = torch.load("run.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])

    It is written to a file beside ``path``, forced onto the disk, and renamed. A kill, a full disk or a loss of power
    on the way leaves the checkpoint before as it was; after an error nothing else is left, after a kill possibly a file
    ``*.tmp``. Permissions are those of the file that is replaced, or what ``open`` gives a new one. Where several
    processes save to one path, the last one wins.

    Args:
        path: of the file; its folder must exist.
        state: what to save, as ``torch.save`` takes it: a ``state_dict()``, tensors, numbers, text, and lists and
            dictionaries of them. A dictionary is the same as its entries by name.
        **entries: several things by name, in place of ``state``; the file holds a dictionary of them. What has a
            ``state_dict()`` (a module, an optimizer, a scheduler) is saved as that, here and as ``state``.

    Raises:
        TypeError: nothing to save, ``state`` and names together, a path that is none, or a content that
            ``torch.load(path, weights_only=True)`` would refuse, such as NumPy's arrays and numbers; it is named.
        OSError: what the system refuses (a full disk, a folder that is missing or may not be written to), with the
            path and what to do.
    """
    if not isinstance(path, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"a path comes first, unlike torch.save: comoving.save(path, state); got {type(path).__name__} for it"
        )
    if (state is _NOTHING) == (not entries):
        raise TypeError(
            "give either one state or entries by name: comoving.save(path, model=model, optimizer=optimizer)"
        )
    content = entries if state is _NOTHING else state
    if type(content) is dict:
        content = {name: _state_of(value) for name, value in content.items()}
    content = _state_of(content)
    with replacing(path) as file:
        watched = _Watched(file)
        try:
            torch.save(content, watched)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            if watched.error is not None:
                raise watched.error from None
            raise
        except (AttributeError, TypeError, PicklingError) as error:
            raise TypeError(f"not saved to {os.fspath(path)!r}: {error}; {_ALLOWED}") from error
        file.flush()
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file.name)
        if unsafe:
            raise TypeError(
                f"not saved to {os.fspath(path)!r}: the content holds {', '.join(sorted(unsafe))}, which "
                f"torch.load(path, weights_only=True) refuses; {_ALLOWED}"
            )


def _state_of(value: Any) -> Any:
    """Its state_dict, where it has one."""
    own = getattr(value, "state_dict", None)
    return own() if callable(own) else value


class _Watched:
    """A file that remembers what the system refused, which torch's writer turns into an error about its positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
