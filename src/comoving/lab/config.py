"""Configurations: a model, its data, a training and the directions that are looked for, as a small TOML file."""

import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

from comoving.directions.targets import TARGETS
from comoving.race.settings import SettingsError

FOLDER = Path(__file__).with_name("configs")
TASKS = ("images", "bytes")
SOURCES = ("change", "weight", "momentum")
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "an int"),
    bool: ((bool,), "true or false"),
    float: ((int, float), "a number"),
    tuple[int, ...]: ((int,), "a list of ints"),
    tuple[float, ...]: ((int, float), "a list of numbers"),
    dict[str, Any]: ((dict,), "a table"),
}
"""Annotation of a field -> the types of its value, or of each of its values, and their name."""
INTEGERS = {
    **dict.fromkeys(("hidden_size", "layers", "heads", "intermediate_size", "steps", "batch"), 1),
    **dict.fromkeys(("patch_size", "image_size", "evaluations", "spec_every", "spec_topk"), 1),
    "samples": 0,
}
"""Fields that are ints -> the least value."""
INTERVALS = {
    "warmup": (0.0, 0.9),
    "stable": (0.0, 1.0),
    "extract_at": (0.0, 0.95),
    "weight_decay": (0.0, 1.0),
    "clamp": (0.0, 1e6),
}


