"""What finders look at: a dense tensor plus a term that already has low rank."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ..comm import LOCAL, Comm
from ..decompositions import fibres
from ..draws import gaussian
from ..frames import Frame, ModeFrame, Overlap, SharedFrame
from ..linalg import all_but_one, correlate, gram, inner, largest, multilinear, norm, over


@dataclass(frozen=True)
class Operand:
    """O = share * x + F w, with x dense, and w the coordinates of a second term in a frame F; or a row of them.

    Finders see it only through contractions, so that F w is not formed for a matrix with one compressed side, and so
    that processes that share it have one place to join what each of them has: x and w are this one's, and what
    :meth:`contract`, :meth:`correlate` and the like return is of the operand of all. Where its mode ``comm.split`` is
    shared out, so it is in what :meth:`contract` returns for the other modes; all else is returned whole. Factors of
    that mode are given whole, and so is w where F compresses it (:class:`comoving.frames.SharedFrame`).

    Args:
        dense: x of shape (*rows, d_1, ..., d_N).
        share: the factor of x.
        frame: F, or None where there is no second term.
        core: w in F's coordinates, or None.
        inside: F^H x where it is known already, or None.
        past: the frame so far and the rule's momentum in it, for finders that follow momentum in ways of their own;
            None where the parameter had no frame before.
        rows: leading dimensions that count rows; each row is an operand of its own, and share is that of all.
        comm: joins what processes have of it.
    """

    dense: Tensor
    share: float = 1.0
    frame: Frame | None = None
    core: Tensor | None = None
    inside: Tensor | None = None
    past: tuple[Frame, Tensor] | None = None
    rows: int = 0
    comm: Comm = LOCAL

    def mix(self, share: float, frame: Frame, core: Tensor) -> "Operand":
        """share * O + F core; the frame must be O's own where O has one."""
        if self.core is not None:
            core = core.add(self.core, alpha=share)
        return replace(self, share=self.share * share, frame=frame, core=core)

    def measured(self) -> "Operand":
        """The same operand, with F^H x computed for all who ask for it later."""
        if self.frame is None or self.inside is not None or isinstance(self.frame, SharedFrame):
            return self
        return replace(self, inside=self.frame.project(self.dense))

    def norm(self) -> Tensor:
        """|O| of what is here, real, (*rows), from |share x + F w|^2 = share^2 |x|^2 + 2 share Re<F^H x, w> + |w|^2."""
        if self.frame is None or self.core is None:
            return norm(self.dense, self.rows) * self.share
        if isinstance(self.frame, SharedFrame):  # <F^H x, w> is nobody's own
            return norm(self._formed, self.rows)
        inside = self.frame.project(self.dense) if self.inside is None else self.inside
        first, second = norm(self.dense, self.rows) * self.share, norm(self.core, self.rows)
        unit = torch.maximum(first, second).clamp_min(torch.finfo(first.dtype).tiny)  # squares leave float32's range
        cross = inner(inside * over(self.share / unit, inside), self.core / over(unit, self.core), self.rows)
        return unit * ((first / unit).square() + (second / unit).square() + 2 * cross).clamp_min(0).sqrt()

    def project(self, frame: Frame, overlap: Overlap | None) -> Tensor:
        """Coordinates F'^H O of what is here in a frame F', with its overlap with O's own, or None for the same.

        Those of all that processes have, the same everywhere, where F' compresses the mode that is split.
        """
        z = frame.project(self.dense)
        if self.core is None:
            return z if self.share == 1.0 else z * self.share
        return z.mul_(self.share).add_(self.core if overlap is None else overlap.move(self.core))

    @property
    def order(self) -> int:
        """N, the number of modes."""
        return self.dense.ndim - self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(d_1, ..., d_N), the shape of one row."""
        shape, split = list(self.dense.shape[self.rows :]), self.comm.split
        if split is not None:
            shape[split] = self.comm.length(shape[split])
        return tuple(shape)

    def full(self) -> Tensor:
        """O as one dense tensor, formed at the first call; what processes have is joined at every one."""
        if self.comm.alone:
            return self._formed
        product = self.comm.joined(self._formed.clone(), ())
        return product if self.comm.split is None else self.comm.whole(product, self.comm.split - self.order)

    def gram(self, mode: int) -> Tensor:
        """O_(n) O_(n)^H, (*rows, d_n, d_n)."""
        return gram(self.full(), mode, self.order)

    def contract(self, mode: int, factor: Tensor) -> Tensor:
        """O x_n factor^H, factor of shape (*rows, d_n, r): mode n becomes r long."""
        down: list[Tensor | None] = [None] * self.order
        down[mode] = (self.comm.here(factor, -2) if mode == self.comm.split else factor).mH
        side = self._side
        if side is None or self.core is None:
            return self.comm.joined(multilinear(self._formed, down), (mode,))
        own = side.factors[mode]
        known = self.inside if own is factor else None
        result = (multilinear(self.dense, down) if known is None else known) * self.share
        lifts = list(side.factors)
        # A warm start: F^H F = I.
        lifts[mode] = None if own is factor else factor.mH if own is None else factor.mH @ own
        return self.comm.joined(result.add_(multilinear(self.core, lifts)), (mode,))

    def to_unit(self, mode: int, product: Tensor) -> Tensor:
        """What :meth:`contract` returned for a mode, in place, each row with a largest entry, or part, of 1."""
        size = self.largest(mode, product)
        return product.div_(over(size.clamp_min(torch.finfo(product.dtype).tiny), product))

    def largest(self, mode: int, product: Tensor) -> Tensor:
        """The largest |entry| of what :meth:`contract` returned for a mode, real, (*rows); of complex ones, part."""
        here = largest(product, self.rows)
        return here if mode == self.comm.split else self.comm.largest(here)

    def size(self, mode: int, product: Tensor) -> Tensor:
        """The norm of such a product, real, (*rows)."""
        here = norm(product, self.rows)
        return here if mode == self.comm.split else self.comm.norm(here)

    def whole(self, mode: int, product: Tensor) -> Tensor:
        """Such a product with the entries of all processes."""
        split = self.comm.split
        return product if split is None or mode == split else self.comm.whole(product, split - self.order)

    def columns(self, mode: int) -> int:
        """How many columns the unfolding O_(n) has."""
        return prod(self.shape) // self.shape[mode]

    def sketch(self, mode: int, count: int, *key: int) -> Tensor:
        """O_(n) W, (*rows, d_n, count), with Gaussian W, one for all rows, that is seeded from the integers."""
        shape, split = tuple(count if n == mode else d for n, d in enumerate(self.shape)), self.comm.split
        z = gaussian(shape, self.dense, *key)
        return self.correlate(mode, z if split is None or mode == split else self.comm.here(z, split - self.order))

    def correlate(self, mode: int, z: Tensor) -> Tensor:
        """O_(n) Z_(n)^H, (*rows, d_n, r), for z of O's shape, or of one row's, but r long in mode n.

        Of the mode that is split, where it is another one, z has what is here.
        """
        side, others = self._side, [n for n in range(self.order) if n != mode]
        if side is None or self.core is None:
            product = correlate(self._formed, z, mode, self.order)
            return self.comm.whole(product, -2) if mode == self.comm.split else self.comm.joined(product, others)
        result = correlate(self.dense, z, mode, self.order)
        down = [u.mH if u is not None and n != mode else None for n, u in enumerate(side.factors)]
        if z.ndim < self.core.ndim:
            z = z.expand(*self.core.shape[: self.rows], *z.shape)
        small = correlate(self.core, multilinear(z, down), mode, self.order)
        own = side.factors[mode]
        return self.comm.joined(result.mul_(self.share).add_(small if own is None else own @ small), others)

    def sample(self, mode: int, columns: Tensor) -> Tensor:
        """These columns of the unfolding O_(n), (*rows, d_n, s).

        Fewer than 0.5% of them are lifted on their own; more cost as much as O, which is then formed once for all, and
        so it is where processes share it.

        Args:
            mode: n.
            columns: (s,) int64 for all rows, or (*rows, s), from 0 up to the product of the other modes, whose indices
                they count in their order.
        """
        shape, rows = self.shape, self.rows
        few = 200 * columns.shape[-1] * shape[mode] < prod(shape) and "_formed" not in self.__dict__
        if not few or not isinstance(self.frame, ModeFrame) or self.core is None or not self.comm.alone:
            return fibres(self.full(), mode, columns, rows)
        result, factors = fibres(self.dense, mode, columns, rows).mul_(self.share), self.frame.factors
        if not rows:
            return result.add_(_lifted_fibres(factors, self.core, mode, columns, shape))
        for b, (into, core) in enumerate(zip(result, self.core, strict=True)):
            own = [None if u is None else u[b] for u in factors]
            into.add_(_lifted_fibres(own, core, mode, columns[b] if columns.ndim > 1 else columns, shape))
        return result

    def sketches(self, matrices: Sequence[Tensor | None], modes: Iterable[int]) -> dict[int, Tensor]:
        """O x_m A_m over all modes m but n, for each n in ``modes``; see :func:`comoving.linalg.all_but_one`."""
        modes, split, given = tuple(modes), self.comm.split, matrices
        if split is not None and (a := matrices[split]) is not None:
            given = [*matrices[:split], self.comm.here(a, -1), *matrices[split + 1 :]]
        found = self._own_sketches(given, modes)
        for n, y in found.items():
            over = [m for m, a in enumerate(matrices) if a is not None and m != n]
            found[n] = self.comm.joined(y, over)
            if split is not None and split not in over:
                found[n] = self.comm.whole(found[n], split - self.order)
        return found

    def _own_sketches(self, matrices: Sequence[Tensor | None], modes: tuple[int, ...]) -> dict[int, Tensor]:
        """Those of what is here."""
        if not isinstance(self.frame, ModeFrame) or isinstance(self.frame, SharedFrame) or self.core is None:
            return all_but_one(self._formed, matrices, modes)
        factors = self.frame.factors
        small = all_but_one(
            self.core,
            [u if a is None else a if u is None else a @ u for a, u in zip(matrices, factors, strict=True)],
            modes,
        )
        lifts = {n: multilinear(y, [u if m == n else None for m, u in enumerate(factors)]) for n, y in small.items()}
        return {n: y * self.share + lifts[n] for n, y in all_but_one(self.dense, matrices, modes).items()}

    @cached_property
    def _formed(self) -> Tensor:
        if self.frame is None or self.core is None:
            return self.dense if self.share == 1.0 else self.dense * self.share
        return self.frame.add_lift(self.dense * self.share, self.core, 1.0)

    @property
    def _side(self) -> ModeFrame | None:
        """The frame of the second term, if it compresses a single mode, so that products with F w are cheap.

        None where processes have w whole, each of which would add it.
        """
        frame = self.frame
        if not isinstance(frame, ModeFrame) or isinstance(frame, SharedFrame):
            return None
        return frame if sum(u is not None for u in frame.factors) == 1 else None


def _lifted_fibres(
    factors: Sequence[Tensor | None], core: Tensor, mode: int, columns: Tensor, shape: Sequence[int]
) -> Tensor:
    """Columns of the unfolding of F w: w lifted in all other modes but the longest, then as many rows of its factor."""
    own = factors[mode]
    compressed = [m for m, u in enumerate(factors) if u is not None and m != mode]
    last = max(compressed, key=lambda m: shape[m]) if compressed else None
    if last is None:
        small = fibres(core, mode, columns)
        return small if own is None else own @ small
    open_modes = (mode, last)
    partly = multilinear(core, [None if m in open_modes else u for m, u in enumerate(factors)])
    # Each column's index along ``last``, and its column in the unfolding of the rest.
    rest = prod(d for m, d in enumerate(shape) if m > last and m != mode)
    index, other = columns // rest % shape[last], columns // (rest * shape[last]) * rest + columns % rest
    ends = partly.movedim(open_modes, (0, 1))
    pairs = ends.reshape(*ends.shape[:2], -1)[..., other]
    factor = factors[last]
    assert factor is not None
    small = torch.einsum("nas,sa->ns", pairs, factor[index])
    return small if own is None else own @ small
