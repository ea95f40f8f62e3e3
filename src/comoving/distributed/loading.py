"""Checkpoints of as many copies as there were processes, read by as many as there are."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.tensor import DTensor, Shard, empty

from ..checkpoint import WIRE
from ..diagnostics import SLOT

_KEPT = (".feedback.", f".{WIRE}error.")


class Planner(DefaultLoadPlanner):
    """Torch's planner of ``dcp.load``, for optimizers whose processes keep something each for itself.

    Where a checkpoint was saved by another number of processes than are there to load it, the state that is to be
    filled gets tensors for what was saved, in place of those for as many copies as there would be now. Likewise for
    frames of the wire of other ranks; and what is there for the wire, and was not saved, is left out.
    ``load_state_dict`` makes of it what each process shall have.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Look at what was saved, before torch does."""
        if metadata is not None:
            _fit(state_dict, "", metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)


def load(state_dict: dict[str, Any], **options: Any) -> None:
    """``torch.distributed.checkpoint.load``, with :class:`Planner`: another number of processes may have saved it.

    Args:
        state_dict: as it is now; is filled.
        **options: of ``dcp.load``: ``checkpoint_id=`` above all.
    """
    dcp_load(state_dict, planner=Planner(), **options)


def _fit(own: MutableMapping[str, Any], path: str, metadata: Metadata) -> None:
    for key, value in [*own.items()]:
        name = f"{path}.{key}" if path else f"{key}"
        if isinstance(value, dict):
            _fit(value, name, metadata)  # pyright: ignore[reportUnknownArgumentType]
            continue
        saved = metadata.state_dict_metadata.get(name)
        of_wire = f".{WIRE}" in name
        if of_wire and saved is None:
            del own[key]
        kept = any(part in name for part in _KEPT) or name.endswith(f".{SLOT}")
        if kept and isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata):
            own[key] = _fitting(value, saved.size)
        elif of_wire and isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata):
            own[key] = torch.empty(saved.size, dtype=value.dtype, device=value.device)


def _fitting(x: Tensor, saved: torch.Size) -> Tensor:
    """x, or an empty tensor of the saved size, where that differs by the number of copies."""
    if isinstance(x, DTensor) and saved[1:] == x.shape[1:] and saved[0] != x.shape[0]:
        return empty(*saved, device_mesh=x.device_mesh, placements=[Shard(0)], dtype=x.dtype)
    if isinstance(x, DTensor) and saved == x.shape[1:]:
        return torch.empty(saved, dtype=x.dtype, device=x.device)
    if not isinstance(x, DTensor) and saved[1:] == x.shape:
        return torch.empty(saved, dtype=x.dtype, device=x.device)
    return x
