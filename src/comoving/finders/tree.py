"""Finders of hierarchical Tucker frames: those of trains, on trees."""

from dataclasses import dataclass

from .train import TrainIncrement, TrainSVD


@dataclass(frozen=True)
class TreeSVD(TrainSVD):
    """Truncation from the leaves to the root (Grasedyck, 2010), each edge on data projected by those before.

    The same procedure and arguments as :class:`comoving.finders.train.TrainSVD`: a train is a tree of one branch.
    """


@dataclass(frozen=True)
class TreeIncrement(TrainIncrement):
    """Extends the last trees by what the operand adds and prunes them back (HT-RISE, arXiv 2412.16544).

    The same procedure and arguments as :class:`comoving.finders.train.TrainIncrement`.
    """
