"""The shapes of what the laboratory keeps on disk: a run's record, and the results of a study."""

from comoving.race.records import (
    amount,
    anything,
    cases,
    having,
    integer,
    listed,
    mapped,
    maybe,
    number,
    one_of,
    row,
    text,
)

READINGS = listed(row(amount, maybe(number)))
"""[step, value] of each reading."""
POINT = having({"step": amount}, {"value": number, "loss": number, "seconds": amount})
MEASURED = {
    "curve": listed(POINT),
    "losses": listed(maybe(number)),
    "spectra": mapped(READINGS),
    "energy": READINGS,
    "alignment": READINGS,
}
_RUN = {**MEASURED, "seed": integer, "rate": number, "seconds": number, "shapes": mapped(row(integer, integer))}

RUN = cases(
    "status",
    {
        "finished": having({**_RUN, "curve": listed(having({"step": number, "value": number}), 1), "final": anything}),
        "diverged": having({**_RUN, "error": text}),
    },
)
"""What a run leaves in its file, where it came to an end."""

ARM = having(
    {"name": text},
    {
        "runs": listed(maybe(having({"seed": integer, "status": text}, {**MEASURED, "final": number}))),
        "rates": mapped(maybe(number)),
        **dict.fromkeys(("rate", "begin"), number),
        **dict.fromkeys(("role", "task", "summary", "layers", "backbone", "action"), text),
        "rank": integer,
    },
)
RESULTS = having(
    {
        "metric": having(
            {
                **dict.fromkeys(("name", "unit"), text),
                **dict.fromkeys(("origin", "tolerance"), number),
                "goal": one_of(("max", "min")),
                "absolute": listed(number),
            }
        ),
        "arms": listed(ARM, 1),
    },
    {
        "config": having({}, {"ranks": listed(integer), "topk": integer, "spec_topk": integer}),
        "shapes": mapped(row(integer, integer)),
        "followups": listed(text),
        **dict.fromkeys(("seeds", "topk"), integer),
        **dict.fromkeys(("machine", "versions"), mapped(anything)),
    },
)
"""What verdicts and reports are made of."""
