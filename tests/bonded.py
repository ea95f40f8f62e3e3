"""Frames at a bond as explicit matrices, and streams of tensors whose subspace turns."""

from math import prod

import torch

from comoving.frames.bond import BondFrame
from comoving.frames.train import Trains
from comoving.frames.tree import Trees
from contract.support import REAL, randn

SPECS = {
    "train": Trains(),
    "train, bond 1": Trains(bond=1),
    "tree": Trees(),
    "tree, bond 1": Trees(bond=1),
}
SHAPES = [(5, 4), (4, 3, 5), (3, 4, 2, 5), (4, 1, 3, 2, 3), (2, 3, 2, 2, 3, 2), (2,) * 8]


def matrix(interface):
    """B of (n, r) from its definition, by Kronecker products."""
    if interface.basis is None:
        return torch.eye(interface.size, dtype=torch.complex128)
    flat = interface.basis.to(torch.complex128).flatten(0, -2)
    if not interface.children:
        return flat
    left, right = (matrix(child) for child in interface.children)
    return torch.einsum("ij,kl->ikjl", left, right).reshape(interface.size, -1) @ flat


def explicit(frame):
    """F = B_L (x) B_R on row-major tensors."""
    left, right = matrix(frame.left), matrix(frame.right)
    return torch.einsum("ij,kl->ikjl", left, right).reshape(prod(frame.shape), -1)


def random_frame(spec, shape, rank, dtype=REAL, seed=0):
    like = torch.zeros(shape, dtype=dtype)
    return spec.start(like, spec.ranks(shape, rank), None, seed)


def known_ranks(spec, shape, rank, dtype=REAL, seed=0):
    """A tensor in a random frame of these ranks."""
    frame = random_frame(spec, shape, rank, dtype, seed)
    return frame.lift(randn((frame.left.rank, frame.right.rank), dtype, seed + 1000))


def turned(frame, angle, seed):
    """The frame with every basis turned by about this angle in a random direction."""

    def side(interface, first):
        bases = []
        for i, edge in enumerate(interface.edges()):
            u = edge.basis
            if u is not None:
                flat = u.flatten(0, -2)
                noise = randn(flat.shape, flat.dtype, 977 * seed + first + i) / flat.shape[0] ** 0.5
                u = torch.linalg.qr(flat + angle * noise).Q.reshape(u.shape)
            bases.append(u)
        return interface.rebuild(bases)

    return BondFrame(side(frame.left, 0), side(frame.right, 50))


def stream(frame, steps, angle, noise, seed=0):
    """Unit-norm signals in a frame that turns, each with noise of this norm."""
    dtype = next(iter(frame.tensors().values())).dtype
    for t in range(steps):
        frame = turned(frame, angle, seed + t)
        signal = frame.lift(randn((frame.left.rank, frame.right.rank), dtype, 31 * seed + t))
        yield signal / signal.norm() + noise * randn(frame.shape, dtype, 7919 + 31 * seed + t) / signal.numel() ** 0.5


def energy(frame, x):
    """The share of x's energy in the frame."""
    return float(frame.project(x).norm() ** 2 / x.norm() ** 2)
