"""The choice of parameters as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .codecs import Codec
from .frames.base import Rank
from .groups import param_groups
from .sites import Site
from .state import current, layout, parts_of, spec_bytes


@dataclass(frozen=True)
class Row:
    """One parameter: its name and shape, how it is seen, the shape of its core, the bytes of its state, and why.

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

    def __str__(self) -> str:
        assigned = any(r.assigned for r in self.rows)
        head = ("parameter", "shape", "view", "rank", *(["buffer / moments"] if assigned else []), "state bytes", "why")
        lines = [
            (
                r.parameter,
                "x".join(map(str, r.shape)) or "scalar",
                r.view,
                _rank_text(r),
                *([_codec_text(r)] if assigned else []),
                f"{r.bytes:,}",
                r.why,
            )
            for r in self.rows
        ]
        counted = f"{sum(r.projected for r in self.rows)} projected"
        total = ("total", "", "", "", *([""] if assigned else []), f"{self.state_bytes:,}", counted)
        return _table([head, *lines, total])


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
                )
            )
    return Explanation((*rows, *frozen))


def _shared_text(site: Site) -> str:
    """Who steps a parameter that processes share."""
    if site.shard is not None:
        core = ", and all of its core" if site.one_core else ""
        return f"; {site.shard.count} of {sum(site.shard.sizes)} along mode {site.shard.mode} are here{core}"
    return "" if site.owner is None else f"; process {site.owner} of those that share it steps it"


def _rank_text(row: Row) -> str:
    if not row.projected:
        return "whole" if row.whole else "dense"
    return " x ".join("-" if r is None else str(r) for r in row.ranks)


def _codec_text(row: Row) -> str:
    """Of a projected parameter the codecs of buffer and moments."""
    return " / ".join(type(codec).__name__ for codec in (row.codec, row.moments) if codec is not None)


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(map(len, texts))
    return "\n".join([texts[0], rule, *texts[1:-1], rule, texts[-1]])
