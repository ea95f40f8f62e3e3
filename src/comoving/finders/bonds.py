"""What the finders of bond frames are made of: decompositions from the leaves to the root, growth, and pruning.

All of it works on one interface and data x of (p, n, c), whose middle axis the interface spans; the columns of B are
sought in the span of the p c fibres along it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..decompositions import Method, completed, leading_directions, leading_eigenvectors, spanning
from ..draws import sent
from ..frames.bond import BondFrame
from ..frames.interface import Interface, change, identity, product
from ..linalg import qr

Step = Callable[[Interface, Tensor], tuple[Interface, Tensor]]


def decompose(start: Interface, x: Tensor, method: Method = "gram") -> tuple[Interface, Tensor]:
    """The interface of start's ranks whose every basis holds leading left singular vectors, and B^H x.

    From the leaves to the root, each edge on data that the ones before have projected already: for a train TT-SVD
    (Oseledets, 2011), for a tree the truncation from leaves to root of Grasedyck (2010). Of a train it is what
    :func:`comoving.decompositions.tt_svd` makes, bond by bond with the same :func:`leading_directions`; but it walks
    trees too, ends at the bond, leaves whole edges alone, and keeps data whose modes come from the right as they lie.
    """
    if start.basis is None:
        return start, x
    children = start.children
    if children:
        children, x = _through(start, x, partial(decompose, method=method))
    basis = leading_directions(_unfold(x), 0, start.rank, method)
    return Interface(start.sizes, basis.reshape(start.basis.shape), children), product(basis.mH, x)


def extend(interface: Interface, x: Tensor, add: int | None = None) -> tuple[Interface, Tensor]:
    """The interface with new directions behind its own at every edge, and B^H x in all of them.

    From the leaves to the root, each edge takes in the leading directions of x's residual (I - B_t B_t^H) x: up to
    ``add`` of them, None for as many as it has, and no more than there is room for or x has fibres. B stays in the
    span (TT-ICE, arXiv 2211.12487; HT-RISE, arXiv 2412.16544). The first coordinates of the result are those of B.
    """
    if interface.basis is None:
        return interface, x
    basis, children = interface.basis, interface.children
    if children:
        children, x = _through(interface, x, partial(extend, add=add))
        wider = basis.new_zeros((children[0].rank, children[1].rank, interface.rank))
        wider[: basis.shape[0], : basis.shape[1]] = basis
        basis = wider
    shape, basis = basis.shape[:-1], basis.flatten(0, -2)
    rows = _unfold(x)
    room = min(interface.rank if add is None else add, basis.shape[0] - interface.rank, rows.shape[1])
    if room > 0:
        residual = rows - basis @ (basis.mH @ rows)
        basis = torch.cat([basis, completed(basis, spanning(residual, room))[0]], dim=-1)
    return Interface(interface.sizes, basis.unflatten(0, shape), children), product(basis.mH, x)


def prune(
    interface: Interface, ranks: tuple[int, ...], energy: Tensor, mirrored: bool = False
) -> tuple[Interface, Tensor | None]:
    """An interface of lower ranks that keeps the directions of most energy, and its B'^H B (None for the identity).

    From the root to the leaves: the energy of an edge follows from that of the edge above and its transfer tensor, so
    that no data are read. Where energies are equal the earlier directions stay.

    Args:
        interface: orthonormal.
        ranks: per edge, in the order of :meth:`Interface.edges`, none above the interface's.
        energy: B^H x x^H B of (r, r), Hermitian.
        mirrored: see :meth:`Interface.edges`.
    """
    return _prune(interface, list(ranks), energy, mirrored)


def _prune(edge: Interface, ranks: list[int], energy: Tensor, mirrored: bool) -> tuple[Interface, Tensor | None]:
    """Takes its ranks from the end of the list."""
    if edge.bare:
        return edge, None
    rank = ranks.pop()
    if rank == edge.size:
        del ranks[len(ranks) + 1 - sum(1 for _ in edge.edges()) :]  # those below are full too
        return edge.whole(), None if edge.basis is None else edge.up(identity(edge.rank, edge.basis))
    old, children = edge.stored(energy), edge.children
    kept = leading_eigenvectors(_preferring_earlier(energy), rank)
    transfer = old @ kept
    if children:
        weighted = transfer * (kept.conj() * (energy @ kept)).sum(0).real.clamp_min(0).sqrt()
        pruned, turns = list(children), list[Tensor | None]([None, None])
        for i in (0, 1) if mirrored else (1, 0):
            rows = weighted.movedim(i, 0).flatten(1)
            pruned[i], turns[i] = _prune(children[i], ranks, rows @ rows.mH, mirrored)
        children = tuple(pruned)
        transfer, old = change(transfer, *turns), change(old, *turns)
    # Householder's, so orthonormal whatever is left; for such small matrices also the fastest.
    basis = qr(transfer.flatten(0, -2))[0].contiguous()
    return Interface(edge.sizes, basis.reshape(transfer.shape), children), basis.mH @ old.flatten(0, -2)


def energy_of(x: Tensor) -> Tensor:
    """x x^H of (n, n), summed over the other axes of x of (p, n, c)."""
    rows = _unfold(x)
    return rows @ rows.mH


def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with a largest entry of 1, so that no square leaves the range of float32, and whether x is nonzero."""
    largest = x.abs().amax()
    return x / largest.clamp_min(torch.finfo(x.dtype).tiny), largest > 0


def found(left: Interface, right: Interface, start: BondFrame, nonzero: Tensor) -> BondFrame:
    """The frame of these interfaces, or start where the operand is zero, decided on the device."""

    def chosen(new: Interface, old: Interface) -> Interface:
        pairs = zip(new.edges(), old.edges(), strict=True)
        return new.rebuild(
            None if a.basis is None or b.basis is None else torch.where(nonzero, a.basis, b.basis) for a, b in pairs
        )

    return BondFrame(chosen(left, start.left), chosen(right, start.right))


def sketch(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Real Gaussian (rows, columns), columns of about unit norm, drawn on the CPU, hence equal on all devices."""
    return sent(torch.randn((rows, columns), generator=generator).div_(rows**0.5), like)


def _through(start: Interface, x: Tensor, step: Step) -> tuple[tuple[Interface, Interface], Tensor]:
    """Both children by ``step``, and x of (p, r_left r_right, c) in their bases; the outer end of the data first."""
    left, right = start.children
    p, _, c = x.shape
    if c == 1:
        right, x = step(right, x.reshape(p * left.size, right.size, 1))
        left, x = step(left, x.reshape(p, left.size, right.rank))
    else:
        left, x = step(left, x.reshape(p, left.size, right.size * c))
        right, x = step(right, x.reshape(p * left.rank, right.size, c))
    return (left, right), x.reshape(p, left.rank * right.rank, c)


def _unfold(x: Tensor) -> Tensor:
    """(n, p c) from (p, n, c)."""
    if x.shape[0] == 1:
        return x[0]
    return x[..., 0].mT if x.shape[2] == 1 else x.transpose(0, 1).flatten(1)


def _preferring_earlier(energy: Tensor) -> Tensor:
    """The energy plus a trace that falls along the diagonal: equal directions are kept in their order."""
    r = len(energy)
    trace = energy.diagonal().real.sum().clamp_min(1e-20) * (4 * torch.finfo(energy.dtype).eps)
    return energy + torch.diag(trace * torch.linspace(1, 1 / r, r, dtype=trace.dtype, device=trace.device))
