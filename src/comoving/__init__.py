"""Optimizers whose state moves with the gradient's subspace."""
