"""``comoving plan`` as a function: a plan or a fit, printed as a table or JSON, and drawn."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ..distributed.wire_frames import WireFrame
from ..files import check_folder, write_bytes, write_json
from ..race.extras import require
from ..race.settings import SettingsError, parse_rank
from ..units import parse_bytes, show_bytes
from . import report
from .fit import Fit, fit
from .plan import Plan, drafted, dtype_of, wire_named
from .shapes import subject


def execute(
    *,
    model: str,
    recipe: str,
    rank: str | None,
    dtype: str,
    limit: str | None,
    options: dict[str, str | None],
    out: Path | None,
    as_json: bool,
    show: Callable[[Any], None],
    **settings: Any,
) -> int:
    """Plan, print, and write ``plan.json`` and ``plan.png`` where a folder is given.

    Returns:
        Exit status 0, also where nothing fits.

    Raises:
        SettingsError: for anything that cannot be planned.
    """
    if out is not None:
        require("matplotlib.figure", "cli")
        check_folder(out)
    given = {name: value for name, value in options.items() if value is not None}
    if limit is not None and rank is not None:
        raise SettingsError(f"--fit looks for the rank: leave --rank {rank} out")
    if settings["ddp"] is not None and settings["fsdp"] is not None:
        raise SettingsError("--ddp and --fsdp are two ways to share one model: choose one")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # user code beside the shell's folder
    try:
        bound = None if limit is None else parse_bytes(limit)
        settings["compress"] = wire_named(settings["compress"])
        wire_rank = settings.pop("wire_rank", None)
        settings["whole"] = None if wire_rank is None else WireFrame(cast("float", parse_rank(wire_rank)))
        model_known = subject(model, dtype_of(dtype))
        if bound is None:
            wanted = None if rank is None else parse_rank(rank)
            plans = [("", drafted(model_known, recipe, wanted, options=given, cache={}, **settings))]
            found = None
        else:
            found = fit(model_known, recipe, bound, options=given, **settings)
            plans = [(c.codecs, c.plan) for c in found.candidates]
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from error
    record = _record(plans, found)
    if out is not None:
        write_json(out / "plan.json", record)
        bars = [(f"{p.recipe} {'' if p.rank is None else p.rank} {name}".strip(), p) for name, p in plans]
        write_bytes(out / "plan.png", report.picture(bars, bound))
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return 0
    if found is not None:
        show(_candidates(found))
    show(report.table(plans[0][1] if found is None else found.best.plan))
    if found is not None:
        sys.stdout.write(found.verdict + "\n")
    if out is not None:
        sys.stdout.write(f"written: {out / 'plan.json'}, {out / 'plan.png'}\n")
    return 0


def _record(plans: list[tuple[str, Plan]], found: Fit | None) -> dict[str, Any]:
    if found is None:
        return plans[0][1].to_dict()
    lines = [
        {"codecs": c.codecs, "fits": c.fits, "limited": c.limited, "plan": c.plan.to_dict()} for c in found.candidates
    ]
    return {"limit": found.limit, "verdict": found.verdict, "best": found.best.plan.to_dict(), "candidates": lines}


def _candidates(found: Fit) -> Any:
    drawn = require("rich.table", "cli").Table(title=f"what fits into {show_bytes(found.limit)}")
    for heading in ("codecs", "largest rank", "peak", "state"):
        drawn.add_column(heading, justify="left" if heading == "codecs" else "right")
    for c in found.candidates:
        rank = "full" if c.plan.rank is None else str(c.plan.rank)
        over = f", {show_bytes(c.plan.peak_bytes - found.limit)} too much"
        rank = rank if c.fits else f"none (at {rank}{over})"
        drawn.add_row(c.codecs, rank, show_bytes(c.plan.peak_bytes), show_bytes(c.plan.state_bytes))
    return drawn
