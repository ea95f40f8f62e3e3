"""Weights in few bits: matrices that are trained without a copy of them in floating point."""

from .convert import dequantize, quantize
from .deferring import DeferringLinear
from .linear import QuantizedLinear, codes_of

__all__ = ["DeferringLinear", "QuantizedLinear", "codes_of", "dequantize", "quantize"]
