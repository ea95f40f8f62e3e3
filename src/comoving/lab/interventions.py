"""What an arm does to a training: nothing, larger rates, branches, a gain, or an extraction."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from comoving.directions import SpectralMonitor, add_branches, amplify, extract, prepare
from comoving.directions.spectra import leading, principal_cosines, projected_energy
from comoving.directions.targets import matrix_of
from comoving.draws import gaussian
from comoving.lab.config import Config
from comoving.lab.studies import Arm
from comoving.linalg import orthonormalize

Directions = dict[str, tuple[Tensor, Tensor]]
"""Layer -> U (m x r) and V (n x r), orthonormal."""


class Intervention:
    """The baseline: nothing is done. Its directions are those of the momentum at the reading before.

    Args:
        arm: what is done.
        config: of the run.
        model: on its device, as initialized.
        layers: the target layers by name.
        seed: of everything random.
    """

    trains_targets = True

    def __init__(self, arm: Arm, config: Config, model: nn.Module, layers: Mapping[str, nn.Module], seed: int) -> None:
        self.arm, self.config, self.model, self.layers, self.seed = arm, config, model, layers, seed
        self.used: Directions = {}
        self.notes: dict[str, Any] = {}

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups: the target weights, and the rest."""
        chosen = {id(matrix_of(module)): matrix_of(module) for module in self.layers.values()}
        rest = [p for p in self.model.parameters() if id(p) not in chosen and p.requires_grad]
        return [
            {"params": found, "lr": rate, "weight_decay": self.config.weight_decay}
            for found in (list(chosen.values()), rest)
            if found
        ]

    def begin(self, optimizer: torch.optim.Optimizer, monitor: SpectralMonitor) -> None:
        """Before the first step, when the monitor is attached."""
        self.optimizer, self.monitor = optimizer, monitor

    def split(self, step: int) -> None:
        """After the warm-up of directions, before step ``step + 1``."""

    def read(self, step: int) -> None:
        """The monitor has read at step ``step``."""
        self.used = {name: self.monitor.directions(name, "momentum")[:2] for name in self.layers}

    def energy(self) -> float | None:
        """Mean over the layers of the gradient's energy in the directions in use, before the step."""
        found = [
            projected_energy(gradient, *self.used[name])
            for name, module in self.layers.items()
            if name in self.used and (gradient := matrix_of(module).grad) is not None
        ]
        return torch.stack(found).mean().item() if found else None

    def alignment(self) -> float | None:
        """Mean principal cosine of the directions in use with the leading ones of the gradient, before the step.

        The monitor reads the gradient as the optimizer sees it, which an extraction and a gain change by then.
        """
        found: list[Tensor] = []
        for name, (u, v) in self.used.items():
            gradient = matrix_of(self.layers[name]).grad
            if gradient is not None and u.shape[1]:
                new = leading(gradient, self.config.topk)
                found.append(torch.cat([principal_cosines(u, new.u), principal_cosines(v, new.v)]).mean())
        return torch.stack(found).mean().item() if found else None

    def end(self) -> None:
        """Fold everything into plain weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the model's, the optimizer's and the monitor's state."""
        return {"used": {name: list(pair) for name, pair in self.used.items()}, "notes": self.notes}

    def resume(self, after_split: bool, state: Mapping[str, Any]) -> None:
        """Make the structure that the states of a checkpoint belong to."""
        self.used = {name: (pair[0], pair[1]) for name, pair in state["used"].items()}
        self.notes = dict(state["notes"])


class Global(Intervention):
    """B1: the rate of the whole target layers grows."""

    def split(self, step: int) -> None:
        """The first group holds the target weights."""
        self.optimizer.param_groups[0]["initial_lr"] *= self.arm.factor


def every_other_block(names: Iterable[str]) -> list[str]:
    """The layers of the first, third, ... block of the model; its name ends with a number.

    Whole blocks, for a block in which some weights are zero and have no branch passes nothing on.
    """
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        blocks.setdefault(".".join(parts[: number + 1]), []).append(name)
    return [name for block in list(blocks)[::2] for name in blocks[block]]


