"""Working precision, whatever a step or a backward pass stands inside of."""

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch


def full_precision() -> AbstractContextManager[Any]:
    """Without autocast, which a step or a backward pass may stand inside of; products would be in half precision."""
    stack = ExitStack()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for device in ["cpu"] if accelerator is None else ["cpu", accelerator.type]:
        if torch.is_autocast_enabled(device):  # entering costs time for every parameter
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
