"""Where a run stands, on disk: a rung of a tuned race goes on from where the one before it ended."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from comoving.files import make_folder, replacing

Standing = dict[str, Any]


def save(path: Path | None, model: nn.Module, optimizer: Any, standing: Standing) -> None:
    """Write weights, optimizer state, torch's generator of the CPU and ``standing``, of plain values, to ``path``.

    No path, or an optimizer whose state cannot be written, leaves no file: its next rung begins anew.
    """
    if path is None:
        return
    try:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        found = {
            "tensors": {name: x.detach() for name, x in tensors.items()},
            "optimizer": optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "standing": standing,
        }
        make_folder(path.parent)
        with replacing(path) as file:
            torch.save(found, file)
    except OSError:
        raise
    except Exception:  # whatever a stranger's state_dict() or its pickling raises
        path.unlink(missing_ok=True)


def load(path: Path | None, model: nn.Module, optimizer: Any, length: int) -> Standing:
    """Put model, optimizer and torch's generator back, and return ``standing``; nothing where the run begins anew.

    So it does, too, with a file that holds other than plain values (the projectors of some packages are objects of
    theirs), which is not read, or ``length`` steps and more. Model and optimizer are changed only where the whole file
    has been read.
    """
    if path is None or not path.exists():
        return {}
    try:
        found = torch.load(path, weights_only=True)
    except Exception:  # pickle, zip and torch have no common class for a file they refuse
        return {}
    if len(found["standing"]["losses"]) >= length:
        return {}
    optimizer.load_state_dict(found["optimizer"])
    with torch.no_grad():
        for name, x in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            x.copy_(found["tensors"][name])
    torch.set_rng_state(found["generator"])
    return found["standing"]
