"""Parts by name, for command lines and configuration files: ``"rotate"``, ``"power(momentum=0.5)"``."""

import ast
from typing import Any

from .codecs import BFloat16, Full, Int4, Int8, RankOne
from .finders import (
    HOOI,
    Amortized,
    BlockSelection,
    Correlation,
    CosineSelection,
    Exact,
    Growing,
    IncrementalSVD,
    Lazy,
    Nystroem,
    NystroemTucker,
    Oja,
    Power,
    Randomized,
    RandomizedTucker,
    RandomProjection,
    SequentialHOSVD,
    StreamingTucker,
    TrainIncrement,
    TrainRandomized,
    TrainSVD,
    TreeIncrement,
    TreeSVD,
)
from .frames import Blocks, Cosines, Modes, Seeded, SparseModes, Trains, Trees
from .precondition import Factored, Kronecker, Plain
from .ranks import Energy, Fixed, Temperature, Tolerance
from .ranks.assignment import AUTO, ROLES
from .residual import Channel, Discard, Feedback, Fira, MomentumBuffer, Sign, Sparse
from .rules import SOAP, Adafactor, Adam, Columns, Lion, Momentum, Muon, Scheduled, Shampoo
from .transport import Carry, Keep, Reset, Rotate

PARTS: dict[str, dict[str, type]] = {
    "frame": {
        "modes": Modes,
        "blocks": Blocks,
        "cosines": Cosines,
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
        "incremental": IncrementalSVD,
        "lazy": Lazy,
        "growing": Growing,
        "correlation": Correlation,
        "cosine": CosineSelection,
        "random": RandomProjection,
        "train_svd": TrainSVD,
        "train_randomized": TrainRandomized,
        "train_increment": TrainIncrement,
        "tree_svd": TreeSVD,
        "tree_increment": TreeIncrement,
        "sequential_hosvd": SequentialHOSVD,
        "hooi": HOOI,
        "randomized_tucker": RandomizedTucker,
        "nystrom_tucker": NystroemTucker,
        "streaming_tucker": StreamingTucker,
        "block_selection": BlockSelection,
    },
    "precondition": {"plain": Plain, "factored": Factored, "kronecker": Kronecker},
    "transport": {"keep": Keep, "reset": Reset, "rotate": Rotate, "carry": Carry},
    "rule": {
        "adam": Adam,
        "momentum": Momentum,
        "scheduled": Scheduled,
        "adafactor": Adafactor,
        "lion": Lion,
        "muon": Muon,
        "columns": Columns,
        "shampoo": Shampoo,
        "soap": SOAP,
    },
    "residual": {
        "discard": Discard,
        "feedback": Feedback,
        "momentum_buffer": MomentumBuffer,
        "fira": Fira,
        "channel": Channel,
        "sparse": Sparse,
        "sign": Sign,
    },
    "ranks": {"fixed": Fixed, "energy": Energy, "tolerance": Tolerance, "temperature": Temperature},
    "codec": {"full": Full, "bfloat16": BFloat16, "int8": Int8, "int4": Int4, "rank_one": RankOne},
}
PARTS["moments"] = PARTS["bases"] = PARTS["codec"]


def part(role: str, value: Any) -> Any:
    """A part from its text, ``name`` or ``name(field=literal, ...)``; anything but text is returned as it is.

    The codecs may be "auto", which is no part; see :mod:`comoving.ranks.assignment`. A field that is a part itself is
    given by its text too: ``"sparse(rule='adam')"``, ``"blocks(inner='trains')"``.

    Raises:
        ValueError: text of another form, or an unknown name.
        TypeError: an unknown field.
    """
    if role not in PARTS or not isinstance(value, str) or (role in ROLES and value == AUTO):
        return value
    known = PARTS[role]
    try:
        tree = ast.parse(value, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        fields = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg is not None}
    except (SyntaxError, ValueError):
        name, fields, call = "", {}, ast.Call(ast.Name(""), [], [])
    if name.lower() not in known or call.args:
        raise ValueError(f"{role} must be one of {', '.join(known)}, as name or name(field=value), got {value!r}")
    return known[name.lower()](
        **{name: part(role if name == "inner" else name, given) for name, given in fields.items()}
    )
