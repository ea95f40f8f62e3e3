"""Which of our files a run's outcome depends on: those that are imported, directly or not, from where it starts."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import comoving

ROOT = Path(comoving.__file__).parent
ASIDE = ("race", "lab", "bench", "memory", "fuzz", "distributed", "directions", "cli.py", "catalogue.py")
"""What steps no optimizer in one process."""
REGISTRY = ("race/tasks/__init__.py", "race/settings.py", "race/__init__.py", "race/cache.py")
"""What decides on no outcome that is not in a run's settings or in its data."""


def named(module: str) -> list[Path]:
    """The files that an import of ``module`` ("comoving.a.b") runs, its packages' included."""
    found: list[Path] = []
    place = ROOT
    for part in ["", *module.split(".")[1:]]:
        place = place / part
        found += [file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()]
    return found


@cache
def imported(path: Path) -> tuple[Path, ...]:
    """Our files that the code in ``path`` imports anywhere in it."""
    here = ["comoving", *path.relative_to(ROOT).with_suffix("").parts]
    found: list[Path] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(here[: len(here) - node.level]) if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            modules = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [file for module in modules if module.split(".")[0] == "comoving" for file in named(module)]
    return tuple(dict.fromkeys(found))


def closure(starts: Iterable[Path], kept: Iterable[str] = (), aside: Iterable[str] = ()) -> list[Path]:
    """``starts`` and all that they import, sorted; followed only where it lies below ``kept`` and not below ``aside``.

    Both are paths relative to the package; no ``kept`` keeps all.
    """
    kept, aside = tuple(kept), tuple(aside)

    def below(path: Path, places: tuple[str, ...]) -> bool:
        relative = path.relative_to(ROOT)
        return any(relative == Path(place) or Path(place) in relative.parents for place in places)

    found: set[Path] = set()
    waiting = [path for path in starts]
    while waiting:
        path = waiting.pop()
        if path in found or below(path, aside) or (kept and not below(path, kept)):
            continue
        found.add(path)
        waiting += imported(path)
    return sorted(found)


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of names and contents of our files, 16 hexadecimal digits."""
    total = hashlib.sha256()
    for path in paths:
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def of_optimizers(wrapped: bool = False) -> list[Path]:
    """What steps our recipes; with ``wrapped``, in several processes."""
    aside = [place for place in ASIDE if not (wrapped and place == "distributed")]
    starts = [ROOT / "__init__.py", *(sorted((ROOT / "distributed").glob("*.py")) if wrapped else [])]
    return closure(starts, aside=aside)


def of_task(module: str) -> list[Path]:
    """What trains a run of the task in ``race/tasks/MODULE.py``, apart from optimizers."""
    starts = [ROOT / "race" / "runner.py", ROOT / "race" / "tasks" / f"{module}.py"]
    return closure(starts, kept=["race"], aside=REGISTRY)
