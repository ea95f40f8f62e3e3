"""Several processes: what they tell one another, and who feeds the engine there."""

from .comms import Replicas, Shards, Traffic

__all__ = ["Replicas", "Shards", "Traffic"]
