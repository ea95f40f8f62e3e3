"""A file with one reading a line."""

import json
from collections.abc import Mapping
from pathlib import Path

from comoving.files import finite, make_folder, write_text


class JSONLines:
    """Appends {"step": updates, name: value, ...} a line, written out at once.

    Args:
        path: of the file; folders are made. A last line that was cut short by a crash is dropped.
        resume_at: for a run that goes on from a checkpoint of that many updates: lines of later ones are dropped, which
            the run will write again. None keeps all.

    Raises:
        ValueError: a line of the file is not of this kind; the file is left as it is.
    """

    def __init__(self, path: str | Path, resume_at: int | None = None) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        if self.path.exists():
            try:
                text = self.path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path} holds no readings ({error}): move it away") from error
            whole = text[: text.rfind("\n") + 1]
            kept = "".join(line for line in whole.splitlines(keepends=True) if self._stays(line, resume_at))
            if kept != text:
                write_text(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")

    def _stays(self, line: str, resume_at: int | None) -> bool:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} holds a line that is no reading, {line[:60]!r}: move it away") from error
        return resume_at is None or step <= resume_at

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; numbers that are not finite become null."""
        self._file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
