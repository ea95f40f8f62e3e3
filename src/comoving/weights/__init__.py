"""Weights in few bits: matrices that are trained without a copy of them in floating point."""

from .convert import dequantize, quantize
from .linear import QuantizedLinear, codes_of

__all__ = ["QuantizedLinear", "codes_of", "dequantize", "quantize"]
