"""The choice of parameters as a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .codecs import Codec, Full, InWeights
from .frames.base import Rank
from .grouping import param_groups
from .parts import in_words
from .ranks.limit import adamw_bytes
from .sites import Site
from .state import current, layout, parts_of, spec_bytes


@dataclass(frozen=True)
class Row:
    """One parameter: its name, role and shape, how it is seen, its core's shape, the bytes of its state, and why.

    ``rule`` says what turns gradients into updates, and how its moments are stored; ``rate`` is the factor of the
    learning rate.

    ``whole`` is set where the optimizer's own rule steps it in the whole frame, as full-rank methods do. ``codec`` and
    ``moments`` store the residual's buffer and the moments of a projected parameter; ``assigned`` is set where a budget
    chose one of them, and the table then has a column for both.
    """

    parameter: str
    shape: tuple[int, ...]
    view: str
    ranks: tuple[int | None, ...]
    bytes: int
    why: str
    whole: bool = False
    codec: Codec | None = None
    moments: Codec | None = None
    assigned: bool = False
    role: str = ""
    rule: str = ""
    rate: float = 1.0
    adamw_bytes: int = 0

    @property
    def projected(self) -> bool:
        """Whether any mode is compressed."""
        return any(r is not None for r in self.ranks)


@dataclass(frozen=True)
class Explanation:
    """Rows of the table; ``str()`` prints it."""

    rows: tuple[Row, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of state between two steps, all parameters together."""
        return sum(row.bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        """Bytes of the float32 state that torch's AdamW would keep for the same parameters."""
        return sum(row.adamw_bytes for row in self.rows)

    def __str__(self) -> str:
        shown = [column for column in _COLUMNS if column.wanted(self.rows)]
        lines = [tuple(column.text(row) for column in shown) for row in self.rows]
        share = f", {self.state_bytes / self.adamw_bytes:.1%} of AdamW's state" if self.adamw_bytes else ""
        totals = {
            "parameter": "total",
            "state bytes": f"{self.state_bytes:,}",
            "why": f"{sum(r.projected for r in self.rows)} projected{share}",
        }
        total = tuple(totals.get(column.head, "") for column in shown)
        return _table([tuple(column.head for column in shown), *lines, total])


@dataclass(frozen=True)
class _Column:
    """A column, the text of a row in it, and whether rows have anything to say in it."""

    head: str
    text: Callable[[Row], str]
    wanted: Callable[[Sequence[Row]], bool] = bool


def _rank_text(row: Row) -> str:
    if not row.projected:
        return "whole" if row.whole else "dense"
    return " x ".join("-" if r is None else str(r) for r in row.ranks)


def _codec_text(row: Row) -> str:
    """Of a projected parameter the codecs of buffer and moments."""
    return " / ".join(type(codec).__name__ for codec in (row.codec, row.moments) if codec is not None)


_COLUMNS = (
    _Column("parameter", lambda row: row.parameter),
    _Column("role", lambda row: row.role),
    _Column("shape", lambda row: "x".join(map(str, row.shape)) or "scalar"),
    _Column("view", lambda row: row.view),
    _Column("rank", _rank_text),
    _Column("rule", lambda row: row.rule, lambda rows: len({row.rule for row in rows if row.rule}) > 1),
    _Column("rate", lambda row: f"{row.rate:.3g}", lambda rows: any(row.rate != 1 for row in rows)),
    _Column("buffer / moments", _codec_text, lambda rows: any(row.assigned for row in rows)),
    _Column("state bytes", lambda row: f"{row.bytes:,}"),
    _Column("why", lambda row: row.why),
)


def explain(model_or_optimizer: object, rank: Rank = 0.25) -> Explanation:
    """What is projected, at what rank, seen as what, with how many bytes of state, and why.

    Args:
        model_or_optimizer: an optimizer of this package, or a model for the default ``comoving.AdamW``.
        rank: for a model: the rank that the default is explained at.

    Raises:
        TypeError: anything else.
    """
    from .adamw import AdamW  # noqa: PLC0415  (the default optimizer explains itself with this module)
    from .optimizer import LowRankOptimizer  # noqa: PLC0415

    frozen: list[Row] = []
    if isinstance(model_or_optimizer, nn.Module):
        model = model_or_optimizer
        frozen = [
            Row(name, tuple(p.shape), "", (), 0, "frozen")
            for name, p in model.named_parameters()
            if not p.requires_grad
        ]
        optimizer: LowRankOptimizer = AdamW(param_groups(model, rank=rank))
    elif isinstance(model_or_optimizer, LowRankOptimizer):
        optimizer = model_or_optimizer
    else:
        raise TypeError(f"explain takes a model or an optimizer of comoving, got {type(model_or_optimizer).__name__}")
    rows: list[Row] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            site = current(optimizer.sites[p], group, optimizer.state.get(p, {}))
            here = p.requires_grad and optimizer.roster.stepped_here(p)
            size = sum(map(spec_bytes, layout(site.here, group).values())) if here else 0
            own = parts_of(site, group)
            view = "torch" if site.plain else str(site.view.name if isinstance(site.view.name, str) else "heads")
            view += f", {site.blocks} blocks" if site.blocks else ""
            rows.append(
                Row(
                    site.name,
                    tuple(p.shape),
                    view,
                    site.ranks,
                    size,
                    site.reason + _shared_text(site) if p.requires_grad else "frozen",
                    site.whole,
                    *((own["codec"], own["moments"]) if site.projected else (None, None)),
                    site.codec is not None or site.moments is not None,
                    site.role,
                    _rule_text(own),
                    group["rate"],
                    adamw_bytes([p]) if p.requires_grad else 0,
                )
            )
    return Explanation((*rows, *frozen))


def _rule_text(group: Mapping[str, Any]) -> str:
    """The rule of a parameter, and the codec of its moments where that is not the plain one."""
    codec, where = group["moments"], ""
    if isinstance(codec, InWeights):
        codec, where = codec.codec, " in the weights"
    kept = "" if isinstance(codec, Full) else f", {type(codec).__name__}{where}"
    return f"{in_words(group['rule'])}{kept}"


def _shared_text(site: Site) -> str:
    """Who steps a parameter that processes share."""
    if site.shard is not None:
        core = ", and all of its core" if site.one_core else ""
        return f"; {site.shard.count} of {sum(site.shard.sizes)} along mode {site.shard.mode} are here{core}"
    return "" if site.owner is None else f"; process {site.owner} of those that share it steps it"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(map(len, texts))
    return "\n".join([texts[0], rule, *texts[1:-1], rule, texts[-1]])
