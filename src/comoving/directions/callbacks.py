"""The monitor as a callback of Lightning and of the Hugging Face Trainer; their packages are imported here only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comoving.race.extras import require

from ..checkpoint import save
from .matrices import unwrapped
from .monitor import SpectralMonitor

STATE_FILE = "spectral_monitor.pt"


class _Forward:
    """A sink that calls a function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.function(step, dict(values))

    def close(self) -> None:
        pass


def lightning_callback(**options: Any) -> Any:
    """A ``lightning.Callback`` that watches the module while it is fitted; its monitor is ``callback.monitor``.

    Automatic and manual optimization. Figures go to the trainer's loggers, over the number of updates, unless ``sinks``
    are given. The monitor's state is in the trainer's checkpoints. Names of layers begin as in the LightningModule.

    Args:
        **options: of :class:`SpectralMonitor`, but for the model.

    Raises:
        ImportError: without the extra "lightning". What :class:`SpectralMonitor` refuses is raised as training starts.
    """
    lightning = require("lightning", "lightning")

    class SpectralCallback(lightning.Callback):
        monitor: SpectralMonitor | None = None
        _state: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def log(step: int, values: dict[str, float]) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

            given: dict[str, Any] = {"sinks": (_Forward(log),), **options}
            monitor = SpectralMonitor(pl_module, **given)
            if self._state is not None:
                monitor.load_state_dict(self._state)
            self.monitor = monitor.attach(*trainer.optimizers)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if self.monitor is not None:
                self.monitor.close()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.monitor is None else self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._state = state_dict or None

    return SpectralCallback()


def trainer_callback(trainer: Any | None = None, **options: Any) -> Any:
    """A ``transformers.TrainerCallback`` that watches the Trainer's model; its monitor is ``callback.monitor``.

        trainer.add_callback(trainer_callback(trainer, every=100))

    Figures go through ``trainer.log`` to whatever the Trainer reports to, unless ``sinks`` are given; then the trainer
    need not be. The monitor's state lies in each checkpoint folder, and is taken up when training resumes from one.

    Args:
        trainer: whose log to write to.
        **options: of :class:`SpectralMonitor`, but for the model.

    Raises:
        ImportError: without the extra "hf".
        ValueError: neither trainer nor sinks. What :class:`SpectralMonitor` refuses is raised as training starts.
    """
    transformers = require("transformers", "hf")
    if trainer is None and "sinks" not in options:
        raise ValueError("give the trainer, whose log is written to, or sinks")

    class SpectralCallback(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.monitor: SpectralMonitor | None = None
            self._waiting: list[dict[str, float]] = []

        def _keep(self, step: int, values: dict[str, float]) -> None:
            self._waiting.append(values)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            given: dict[str, Any] = {"sinks": (_Forward(self._keep),), **options}
            monitor = SpectralMonitor(kwargs["model"], **given)
            saved = _checkpoint(args, state) / STATE_FILE
            if state.global_step and saved.exists():
                monitor.load_state_dict(torch.load(saved, weights_only=True))
            self.monitor = monitor.attach(unwrapped(kwargs["optimizer"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            log: Any = getattr(trainer, "log", None)
            while self._waiting:
                log(self._waiting.pop(0))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = _checkpoint(args, state)
            if self.monitor is not None and state.is_world_process_zero and folder.is_dir():
                save(folder / STATE_FILE, self.monitor)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

    return SpectralCallback()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