@dataclass(frozen=True)
class Config:
    """What the arms of a study have in common.

    Args:
        name: the file's name without ``.toml``.
        title: one line.
        task: "images" (a ViT that classifies) or "bytes" (a LLaMA that predicts the next byte).
        source: of images "digits", "fashion", or the name or folder of a Hugging Face data set; of bytes as
            ``--text`` of the race ("" = CPython's standard library).
        hidden_size, layers, heads, intermediate_size: of the transformer.
        patch_size, image_size: side of a patch and of a picture in pixels; pictures of another size are resized.
        samples: at most so many training samples, 0 for all.
        augment: random flips and shifts of training pictures.
        steps, batch: updates, and samples per update.
        rate: AdamW's learning rate; ``rates`` are the multiples of it that every arm may choose from.
        warmup: share of the steps in which the rate grows linearly; a cosine to zero follows.
        weight_decay: decoupled.
        evaluations: looks at the validation data along a run.
        targets: patterns of layers whose directions are studied.
        ranks: how many directions, one arm each.
        extract_from: "change" (of the weight since initialization), "weight", or "momentum": whose leading singular
            directions are extracted.
        extract_at: share of the steps after which directions are extracted, or gained, or rates increased.
        boost: factor on the learning rate of an extracted core (E4), and of the whole layers in its control B1.
        amplitude_rate: factor on the learning rate of the amplitudes of branches.
        clamp: c of the bound c/sqrt(d_in) on the largest singular value of a branch; 0 for none.
        alpha: factor on the gradient in stable directions (3B), and on the rate of the whole layers in its control B1.
        stable: principal cosine with the reading before from which a direction counts as stable.
        spec_every: updates between readings of the spectra.
        spec_topk: singular values and directions that are read; the largest rank if that is more.
        absolute: values to reach, besides shares of the baseline's own final value.
        tolerance: difference of final values that does not matter, in the metric's unit.
        harder: changes that make the task harder, for the follow-up of studies 1 and 2.

    Raises:
        SettingsError: for a value outside its interval; the message says which.
    """

    name: str
    title: str
    task: str
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    steps: int
    batch: int
    rate: float
    source: str = ""
    patch_size: int = 2
    image_size: int = 8
    samples: int = 0
    augment: bool = False
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    warmup: float = 0.1
    weight_decay: float = 0.05
    evaluations: int = 40
    targets: str = TARGETS
    ranks: tuple[int, ...] = (4, 8)
    extract_from: str = "change"
    extract_at: float = 0.2
    boost: float = 5.0
    amplitude_rate: float = 10.0
    clamp: float = 0.7
    alpha: float = 2.0
    stable: float = 0.7
    spec_every: int = 20
    spec_topk: int = 8
    absolute: tuple[float, ...] = ()
    tolerance: float = 0.2
    harder: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self._typed()
        self._one_of("task", TASKS)
        self._one_of("extract_from", SOURCES)
        for name, least in INTEGERS.items():
            self._integer(name, getattr(self, name), least)
        for rank in self.ranks:
            self._integer("ranks", rank, 1)
        for name in ("rate", "boost", "amplitude_rate", "tolerance"):
            self._positive(name, getattr(self, name))
        for value in self.rates:
            self._positive("rates", value)
        for name, (low, high) in INTERVALS.items():
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"{self.name}: {name} is {getattr(self, name)}; it must lie in [{low}, {high}]")
        if not 1 < self.alpha < float("inf"):
            raise SettingsError(f"{self.name}: alpha is {self.alpha}; it must be above 1 and finite")
        self._check_together()

    def _typed(self) -> None:
        """Every field has the type of its annotation; a whole number is a number, too."""
        for f in fields(self):
            value, (kinds, wanted) = getattr(self, f.name), KINDS[f.type]
            listed = wanted.startswith("a list")
            items: tuple[Any, ...] = value if listed and isinstance(value, tuple) else (value,)
            wrong = any(not isinstance(x, kinds) or (isinstance(x, bool) and bool not in kinds) for x in items)
            if wrong or (listed and not isinstance(value, tuple)):
                raise SettingsError(f"{self.name}: {f.name} is {value!r}; it must be {wanted}")

    def _check_together(self) -> None:
        """Fields that must fit each other."""
        for name in ("rates", "ranks", "absolute"):
            given = getattr(self, name)
            if len({f"{value:.4g}" for value in given}) < len(given) or not all(map(isfinite, given)):
                raise SettingsError(f"{self.name}: {name} are {given}; they must be finite, and differ in four digits")
        if not self.ranks or not self.rates:
            raise SettingsError(f"{self.name}: ranks and rates must not be empty")
        if self.hidden_size % self.heads:
            raise SettingsError(f"{self.name}: hidden_size {self.hidden_size} is no multiple of {self.heads} heads")
        if self.task == "images" and self.image_size % self.patch_size:
            raise SettingsError(f"{self.name}: image_size {self.image_size} is no multiple of patch {self.patch_size}")
        if not 1 <= self.split < self.steps:
            raise SettingsError(f"{self.name}: extract_at {self.extract_at} is step {self.split} of {self.steps}")

    def _one_of(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise SettingsError(f"{self.name}: {name} is {getattr(self, name)!r}; known: {', '.join(known)}")

    def _integer(self, name: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SettingsError(f"{self.name}: {name} is {value!r}; it must be an int of at least {least}")

    def _positive(self, name: str, value: float) -> None:
        if not 0 < value < float("inf"):
            raise SettingsError(f"{self.name}: {name} is {value}; it must be positive and finite")

    @property
    def split(self) -> int:
        """The number of updates before directions are extracted."""
        return round(self.extract_at * self.steps)

    @property
    def topk(self) -> int:
        """Directions that are read of every target layer."""
        return max(self.spec_topk, *self.ranks)

    @property
    def metric(self) -> dict[str, Any]:
        """What is reported, in which direction it is better, and the value of knowing nothing."""
        if self.task == "images":
            found = {"name": "accuracy in %", "goal": "max", "origin": 0.0, "unit": "pt"}
        else:
            found = {"name": "bits per byte", "goal": "min", "origin": 8.0, "unit": "bits"}
        return found | {"tolerance": self.tolerance, "absolute": list(self.absolute)}

    def harder_task(self) -> "Config":
        """The same on a harder task.

        Raises:
            SettingsError: for a configuration that does not say what is harder.
        """
        if not self.harder:
            raise SettingsError(f"{self.name} has no table [harder], which says how to make its task harder")
        return configure(self, self.harder)

    def plain(self) -> dict[str, Any]:
        """All fields, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def configure(config: Config, changes: dict[str, Any]) -> Config:
    """``config`` with some fields changed.

    Raises:
        SettingsError: unknown fields, or values outside their intervals.
    """
    _known(config.name, changes)
    return replace(config, **_tuples(changes))


def names() -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Config:
    """A configuration of the package by its name, or one of the user's by its path.

    Raises:
        SettingsError: no such configuration, no TOML, unknown or missing fields, values outside their intervals.
    """
    path = FOLDER / f"{name}.toml" if name in names() else Path(name).expanduser()
    if not path.is_file():
        raise SettingsError(f"no configuration {name!r}; known: {', '.join(names())}, or the path of a .toml file")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is no TOML: {error}") from error
    _known(path.stem, found)
    harder = found.get("harder", {})
    if not isinstance(harder, dict):
        raise SettingsError(f"{path.stem}: harder is {harder!r}; it must be a table")
    _known(path.stem, harder)
    missing = [f.name for f in fields(Config) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in missing if name not in found and name != "name"]
    if missing:
        raise SettingsError(f"{path.stem}: missing {', '.join(missing)}")
    return from_plain({"name": path.stem, **found})


def from_plain(found: dict[str, Any]) -> Config:
    """The inverse of :meth:`Config.plain`."""
    return Config(**_tuples(found))


def _known(name: str, found: dict[str, Any]) -> None:
    known = {f.name for f in fields(Config)} - {"name"}
    unknown = sorted(set(found) - known)
    if unknown:
        raise SettingsError(f"{name}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _tuples(found: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
