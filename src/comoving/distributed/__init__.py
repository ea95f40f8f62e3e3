"""Several processes: what they tell one another, and who feeds the engine there."""

from .agreement import agree
from .comms import Replicas, Shards
from .compression import Sent, compress
from .loading import Planner, load
from .traffic import Traffic

__all__ = ["Planner", "Replicas", "Sent", "Shards", "Traffic", "agree", "compress", "load"]
