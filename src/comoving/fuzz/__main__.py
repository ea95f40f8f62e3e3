"""``python -m comoving.fuzz --cases 5000 --seed 0``: random compositions on structured gradients."""

import argparse
import sys
from collections.abc import Sequence

from .cases import draw
from .check import examine
from .run import report, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns 1 where a case failed, 2 for a command line that makes no sense."""
    parser = argparse.ArgumentParser("python -m comoving.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many cases, from index 0")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--case", type=int, help="the index of one case, run alone and shown whole")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--recipes", default="", help="comma-separated: these alone, and no compositions")
    given = parser.parse_args(arguments)
    recipes = tuple(name for name in given.recipes.split(",") if name)
    for name, least in (("cases", 1), ("seed", 0), ("case", 0), ("jobs", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be >= {least}, got {value}")
    try:
        draw(given.seed, 0, recipes)
    except ValueError as error:
        parser.error(str(error))
    if given.case is None:
        return int(report(run(given.seed, range(given.cases), given.jobs, recipes), given.cases) > 0)
    outcome = examine(draw(given.seed, given.case, recipes))
    sys.stdout.write(f"{outcome}\n{outcome.trace}largest step over its bound: {outcome.share:.3g}\n")
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