class OnBranches(Intervention):
    """Branches only: the weights of all target layers stand still, frozen or zero."""

    trains_targets = False

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The branches are made here."""
        chosen = list(self.layers) if self.arm.layers == "all" else every_other_block(self.layers)
        for name, module in self.layers.items():
            if name not in chosen:
                weight = matrix_of(module).requires_grad_(False)
                if self.arm.backbone == "zero":
                    weight.zero_()
        assert self.arm.rank is not None and self.arm.backbone is not None
        self.branches = add_branches(
            self.model,
            chosen,
            rank=self.arm.rank,
            backbone=self.arm.backbone,
            clamp=self.config.clamp or None,
            seed=self.seed,
        )
        return self.branches.param_groups(
            rate, amplitude_rate=self.config.amplitude_rate, weight_decay=self.config.weight_decay
        )

    def begin(self, optimizer: torch.optim.Optimizer, monitor: SpectralMonitor) -> None:
        """The clamp acts after each step."""
        super().begin(optimizer, monitor)
        self.branches.attach(optimizer)

    def read(self, step: int) -> None:
        """The weights that a branch is added to have no gradient, and no directions are in use."""

    def end(self) -> None:
        """The branches become part of the weights."""
        self.branches.merge()


class Gaining(Intervention):
    """3B and its control B2: a larger gradient in stable, or random, directions."""

    active = False

    def split(self, step: int) -> None:
        """The gain begins."""
        self.active = True
        if self.arm.source == "random":
            self.used = self.random()
        else:
            self.choose(step)
        self.handle = amplify(self.optimizer, {self.layers[k]: pair for k, pair in self.used.items()}, self.arm.factor)

    def random(self) -> Directions:
        """Directions drawn from the seed."""
        found: Directions = {}
        for i, (name, module) in enumerate(self.layers.items()):
            weight, rank = matrix_of(module).detach(), self.arm.rank or 1
            u, v = (
                orthonormalize(gaussian((size, rank), weight, self.seed, i, side))
                for side, size in enumerate(weight.shape)
            )
            found[name] = (u, v)
        return found

    def choose(self, step: int) -> None:
        """The most stable directions of the momentum, at most as many as the rank."""
        chosen = {name: self.monitor.stable(name, "momentum", self.config.stable) for name in self.layers}
        self.used = {name: (u[:, : self.arm.rank], v[:, : self.arm.rank]) for name, (u, v) in chosen.items()}
        count = fmean(u.shape[1] for u, _ in self.used.values())
        self.notes.setdefault("directions", []).append([step, count])

    def read(self, step: int) -> None:
        """The stable directions follow the monitor."""
        if not self.active:
            super().read(step)
        elif self.arm.source != "random":
            self.choose(step)
            for name, pair in self.used.items():
                self.handle.use(self.layers[name], *pair)

    def end(self) -> None:
        """The gain ends."""
        if self.active:
            self.handle.remove()

    def resume(self, after_split: bool, state: Mapping[str, Any]) -> None:
        """The gain goes on with the directions of the checkpoint."""
        super().resume(after_split, state)
        if after_split:
            self.active = True
            directions = {self.layers[k]: pair for k, pair in self.used.items()}
            self.handle = amplify(self.optimizer, directions, self.arm.factor)


class Extracting(Intervention):
    """E4 and its controls B2 and B3: W = R + U C V^T, C learns faster."""

    extraction = None

    def begin(self, optimizer: torch.optim.Optimizer, monitor: SpectralMonitor) -> None:
        """The weights as initialized are kept until the split, where their change counts."""
        super().begin(optimizer, monitor)
        self.initial = {name: matrix_of(module).detach().clone() for name, module in self.layers.items()}

    def split(self, step: int) -> None:
        """The extraction."""
        source: Any = self.arm.source
        self.extraction = extract(
            self.model,
            list(self.layers),
            self.optimizer,
            rank=self.arm.rank or 1,
            source=source,
            initial=self.initial if self.arm.source == "change" else None,
            boost=self.arm.factor,
            seed=self.seed,
        )
        self.begun()

    def begun(self) -> None:
        """From here on the directions stand."""
        assert self.extraction is not None
        if self.arm.only:
            self.extraction.freeze_rest()
        self.used = {name: self.extraction.directions(name) for name in self.layers}

    def read(self, step: int) -> None:
        """The extracted directions stay as they are."""
        if self.extraction is None:
            super().read(step)

    def end(self) -> None:
        """Back to plain weights."""
        if self.extraction is not None:
            self.extraction.fold()

    def state_dict(self) -> dict[str, Any]:
        """The initial weights are needed until the split."""
        return super().state_dict() | {"initial": self.initial if self.extraction is None else {}}

    def resume(self, after_split: bool, state: Mapping[str, Any]) -> None:
        """The structure without its values, which the model's state brings."""
        super().resume(after_split, state)
        if after_split:
            self.extraction = prepare(
                self.model, list(self.layers), self.optimizer, rank=self.arm.rank or 1, boost=self.arm.factor
            )
            self.begun()
        else:
            self.initial = dict(state["initial"])


ACTIONS: dict[str, type[Intervention]] = {
    "none": Intervention,
    "global": Global,
    "branches": OnBranches,
    "gain": Gaining,
    "extract": Extracting,
}


def intervention(
    arm: Arm, config: Config, model: nn.Module, layers: Mapping[str, nn.Module], seed: int
) -> Intervention:
    """What ``arm`` does."""
    return ACTIONS[arm.action](arm, config, model, layers, seed)
