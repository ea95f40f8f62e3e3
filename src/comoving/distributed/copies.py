"""What each process of :func:`comoving.distributed.compress` keeps for itself: of all of them in a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..checkpoint import averaged, copies_in, kept_apart
from ..codecs.base import as_real
from ..sites import Site


class Copies:
    """The copies of several processes, as tensors (copies, ...) of which each process has its own.

    Args:
        group: the processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._meshes: dict[str, DeviceMesh] = {}

    def of_all(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter with what differs as a DTensor of all copies; nothing is sent."""
        return dict(state) | {name: self.joined(state[name]) for name in kept_apart(state, site, group)}

    def joined(self, x: Tensor) -> DTensor:
        """The tensors of all processes, (copies, ...), of which x is the one that is here; nothing is sent."""
        return DTensor.from_local(x[None].contiguous(), self._mesh(x.device.type), [Shard(0)], run_check=False)

    def own(self, x: Tensor, dims: int) -> list[Tensor]:
        """The copy of this process, where x has as many copies as there are processes; else all copies that there are.

        A collective call of DTensors.

        Args:
            x: with the copies in front, or one alone.
            dims: how many dimensions one has.
        """
        if x.ndim <= dims:
            return [whole(x)]
        if x.shape[0] != dist.get_world_size(self.group):
            return [*whole(x)]
        return [x.to_local()[0] if isinstance(x, DTensor) and _is_own(x) else whole(x)[dist.get_rank(self.group)]]

    def _mesh(self, device: str) -> DeviceMesh:
        if device not in self._meshes:
            self._meshes[device] = DeviceMesh.from_group(self.group, device)
        return self._meshes[device]

    def of_this_process(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state with the copy of this process, where there are as many; else with the mean of all.

        A collective call where copies are DTensors.
        """
        count = copies_in(state, site, group)
        if count != dist.get_world_size(self.group):
            return mean_of_copies(state, site, group)
        kept = kept_apart(state, site, group)
        return dict(state) | {name: self.own(state[name], len(spec.shape))[0] for name, spec in kept.items()}


class Apart:
    """No copies: each process saves its own state, and loads that."""

    def of_all(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
        """That of this process."""
        return dict(state)

    def of_this_process(self, state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
        """The same."""
        return dict(state)


def mean_of_copies(state: Mapping[str, Any], site: Site, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the mean of all copies; as it is where there are none. A collective call of DTensors."""
    count, kept = copies_in(state, site, group), kept_apart(state, site, group)
    if not count:
        return {name: whole(x) for name, x in state.items()}
    parts = [x for name, x in state.items() if name in kept and isinstance(x, DTensor)]
    if not all(isinstance(state[name], DTensor) for name in kept) or not all(_is_row_of(x) for x in parts):
        return averaged({name: whole(x) for name, x in state.items()}, site, group, count, lambda total: total)
    over = parts[0].device_mesh.get_group()

    def sum_of(total: Tensor) -> Tensor:
        dist.all_reduce(as_real(total), group=over)
        return total

    here = {name: x.to_local() if name in kept else whole(x) for name, x in state.items()}
    return averaged(here, site, group, count, sum_of)


def _is_row_of(x: DTensor) -> bool:
    return x.device_mesh.ndim == 1 and x.placements == (Shard(0),)


def _is_own(x: DTensor) -> bool:
    """Whether the copy of each process is here."""
    return _is_row_of(x) and x.shape[0] == x.device_mesh.size() and x.to_local().shape[0] == 1


def whole(x: Any) -> Any:
    """A DTensor as one tensor, by a collective call; anything else as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
