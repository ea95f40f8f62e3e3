"""Measurements behind ``comoving bench``: what the parts cost and what they capture, as ratios within one run."""
