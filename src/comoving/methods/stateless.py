"""Methods of full rank that keep little or nothing."""

from collections.abc import Mapping
from typing import Any

from ..codecs import Int8
from ..rules import SWAN, Adafactor, AdamS, Normalized
from .recipe import Recipe

HEAD: Mapping[str, Any] = dict(rule=Normalized(decay=0.9, passes=1))
"""SCALE's output head: rows of the momentum."""
TABLE: Mapping[str, Any] = dict(rule=Normalized(passes=1, first="columns"))
"""SCALE's embedding (tokens, width): columns of the gradient."""
BALANCED: Mapping[str, Any] = dict(
    rule=Normalized(decay=0.95, nesterov=True, passes=11, threshold=1e-3, scale=0.18),
    weight_decay=0.0,
)
"""Embedding and head of DeepSeek-V4.1-Flash (2609.19969): balanced rows and columns of the momentum, without decay."""
BALANCED_8BIT: Mapping[str, Any] = {**BALANCED, "moments": Int8()}
"""The same with the momentum in 8 bits."""
FACTORED: Mapping[str, Any] = dict(rule=Adafactor(average=None))
"""Adafactor's second moment of rows and columns, and nothing else."""

RECIPES = (
    Recipe(
        "sinkgd",
        "rows and columns of the gradient brought to unit size in turn; no state",
        "2502.06742",
        dict(rule=Normalized(scale=0.05)),
        full_rank=True,
        relative_rate=20.0,
    ),
    Recipe(
        "swan",
        "rows of the gradient standardized, then whitened, one matrix per frequency for complex tensors; no state",
        "2412.13148",
        dict(rule=SWAN(scale=0.05)),
        full_rank=True,
        relative_rate=20.0,
    ),
    Recipe(
        "scale",
        "rows of the gradient, one for each output, brought to unit size; columns of an embedding's; momentum for the "
        "output head alone",
        "2506.16659",
        dict(rule=Normalized(passes=1)),
        full_rank=True,
        roles={"head": HEAD, "table": TABLE},
    ),
    Recipe(
        "adams",
        "Adam whose second moment is made of momentum and gradient, and not stored",
        "2505.16363",
        dict(rule=AdamS(), betas=(0.9, 0.95)),
        full_rank=True,
    ),
)
