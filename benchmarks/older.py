"""An older revision of comoving beside the installed one, for comparisons in one process."""

import atexit
import importlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

NAME = "comoving_before"


def older(revision: str) -> ModuleType:
    """The package as it was at a git revision, imported under another name.

    Raises:
        subprocess.CalledProcessError: no such revision in this repository.
    """
    home = Path(__file__).parent.parent
    archive = subprocess.run(
        ["git", "archive", revision, "src/comoving"], cwd=home, capture_output=True, check=True
    ).stdout
    folder = tempfile.mkdtemp(prefix="comoving-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # some of its modules are imported late
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    (Path(folder) / "src" / "comoving").rename(Path(folder) / NAME)
    sys.path.insert(0, folder)
    return importlib.import_module(NAME)
