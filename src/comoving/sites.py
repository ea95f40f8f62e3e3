"""A site: what was decided, once, about one parameter."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt

from .codecs import Codec
from .roles import Role
from .schedule import at_once
from .views import View


@dataclass(frozen=True)
class Shard:
    """What a process has of a parameter that several share: some entries of one mode, and all of the others.

    Args:
        mode: of the parameter as it is stored, and as it is seen.
        sizes: how many entries of it each process has.
        rank: which of them this one is.
        starts: the first entry that each has.
        group: names them: what other processes share, by the same sizes, is not stepped together with it.
    """

    mode: int
    sizes: tuple[int, ...]
    rank: int
    starts: tuple[int, ...]
    group: str

    @property
    def start(self) -> int:
        """The first entry that is here."""
        return self.starts[self.rank]

    @property
    def count(self) -> int:
        """How many entries are here."""
        return self.sizes[self.rank]


@dataclass(frozen=True)
class Site:
    """How one parameter is optimized.

    Args:
        name: the parameter's name, or its place in its group where it has none.
        view: how it is seen.
        ranks: those of its first frame; all None for a dense parameter.
        core_shape: the shape of its coordinates; the view's for a dense parameter.
        reason: why it is projected or dense, in words.
        role: what it does in the model; see :mod:`comoving.roles`.
        phase: at which steps, modulo the refresh period, its frame is refreshed.
        index: its place among all parameters, from which its random directions are seeded.
        block_mode: the mode of the view along which every slice has a frame of its own; None for one frame.
        base: the ranks that the layout chose, where adaptive ones start from others, or a budget may have lowered them.
        whole: whether the group's rule steps it in the whole frame; what is neither projected nor whole is dense, and
            gets AdamW whatever the rule.
        codec, moments: what a budget assigned in place of the group's codecs; None for these.
        rounded: whether updates are rounded into bfloat16 stochastically, by random bits that are seeded in its state.
        coded: whether its numbers are stored in codes (:mod:`comoving.weights`).
        deferred: whether its codes are written at refreshes only.
        shard: what is here of a parameter that processes share and step together; None for all of it.
        owner: which of the processes that share a parameter steps it, for all of them; None where each does.
    """

    name: str
    view: View
    ranks: tuple[int | None, ...]
    core_shape: tuple[int, ...]
    reason: str
    role: Role = "hidden"
    phase: int = 0
    index: int = 0
    block_mode: int | None = None
    base: tuple[int | None, ...] = ()
    whole: bool = False
    codec: Codec | None = None
    moments: Codec | None = None
    rounded: bool = False
    coded: bool = False
    deferred: bool = False
    shard: Shard | None = None
    owner: int | None = None

    @cached_property
    def here(self) -> "Site":
        """The site of what is here of the parameter."""
        return self if self.shard is None else self.of_length(self.shard.count)

    @cached_property
    def entire(self) -> "Site":
        """The site of the whole parameter."""
        return self if self.shard is None else self.of_length(sum(self.shard.sizes))

    @property
    def one_core(self) -> bool:
        """Whether a frame compresses the mode that is shared out: all processes have the same core then, and frames."""
        return self.shard is not None and self.block_mode is None and self.ranks[self.shard.mode] is not None

    @property
    def framed(self) -> "Site":
        """The site of what its frame and its core are of: of the whole parameter where all processes have them."""
        return self.entire if self.one_core else self

    def of_length(self, count: int) -> "Site":
        """The site of so many entries of the mode that is shared out."""
        assert self.shard is not None

        def cut(shape: tuple[int, ...], mode: int) -> tuple[int, ...]:
            return (*shape[:mode], count, *shape[mode + 1 :])

        mode = self.shard.mode
        view = replace(self.view, stored_shape=cut(self.view.stored_shape, mode))
        core = self.core_shape if self.one_core else cut(self.core_shape, 0 if self.block_mode is not None else mode)
        return replace(self, view=view, core_shape=core)

    @property
    def blocks(self) -> int:
        """The number of blocks, 0 for one frame."""
        return 0 if self.block_mode is None else self.view.shape[self.block_mode]

    def block(self, number: int) -> "Site":
        """The site of one block. Refreshes are staggered, some small blocks at a time; random directions all differ."""
        assert self.block_mode is not None
        shape = self.view.shape[: self.block_mode] + self.view.shape[self.block_mode + 1 :]
        return replace(
            self,
            name=f"{self.name}[{number}]",
            view=View("tensor", shape, self.view.dtype),
            core_shape=self.core_shape[1:],
            phase=self.phase + number // at_once(prod(shape)),
            index=(self.index + 1) * 2**16 + number,
            block_mode=None,
            shard=None,
        )

    @cached_property
    def projected(self) -> bool:
        """Whether any mode is compressed."""
        return any(r is not None for r in self.ranks)

    @property
    def plain(self) -> bool:
        """Whether torch's own AdamW serves it: dense, real, and written to by plain rounding.

        Other dense parameters get Adam in a whole frame.
        """
        return not (self.ruled or self.rounded or self.coded or self.view.dtype.is_complex)

    @property
    def ruled(self) -> bool:
        """Whether the group's own rule, preconditioner and codec of moments serve it."""
        return self.projected or self.whole

    @property
    def gain(self) -> float:
        """sqrt(full / core), the factor that gives a lifted unit-RMS core a unit RMS."""
        return sqrt(prod(self.view.shape) / prod(self.core_shape))
