"""The race: a real model trained on real data by several optimizers side by side.

``comoving race`` on the command line; :class:`Race` from Python:

    race = Race(RaceSettings(task="fno", optimizers=("adamw", "comoving"), steps=400, seeds=3, rates=(1e-2,), rank=0.1,
                             out=Path("out")))
    race.run()
    found = results(race, command="")

Every contender trains from the same initialization on the same batches with the same schedule (linear warm-up, cosine
to zero); each run has a process of its own and is kept on disk as soon as it has finished.
"""

from comoving.race.settings import RaceSettings, RunSettings, SettingsError
from comoving.race.sweep import Race, results, save

__all__ = ["Race", "RaceSettings", "RunSettings", "SettingsError", "results", "save"]
