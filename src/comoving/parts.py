"""Parts by name, for command lines and configuration files: ``"rotate"``, ``"power(inertia=0.5)"``."""

import ast
from dataclasses import fields
from typing import Any

from .cadence import Every, Growing, Lazy
from .codecs import BFloat16, Full, Int4, Int8, InWeights, RankOne, TopDirections
from .finders import (
    Amortized,
    BlockSelection,
    Correlation,
    CosineSelection,
    Delayed,
    Exact,
    Grassmann,
    IncrementalSVD,
    Nystroem,
    Oja,
    Power,
    Randomized,
    RandomProjection,
    RandomWalk,
    Standing,
    StreamingTucker,
    TrainIncrement,
    TrainRandomized,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from .frames import Blocks, Cosines, Modes, Pooled, Seeded, SparseModes, Trains, Trees
from .precondition import Factored, Kronecker, Plain
from .ranks import Energy, Fixed, Temperature, Tolerance
from .ranks.assignment import AUTO, ROLES
from .residual import Channel, Details, Discard, Feedback, Fira, Folded, MomentumBuffer, Raw, Sign, Sparse, SubsetNorm
from .rules import (
    SOAP,
    SWAN,
    Adafactor,
    Adam,
    AdamS,
    Columns,
    Lion,
    LowRankAdam,
    LowRankMuon,
    Momentum,
    Muon,
    Normalized,
    NorMuon,
    Scheduled,
    Shampoo,
)
from .transport import Carry, Keep, Reset, Rotate
from .validate import nearest

PARTS: dict[str, dict[str, type]] = {
    "frame": {
        "modes": Modes,
        "blocks": Blocks,
        "cosines": Cosines,
        "pooled": Pooled,
        "seeded": Seeded,
        "trains": Trains,
        "trees": Trees,
        "sparse": SparseModes,
    },
    "finder": {
        "exact": Exact,
        "amortized": Amortized,
        "power": Power,
        "randomized": Randomized,
        "nystroem": Nystroem,
        "oja": Oja,
        "grassmann": Grassmann,
        "random_walk": RandomWalk,
        "incremental": IncrementalSVD,
        "correlation": Correlation,
        "cosine": CosineSelection,
        "delayed": Delayed,
        "random": RandomProjection,
        "train_svd": TrainSVD,
        "train_randomized": TrainRandomized,
        "train_increment": TrainIncrement,
        "tree_svd": TreeSVD,
        "tree_increment": TreeIncrement,
        "streaming_tucker": StreamingTucker,
        "block_selection": BlockSelection,
        "standing": Standing,
    },
    "cadence": {"every": Every, "growing": Growing, "lazy": Lazy},
    "precondition": {"plain": Plain, "factored": Factored, "kronecker": Kronecker},
    "transport": {"keep": Keep, "reset": Reset, "rotate": Rotate, "carry": Carry},
    "rule": {
        "adam": Adam,
        "momentum": Momentum,
        "scheduled": Scheduled,
        "adafactor": Adafactor,
        "lion": Lion,
        "muon": Muon,
        "normuon": NorMuon,
        "columns": Columns,
        "normalized": Normalized,
        "swan": SWAN,
        "adams": AdamS,
        "low_rank_adam": LowRankAdam,
        "low_rank_muon": LowRankMuon,
        "shampoo": Shampoo,
        "soap": SOAP,
    },
    "residual": {
        "discard": Discard,
        "feedback": Feedback,
        "momentum_buffer": MomentumBuffer,
        "fira": Fira,
        "folded": Folded,
        "details": Details,
        "subset_norm": SubsetNorm,
        "channel": Channel,
        "sparse": Sparse,
        "sign": Sign,
        "raw": Raw,
    },
    "ranks": {"fixed": Fixed, "energy": Energy, "tolerance": Tolerance, "temperature": Temperature},
    "codec": {
        "full": Full,
        "bfloat16": BFloat16,
        "int8": Int8,
        "int4": Int4,
        "rank_one": RankOne,
        "top_directions": TopDirections,
        "in_weights": InWeights,
    },
}
PARTS["moments"] = PARTS["bases"] = PARTS["codec"]


def part(role: str, value: Any) -> Any:
    """A part from text or plain data; anything else is returned as it is.

    Text is ``name`` or ``name(field=literal, ...)``; data are ``{"part": name, field: value, ...}``, as a checkpoint
    holds them. The codecs may be "auto", which is no part; see :mod:`comoving.ranks.assignment`. A field that is a part
    itself is given likewise: ``"sparse(rule='adam')"``, ``"blocks(inner='trains')"``.

    Raises:
        ValueError: text of another form, or an unknown name; the fields or the nearest known name are given.
        TypeError: an unknown field.
    """
    if role not in PARTS or not isinstance(value, str | dict) or (role in ROLES and value == AUTO):
        return value
    known = {name.lower(): kind for name, kind in PARTS[role].items()}
    if isinstance(value, dict):
        given: dict[str, Any] = {**value}
        name, fields_ = given.pop("part", None), given
        # A checkpoint says the class, text the name.
        known |= {kind.__name__.lower(): kind for kind in PARTS[role].values()}
    else:
        name, fields_ = _read(value)
        called = value.partition("(")[0].strip().lower()
        if name is None and called in known:
            own = [f.name for f in fields(known[called])]
            raise ValueError(
                f"{role} {called} takes its fields as {called}(field=value), each value a number, text in quotes, "
                f"None, True, False or a tuple of these (a part as text too: inner='power'); "
                f"{'its fields are ' + ', '.join(own) if own else 'it has none'}, got {value!r}"
            )
    if not isinstance(name, str) or name.lower() not in known:
        near = nearest(name.lower(), PARTS[role]) if isinstance(name, str) else ""
        form = "name or name(field=value)" if isinstance(value, str) else "{'part': name, field: value}"
        raise ValueError(f"{role} must be one of {', '.join(PARTS[role])}, as {form}, got {value!r}{near}")
    kind = known[name.lower()]
    own = [f.name for f in fields(kind)]
    for field in fields_:
        if field not in own:
            raise TypeError(
                f"{role} {name} has no field {field!r}{nearest(field, own)}; "
                f"{'its fields are ' + ', '.join(own) if own else 'it has none'}, got {value!r}"
            )
    return kind(**{field: part(role if field == "inner" else field, x) for field, x in fields_.items()})


def _read(text: str) -> tuple[str | None, dict[str, Any]]:
    """The name and fields in the text of a part; None for text of another form."""
    try:
        tree = ast.parse(text, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        if not isinstance(call.func, ast.Name) or call.args:
            return None, {}
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None:  # **{...}
                return None, {}
            found[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError):
        return None, {}
    return call.func.id, found


def in_words(part: Any) -> str:
    """A part without the fields that have their default value."""
    if not hasattr(part, "__dataclass_fields__"):
        return str(part)
    set_fields = [f"{f.name}={getattr(part, f.name)!r}" for f in fields(part) if getattr(part, f.name) != f.default]
    return f"{type(part).__name__}({', '.join(set_fields)})"
