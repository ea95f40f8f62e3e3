"""Several processes: what they tell one another, and who feeds the engine there."""

from .agreement import agree
from .comms import Replicas, Shards
from .compression import compress
from .cores import Sent
from .loading import Planner, load
from .local import LocalSteps
from .traffic import Traffic
from .wire_frames import WireFrame

__all__ = [
    "LocalSteps",
    "Planner",
    "Replicas",
    "Sent",
    "Shards",
    "Traffic",
    "WireFrame",
    "agree",
    "compress",
    "load",
]
