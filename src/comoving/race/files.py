"""Files that appear whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path`` and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


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
