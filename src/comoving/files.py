"""Files that appear whole or not at all, and errors that say what to do."""

import errno
import json
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

StrPath = str | os.PathLike[str]

_FULL = "free some space, or choose another place"
_CLOSED = "choose a place that may be written to"
ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.ENOENT: "make the folder {folder!r} first",
    errno.EISDIR: "give the name of a file, or remove the folder",
    errno.ENOTDIR: "there is a file where a folder is needed: choose another place",
    errno.EEXIST: "there is a file where a folder is needed: choose another place",
}
"""What to do about a refusal of the system."""


def refused(code: int, path: StrPath, advice: str = "") -> OSError:
    """The error of the system numbered ``code`` about ``path``, with what to do about it."""
    advice = advice or ADVICE[code].format(folder=os.path.dirname(path) or ".")
    return OSError(code, f"{os.strerror(code)}; {advice}", os.fspath(path))


@contextmanager
def explained(path: StrPath, *also: StrPath) -> Generator[None]:
    """Errors of the system about ``path`` (or ``also``) get its name and what to do, and keep class and number."""
    try:
        yield
    except OSError as error:
        about = error.filename is None or str(error.filename) in (str(name) for name in (path, *also))
        if error.errno in ADVICE and about:
            raise refused(error.errno, path) from error
        raise


@contextmanager
def replacing(path: StrPath) -> Generator[BinaryIO]:
    """A new file, open for bytes, that takes the place of ``path`` when the block ends without an error.

    It is written beside ``path``, forced onto the disk and renamed, and then the folder is forced onto the disk: after
    a crash, of the machine too, there is all of the old file or all of the new one. After an error the new file is
    removed and the old one is as it was. The mode is what ``open`` gives: that of the old file, else by the umask.
    Where ``path`` is a link, the file it leads to is replaced.

    Raises:
        OSError: what the system refuses, its message with ``path`` and what to do; also where ``path`` is a folder, a
            device or a pipe, or may not be written to.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    mode = _mode_of(target, path)
    with explained(path, target, partial, target.parent):
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                os.chmod(partial, mode)
            os.replace(partial, target)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)
            raise
        _force(target.parent)


def _mode_of(target: Path, path: StrPath) -> int | None:
    """Permissions of the file that is to be replaced, None where there is none yet."""
    with explained(path, target):
        try:
            found = target.stat()
        except FileNotFoundError:
            return None
    if stat.S_ISDIR(found.st_mode):
        raise refused(errno.EISDIR, path)
    if not stat.S_ISREG(found.st_mode):
        raise refused(errno.EPERM, path, "it is a device or a pipe, which cannot be replaced: give the name of a file")
    if not os.access(target, os.W_OK):
        raise refused(errno.EACCES, path)
    return stat.S_IMODE(found.st_mode)


def _force(folder: Path) -> None:
    """Put the names in a folder onto the disk; some systems and file systems cannot, and do it by themselves."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make ``path`` and the folders above it, where they are not there.

    Raises:
        OSError: what the system refuses, with ``path`` and what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(error.errno, path) if error.errno in ADVICE else error from error


def check_folder(path: Path) -> None:
    """See to it before any work that files can be written into ``path``; nothing is made yet.

    Raises:
        OSError: if ``path``, or what of it is there, is no folder or may not be written to.
    """
    place = Path(os.path.abspath(path))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise refused(errno.ENOTDIR, path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise refused(errno.EACCES, path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` by :func:`replacing`; folders are made."""
    make_folder(path.parent)
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8 by :func:`replacing`; folders are made."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; numbers that are not finite become null, which JSON can hold."""
    write_text(path, json.dumps(finite(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None, at any depth."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
