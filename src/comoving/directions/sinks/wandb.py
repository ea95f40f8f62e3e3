"""Weights & Biases, offline where there is no network or login."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from comoving.race.extras import require

STEP = "spec/update"
CONNECT_SECONDS = 30


class WandB:
    """Figures over the number of updates, "spec/update".

    Where a run is active already, figures go to that one, and it is left open. Otherwise one is begun; without network
    or login it is an offline one, under ``folder``, and one warning says how to send it later. A connection that breaks
    later is W&B's own affair: it keeps what it could not send in the same folder.

    Args:
        project: its name.
        folder: where runs are kept.
        name: of the run; None for one that W&B makes up.
        mode: "online", "offline" or "disabled"; None for what the environment says (WANDB_MODE), else online.

    Raises:
        ImportError: without the extra "log".
        ValueError: another mode.
    """

    def __init__(
        self,
        project: str = "comoving",
        folder: str | Path = ".",
        mode: Literal["online", "offline", "disabled"] | None = None,
        name: str | None = None,
    ) -> None:
        if mode not in {None, "online", "offline", "disabled"}:
            raise ValueError(f"mode = {mode!r} is none of online, offline, disabled")
        wandb = require("wandb", "log")
        self._own = wandb.run is None
        if self._own:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.run = _begin(
                wandb, mode or os.environ.get("WANDB_MODE") or "online", project=project, dir=str(folder), name=name
            )
        else:
            self.run = wandb.run
        self.run.define_metric(STEP)
        self.run.define_metric("spec/*", step_metric=STEP)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row; W&B's own count of rows goes on as it does, so that other rows may come between."""
        self.run.log({STEP: step, **values})

    def close(self) -> None:
        """Finish the run, if it was begun here."""
        if self._own:
            self.run.finish()


def _begin(wandb: Any, mode: str, **options: str | None) -> Any:
    if mode != "online":
        return wandb.init(**options, mode=mode)
    try:
        if wandb.login(prompt=False, timeout=CONNECT_SECONDS):
            settings = wandb.Settings(init_timeout=CONNECT_SECONDS)
            return wandb.init(**options, mode="online", settings=settings)
        reason = "no API key is configured"
    except (wandb.errors.Error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    run = wandb.init(**options, mode="offline")
    warnings.warn(
        f"Weights & Biases is not reached ({reason}); the run is kept in {Path(run.dir).parent}. "
        f"Send it later: wandb login && wandb sync {Path(run.dir).parent}",
        stacklevel=3,
    )
    return run
